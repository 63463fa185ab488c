"""What a pricer is made of, and what a training run is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from smc.contracts import BoundSpec
from smc.gbm import BlackScholesConfig
from smc.scaling import Scaling

__all__ = ["AdamState", "GbmCVNNPricerConfig", "TrainingConfig", "TrainingPlan"]


class TrainingConfig(BaseModel):
    """One call of `train()`.

    `fresh_per_batch`: how many contracts of a batch are newly simulated; the rest come from the replay
    buffer. None means all of them on a GPU, and an eighth (at least 4) on a CPU.
    `schedule`: 'cosine' warms up over the first `warmup` steps and decays to zero at the last one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_batches: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    fresh_per_batch: int | None = Field(default=None, ge=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(default=100, ge=0)

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
    start: int = Field(ge=0)

    @property
    def end(self) -> int:
        """The global step at which the plan is done."""
        return self.start + self.config.num_batches

    def covers(self, step: int, config: TrainingConfig) -> bool:
        """Whether a call with this config at this step continues the plan rather than starting one."""
        same = config.model_copy(update={"num_batches": self.config.num_batches}) == self.config
        return same and self.start <= step and step + config.num_batches <= self.end


@dataclass(frozen=True)
class AdamState:
    """Adam's moments by parameter name, and the number of steps taken."""

    step: int
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]


@dataclass(frozen=True)
class GbmCVNNPricerConfig:
    """A pricer's whole state: what it is built from, and what `snapshot()` returns.

    `cfg.sim_params.skip` and `sobol_skip` count the contracts simulated and drawn so far. RNG states are
    torch's own, as bytes; where they are left out, mc_seed seeds them. `scaling` is measured when first needed.
    `resumed_from` is the version this state was loaded from, for the ledger; it is not part of the state.
    """

    cfg: BlackScholesConfig
    domain_bounds: Mapping[str, BoundSpec]
    cvnn: nn.Module
    optimizer_state: AdamState | None = None
    global_step: int = 0
    sobol_skip: int = 0
    torch_cpu_rng_state: bytes | None = None
    torch_cuda_rng_states: list[bytes] = field(default_factory=list)
    scaling: Scaling | None = None
    plan: TrainingPlan | None = None
    resumed_from: str | None = None
