"""What a pricer is made of: its whole state, and what `snapshot()` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from smc.learning.error_bars import ErrorBars
from smc.learning.optimizer import OptimizerState
from smc.learning.plan import TrainingPlan
from smc.learning.scale import Scaling
from smc.problem.contracts import BoundSpec
from smc.simulation.config import BlackScholesConfig, ProblemConfig

__all__ = ["GbmCVNNPricerConfig"]


@dataclass(frozen=True)
class GbmCVNNPricerConfig:
    """A pricer's whole state: what it is built from, and what `snapshot()` returns.

    `cfg.sim_params.skip` and `sobol_skip` count the contracts simulated and drawn so far. RNG states are
    torch's own, as bytes; where they are left out, mc_seed seeds them. `scaling` is measured when first needed,
    `error_bars` after the last step of a plan that asks for them: until then they are NaN.
    `resumed_from` is the version this state was loaded from, for the ledger; it is not part of the state.
    """

    cfg: BlackScholesConfig | ProblemConfig
    domain_bounds: Mapping[str, BoundSpec]
    cvnn: nn.Module
    optimizer_state: OptimizerState | None = None
    global_step: int = 0
    sobol_skip: int = 0
    torch_cpu_rng_state: bytes | None = None
    torch_cuda_rng_states: list[bytes] = field(default_factory=list)
    scaling: Scaling | None = None
    error_bars: ErrorBars | None = None
    plan: TrainingPlan | None = None
    resumed_from: str | None = None
