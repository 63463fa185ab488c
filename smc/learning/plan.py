"""A training run: what is asked for, the plan it follows, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from smc.learning.optimizer import OptimizerName
from smc.numeric_fields import RealNumber, WholeNumber

__all__ = ["LEAST_HELD_BACK", "Progress", "StepReport", "TrainingConfig", "TrainingPlan"]

LEAST_HELD_BACK: Final = 64
"""Contracts from which on error bars mean something: 95 % of fewer is hardly a number."""


class TrainingConfig(BaseModel):
    """One call of `train()`.

    `fresh_per_batch`: how many contracts of a batch are newly simulated; the rest come from the replay
    buffer. None means all of them on a GPU, and an eighth (at least 4) on a CPU.
    `differential`: weight in the loss of the derivatives' error, 0 for none. Derivatives of every bin, or of the price
    alone where the payoff may jump, along one random direction for each contract, help where labels are noisy and for
    Greeks; a step costs about three.
    `optimizer`: SOAP by default (`smc.learning.soap`), or Adam, three times cheaper a step and ten times less accurate
    after it.
    `held_back`: so many contracts, simulated with eight times the paths, tell after the last step how far off answers
    are: `predict_error_bar` gives that. 0 for none; a few hundred take as long as some thousand labels.
    `schedule`: 'cosine' warms up over the first `warmup` steps and decays to zero at the last one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_batches: WholeNumber = Field(ge=1)
    batch_size: WholeNumber = Field(ge=1)
    learning_rate: RealNumber = Field(gt=0, allow_inf_nan=False)
    fresh_per_batch: WholeNumber | None = Field(default=None, ge=1)
    optimizer: OptimizerName = "soap"
    differential: RealNumber = Field(default=0.0, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: WholeNumber = Field(default=100, ge=0)
    held_back: WholeNumber = Field(default=0, ge=0)

    @model_serializer(mode="wrap")
    def _without_what_is_recent(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As checkpoints had it that did not know of error bars, unless there are some."""
        fields: dict[str, Any] = rest(self)
        if not self.held_back:
            del fields["held_back"]
        return fields

    @model_validator(mode="after")
    def _enough_are_held_back(self) -> TrainingConfig:
        if 0 < self.held_back < LEAST_HELD_BACK:
            raise ValueError(f"held_back must be 0 or at least {LEAST_HELD_BACK}, got {self.held_back}")
        return self

    @model_validator(mode="after")
    def _fresh_fits_the_batch(self) -> TrainingConfig:
        if self.fresh_per_batch is not None and self.fresh_per_batch > self.batch_size:
            raise ValueError(
                f"fresh_per_batch must be at most batch_size {self.batch_size}, got {self.fresh_per_batch}"
            )
        return self


class TrainingPlan(BaseModel):
    """The run a checkpoint belongs to: its config, and the global step it began at.

    A run that is interrupted and asked for batches that still fit in the plan continues its schedule,
    which is what makes a resumed run the same, bit for bit, as one that was never interrupted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: TrainingConfig
    start: WholeNumber = Field(ge=0)

    @property
    def end(self) -> int:
        """The global step at which the plan is done."""
        return self.start + self.config.num_batches

    def covers(self, step: int, config: TrainingConfig) -> bool:
        """Whether a call with this config at this step continues the plan rather than starting one."""
        same = config.model_copy(update={"num_batches": self.config.num_batches}) == self.config
        return same and self.start <= step and step + config.num_batches <= self.end

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero at the plan's end; or constant."""
        config, done = self.config, step - self.start
        if config.schedule == "constant":
            return config.learning_rate
        warmup = min(config.warmup, config.num_batches // 10)
        if done < warmup:
            return config.learning_rate * (done + 1) / warmup
        share = (done - warmup) / max(1, config.num_batches - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class StepReport:
    """What a training logger is told. `batch` counts from 1 within the call of `train()`."""

    step: int
    batch: int
    loss: float
    learning_rate: float
    contracts: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where training is, as of the last completed step."""

    step: int
    end: int
    loss: float | None
    training: bool
    commits_pending: int = 0
    contracts_per_second: float = 0.0
