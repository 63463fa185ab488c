"""The pricer: a network trained on simulated payoff spectra, and asked for prices and distributions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.errors import ConfigError
from smc.learning import loop
from smc.learning.commits import CommitOrders, Ending
from smc.learning.control import TrainingControl
from smc.learning.error_bars import ErrorBars
from smc.learning.guarded import Logger, only_training, stopped_by_signals
from smc.learning.plan import Progress, StepReport, TrainingConfig
from smc.learning.result import TrainingResult
from smc.learning.state import TrainingState
from smc.numeric_fields import is_whole
from smc.prediction.predicting import Predicting
from smc.prediction.predictor import Kind, Predictor
from smc.problem.contracts import BoundSpec
from smc.problem.problem import Problem
from smc.storage.commits import DEFAULT_MESSAGE, FLUSH_SECONDS, CommitTarget

__all__ = [
    "GbmCVNNPricer",
    "GbmCVNNPricerConfig",
    "Progress",
    "StepReport",
    "TrainingConfig",
    "TrainingResult",
]

Metrics = Callable[["GbmCVNNPricer"], Mapping[str, float]]


class GbmCVNNPricer(Predicting):
    """Learns the discounted payoff's quantile spectrum over a domain of contracts: of European puts under geometric
    Brownian motion, or of any problem that `config.cfg` names.

    Lives where its model's parameters live. `snapshot`, `stop` and `progress` may be called from other
    threads while `train` runs; everything else belongs to the thread that trains.

    Raises: ConfigError if the model cannot serve, or its device cannot be used.
    """

    def __init__(self, config: GbmCVNNPricerConfig) -> None:
        self._state = TrainingState(config)
        self._control = TrainingControl(self._state)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._state.model

    @property
    def device(self) -> torch.device:
        """Where it trains and answers."""
        return self._state.device

    @property
    def problem(self) -> Problem:
        """What is simulated and learnt."""
        return self._state.problem

    @property
    def domain(self) -> dict[str, BoundSpec]:
        """The contracts that it is trained on."""
        return self._state.domain

    # --- training -------------------------------------------------------------------------------------

    def train(
        self,
        config: TrainingConfig,
        *,
        logger: Logger | Sequence[Logger] | None = None,
        blockchain_store: CommitTarget | None = None,
        auto_commit: bool = False,
        commit_interval: int | None = None,
        commit_message_template: str = DEFAULT_MESSAGE,
        experiment: str = "",
        parameters: Mapping[str, Any] | None = None,
        flush_seconds: float = FLUSH_SECONDS,
        metrics: Metrics | None = None,
        report_every: int | None = None,
    ) -> TrainingResult:
        """Train for `config.num_batches` more batches, committing as asked; return when all is settled.

        `auto_commit` commits the final state, `commit_interval=n` every n batches as well. A commit never
        holds up a step and never ends training: one that fails is logged, counted in the result, and
        its snapshot kept in the spool. After the last step commits have `flush_seconds` to reach the ledger; what has
        not goes to the spool. `experiment` and `parameters`, whatever JSON holds, stand in every entry. Works the same
        inside a running event loop, which it blocks.

        `metrics` is called with the pricer at each commit, and the finite numbers that it gives by name stand in the
        entry beside ours: an error on contracts of one's own, say. Training waits for it; one that fails is dropped
        with one line. What it draws of torch's random numbers does not change what is trained.

        `logger`, one or several, is called with a report every `report_every` steps (1 on a CPU, 50 on a GPU, where to
        read a loss is to wait for its step), in a thread that this one waits for; one that fails, or
        takes longer than 30 s, is dropped with one line, and training goes on. In the main thread SIGINT and SIGTERM,
        unless the program handles them itself, end training after the step it is in, with its final commit, and are
        then delivered again; a second one leaves the commit seconds. One pricer trains at a time in a process.

        Raises: ConfigError (a ValueError) for arguments that do not go together, before training starts;
        NumericsError when the loss is no longer finite, after the commits before it are settled.
        """
        if blockchain_store is None and (auto_commit or commit_interval is not None):
            raise ConfigError("auto_commit or commit_interval requires blockchain_store")
        if commit_interval is not None and not auto_commit:
            raise ConfigError("commit_interval requires auto_commit=True")
        if report_every is not None and (not is_whole(report_every) or report_every < 1):
            raise ConfigError(f"report_every must be a whole number of steps, at least 1, got {report_every!r}")
        orders = CommitOrders(
            blockchain_store if auto_commit else None,
            commit_interval,
            commit_message_template,
            experiment,
            parameters or {},
            flush_seconds,
            None if metrics is None else lambda: metrics(self),
        )
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise ConfigError("the model was made inside torch.inference_mode(), where nothing can be trained")
        loggers = [logger] if callable(logger) else list(logger or ())
        with (
            stopped_by_signals(lambda within: self.stop(within=within)),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._control.running(),
            only_training(),
            self._state.own_random_numbers(),
        ):
            return loop.run(self._state, self._control, config, orders, loggers, report_every)

    def stop(
        self, *, within: float = math.inf, metrics: Mapping[str, float] | None = None, pruned: bool = False
    ) -> None:  # fmt: skip
        """Ask `train` to end after the step it is in; it still makes its final commit.

        `within`: seconds that the newest commit then has to reach the ledger, if that is less than it had anyway; older
        ones are replaced by it. `metrics`, finite numbers, stand in the final commit's entry, beside the others: they
        say why; `pruned` says that the experiment is given up. `within` holds for a `train` that waits for its last
        commits as well. Raises: ConfigError for metrics that are not finite, or a time that is none.
        """
        if math.isnan(within):
            raise ConfigError("within must be a number of seconds, got nan")
        if not all(map(math.isfinite, (metrics or {}).values())):
            raise ConfigError(f"metrics must be finite numbers, got {metrics}")
        self._control.stop(within, Ending(metrics or {}, pruned))

    @property
    def progress(self) -> Progress:
        """Where training is."""
        return self._control.progress

    def snapshot(self) -> GbmCVNNPricerConfig:
        """The whole state, copied: `GbmCVNNPricer(pricer.snapshot())` goes on exactly from here.

        From another thread during training it is taken between two steps.
        """
        return self._control.snapshot()

    # --- prediction -----------------------------------------------------------------------------------

    @cached_property
    def predictor(self) -> Predictor:
        """What answers for the network as it is at the moment, while it is trained further too."""
        state = self._state
        return Predictor(state.model, state.scaling, state.domain, state.params.network_size, state.problem)

    @property
    def error_bars(self) -> ErrorBars | None:
        """How far off answers are likely to be, if the last training measured it."""
        return self._state.error_bars

    @property
    def distribution_kinds(self) -> tuple[Kind, ...]:
        """What there are distributions of: what was learnt, first, and the other option where that follows."""
        return self.predictor.distribution_kinds

    def asked(self) -> Predictor:
        """The predictor; with a warning before any training."""
        if self._state.position.step == 0:
            warnings.warn(
                "this pricer has not been trained: what it predicts is its network's random start; call train first",
                stacklevel=3,
            )
        self.predictor.error_bars = self._state.error_bars  # which training may have measured since
        return self.predictor
