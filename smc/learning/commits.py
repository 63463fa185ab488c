"""The commits of one call of `train()`: what is asked for, and the snapshots that are handed over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from smc.checkpoint.file import metadata_of, tensors_of
from smc.errors import ConfigError
from smc.learning.plan import TrainingPlan
from smc.learning.state import TrainingState
from smc.learning.step import TrainingStep
from smc.numeric_fields import is_whole
from smc.storage.commits import (
    BackgroundCommits,
    CommitOutcome,
    CommitRequest,
    CommitTarget,
    check_entry,
    check_template,
)
from smc.storage.spool import CommitRecord

__all__ = ["CommitOrders", "Ending", "TrainingCommits"]

logger = logging.getLogger("smc.training")


@dataclass(frozen=True)
class CommitOrders:
    """What is committed, and how. Without a target nothing is.

    `interval` is in batches; None commits the final state alone. `metrics` gives numbers of the user's own.
    Raises: ConfigError for what an entry cannot hold.
    """

    target: CommitTarget | None
    interval: int | None
    template: str
    experiment: str
    parameters: Mapping[str, Any]
    flush_seconds: float
    metrics: Callable[[], Mapping[str, float]] | None

    def __post_init__(self) -> None:
        if self.interval is not None and (not is_whole(self.interval) or self.interval < 1):
            raise ConfigError(f"commit_interval must be a whole number of batches, at least 1, got {self.interval!r}")
        check_template(self.template)
        check_entry(self.experiment, self.parameters)
        if not self.flush_seconds >= 0:
            raise ConfigError(f"flush_seconds must be at least 0, got {self.flush_seconds}")


@dataclass(frozen=True)
class Ending:
    """How training ended: what whoever stopped it gives the entry, and whether the experiment was given up."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    pruned: bool = False


class TrainingCommits:
    """Hands snapshots of a state over, which are committed beside training."""

    def __init__(self, state: TrainingState, plan: TrainingPlan, orders: CommitOrders) -> None:
        assert orders.target is not None
        self._state, self._plan, self._orders, self._metrics = state, plan, orders, orders.metrics
        outline = state.after_a_step()
        slots = 1 if orders.interval is None else None
        self._background = BackgroundCommits(orders.target, tensors_of(outline), metadata_of(outline), slots=slots)

    @property
    def pending(self) -> int:
        """Snapshots that are not in the ledger yet."""
        return self._background.pending

    def submit(self, step: TrainingStep, batch: int, ending: Ending | None = None) -> None:
        """Hand over the state as it is; with an `ending` it is the last."""
        state = self._state.by_reference()
        request = CommitRequest(
            step=state.global_step,
            batch=batch,
            template=self._orders.template,
            experiment=self._orders.experiment,
            resumed_from=state.resumed_from,
            metrics={
                **self._measured(),
                "learning_rate": self._plan.learning_rate(state.global_step - 1),
                "contracts": state.cfg.sim_params.skip,
                **(ending.metrics if ending else {}),
            },
            plan_end=self._plan.end,
            pruned=ending is not None and ending.pruned,
            parameters=self._orders.parameters,
            final=ending is not None,
        )
        self._background.submit(request, tensors_of(state), metadata_of(state), step.outcome())

    def hurry(self, within: float) -> None:
        """Give the newest so many seconds to reach the ledger; older ones are replaced by it."""
        self._background.hurry(within)

    def close(self, flush_seconds: float) -> tuple[CommitOutcome, ...]:
        """Wait until all is settled, as long as asked; -> what became of each."""
        return self._background.close(flush_seconds)

    def _measured(self) -> dict[str, float]:
        """What the user's own hook gives."""
        if self._metrics is None:
            return {}
        device = self._state.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = dict(self._metrics())
            CommitRecord.checked(ledger="", message="", step=0, loss=None, metrics=found)
        except Exception as error:  # it may raise anything; a KeyboardInterrupt ends training as elsewhere
            logger.warning("metrics failed, and commits go on without it: %r", error)
            self._metrics = None
            return {}
        return found
