"""The Monte Carlo engine: geometric Brownian motion under every contract of a batch at once.

Sources: Euler-Maruyama and log-Euler schemes, Glasserman, "Monte Carlo Methods in Financial
Engineering" (2003), ch. 6; moment matching, ibid., section 4.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.numeric_fields import WholeNumber
from smc.problem.contracts import ContractsLike, contract_array
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.products.terminal import TerminalPrice
from smc.simulation import skeleton
from smc.simulation.cuda import require_device
from smc.simulation.normals import bridge_increments, sobol_points
from smc.simulation.paths import simulate as simulate_paths

__all__ = ["BlackScholes", "BlackScholesConfig", "SimulationParams"]

# Payoffs that one thread of a CPU makes before it is given more.
_LANES = 1 << 15
# Normals that a GPU holds at a time where a walk needs them in memory: 1 GiB in single precision, twice.
_NORMALS = 1 << 28

# Until the targets are payoffs, the engine simulates prices, and the payoff is taken from them.
_TERMINAL: Mapping[str, Problem] = {
    "log": Problem(GeometricBrownianMotion(scheme="log"), TerminalPrice()),
    "euler": Problem(GeometricBrownianMotion(scheme="euler"), TerminalPrice()),
}

Array = npt.NDArray[np.float64]


class SimulationParams(BaseModel):
    """How many paths are simulated, and with which random numbers.

    `network_size` is N, the number of levels of the quantile spectrum; each level averages
    `batches_per_mc_run` sorted payoffs, so a contract takes M = N x batches_per_mc_run paths.
    `skip` counts the contracts already simulated: it is the whole state of the random numbers.
    `sampling`: 'pseudorandom' (Philox), 'sobol' (scrambled, Brownian bridge), or 'auto': Sobol on a CPU,
    where paths are dear, unless forwards are normalised, which would undo its accuracy; else Philox.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: WholeNumber = Field(ge=1, le=16384)
    network_size: WholeNumber = Field(ge=2)
    batches_per_mc_run: WholeNumber = Field(ge=1)
    threads_per_block: WholeNumber = Field(default=256, ge=32, le=1024, multiple_of=32)
    mc_seed: WholeNumber = Field(ge=0, lt=2**64)
    buffer_size: WholeNumber = Field(default=10_000, ge=1)
    skip: WholeNumber = Field(default=0, ge=0)
    dtype: Precision = Precision.float32
    sampling: Literal["auto", "pseudorandom", "sobol"] = "auto"

    @model_validator(mode="after")
    def _paths_fit_the_counter(self) -> SimulationParams:
        if self.paths >= 2**31:
            raise ValueError(f"network_size x batches_per_mc_run must be below 2^31, got {self.paths}")
        return self

    @property
    def paths(self) -> int:
        """M, the paths simulated for one contract."""
        return self.network_size * self.batches_per_mc_run

    @property
    def bins(self) -> int:
        """Complex bins of the spectrum, network_size // 2 + 1."""
        return self.network_size // 2 + 1


class BlackScholesConfig(BaseModel):
    """The dynamics: which scheme, and whether terminal prices are rescaled to the exact forward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sim_params: SimulationParams
    simulate_log_return: bool = True
    normalize_forwards: bool = False

    @model_validator(mode="after")
    def _sobol_needs_no_normalisation(self) -> BlackScholesConfig:
        if self.normalize_forwards and self.sim_params.sampling == "sobol":
            raise ValueError(
                "normalize_forwards with sampling='sobol' makes prices worse than either alone: "
                "choose one (normalize_forwards=False, or sampling='pseudorandom' or 'auto')"
            )
        return self


class BlackScholes:
    """Simulates terminal prices. Pure: results depend on the contracts and their stream index only.

    Row i of a call is stream `sim_params.skip + offset + i`, and does not depend on the batch it is in.
    """

    def __init__(self, config: BlackScholesConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = require_device(device)
        params = config.sim_params
        if params.sampling == "auto":
            quasi = self.device.type == "cpu" and not config.normalize_forwards
            self.sampling: Literal["pseudorandom", "sobol"] = "sobol" if quasi else "pseudorandom"
        else:
            self.sampling = params.sampling
        if self.sampling == "sobol" and not config.simulate_log_return and params.timesteps > 21201:
            raise ConfigError("sampling='sobol' has at most 21,201 time steps")
        self._constants: tuple[torch.Tensor, torch.Tensor] | None = None

    def terminal_prices(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """Simulated prices at expiry. Shapes: n contracts -> (n, M), on the engine's device.

        Units: currency. Raises: ConfigError for a contract that cannot exist.
        """
        table = torch.from_numpy(contract_array(contracts)).to(self.device)
        first = torch.tensor(self.config.sim_params.skip + offset, dtype=torch.int64, device=self.device)
        return self.simulate(table, first)

    def discounted_puts(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """Discounted put payoffs df max(K - S_T, 0). Shapes: n contracts -> (n, M). Units: currency."""
        array = contract_array(contracts)
        terminal = self.terminal_prices(array, offset=offset)
        columns = torch.from_numpy(array).to(self.device)
        strike = columns[:, 1:2].to(terminal.dtype)
        discount = torch.exp(-columns[:, 3:4] * columns[:, 2:3]).to(terminal.dtype)
        return (strike - terminal).clamp_(min=0).mul_(discount)

    def simulate(self, table: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Terminal prices of contracts known to be good, `first` being row 0's stream.

        Reads both where they are, so that a CUDA graph that holds this call may be replayed on new ones.
        Shapes: (n, 6) float64 and () int64, on the engine's device -> (n, M).
        """
        if self.device.type == "cuda":
            terminal = self._on_gpu(table, first)
        else:
            terminal = torch.from_numpy(self._on_cpu(table.numpy(), int(first)))
        if self.config.normalize_forwards:
            forward = table[:, 0] * torch.exp((table[:, 3] - table[:, 4]) * table[:, 2])
            if self.device.type == "cuda":
                mean = terminal.mean(dim=1, dtype=torch.float64)
            else:  # torch's mean of a single row depends on the number of threads
                mean = torch.from_numpy(terminal.numpy().mean(axis=1, dtype=np.float64))
            terminal *= (forward / mean).to(terminal.dtype)[:, None]
        return terminal

    # --- on a GPU -------------------------------------------------------------------------------------

    def _on_gpu(self, table: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        params = self.config.sim_params
        common: dict[str, Any] = {
            "seed": params.mc_seed,
            "threads": params.threads_per_block,
            "precision": params.dtype,
        }
        sizes: dict[str, Any] = {"paths": params.paths, "steps": params.timesteps}
        if self.sampling == "pseudorandom":
            log_return = self.config.simulate_log_return
            return skeleton.simulate_pseudorandom(table, first, log_return=log_return, **sizes, **common)
        if self.config.simulate_log_return:
            return skeleton.simulate_sobol(table, first, **sizes, **common)
        points, bridge = self._sobol_constants()
        rows = min(skeleton.MOST_ROWS, max(1, _NORMALS // points.numel()))
        pieces = []
        for start in range(0, len(table), rows):
            part = table[start : start + rows]
            normals = skeleton.sobol_normals(points, first, start, len(part), **common)
            walked = skeleton.walk(part, bridge @ normals, threads=params.threads_per_block, precision=params.dtype)
            pieces.append(walked)
        return torch.cat(pieces) if pieces else table.new_empty((0, params.paths), dtype=params.dtype.torch)

    def _sobol_constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._constants is None:
            params = self.config.sim_params
            points = torch.from_numpy(sobol_points(params.timesteps, params.paths).view(np.int32))
            bridge = torch.from_numpy(bridge_increments(params.timesteps))
            self._constants = points.to(self.device), bridge.to(self.device, params.dtype.torch)
        return self._constants

    # --- on the CPU -----------------------------------------------------------------------------------

    @property
    def rows_at_once(self) -> int:
        """Contracts that one thread of a CPU simulates together."""
        return max(1, _LANES // self.config.sim_params.paths)

    def _on_cpu(self, table: Array, first: int) -> npt.NDArray[Any]:
        params = self.config.sim_params
        return simulate_paths(
            _TERMINAL["log" if self.config.simulate_log_return else "euler"],
            table,
            first,
            seed=params.mc_seed,
            paths=params.paths,
            steps=params.timesteps,
            precision=params.dtype,
            sampling=self.sampling,
            rows_at_once=self.rows_at_once,
        )
