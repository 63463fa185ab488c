"""The Monte Carlo engine: geometric Brownian motion under every contract of a batch at once.

Sources: Euler-Maruyama and log-Euler schemes, Glasserman, "Monte Carlo Methods in Financial
Engineering" (2003), ch. 6; moment matching, ibid., section 4.5.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from smc.arrays import array_module, as_tensor, on_torch_stream, require_device
from smc.contracts import ContractsLike, contract_array
from smc.errors import ConfigError
from smc.gbm_cuda import simulate_terminal
from smc.models.numerical import Precision
from smc.normals import box_muller, bridge_increments, philox4x32, sobol_normals

__all__ = ["BlackScholes", "BlackScholesConfig", "SimulationParams"]

# Lanes simulated together on the CPU: three dozen temporaries of this many words fit in its caches.
_LANES = 1 << 15


class SimulationParams(BaseModel):
    """How many paths are simulated, and with which random numbers.

    `network_size` is N, the number of levels of the quantile spectrum; each level averages
    `batches_per_mc_run` sorted payoffs, so a contract takes M = N x batches_per_mc_run paths.
    `skip` counts the contracts already simulated: it is the whole state of the random numbers.
    `sampling`: 'pseudorandom' (Philox), 'sobol' (scrambled, Brownian bridge), or 'auto': Sobol on a CPU,
    where paths are dear, unless forwards are normalised, which would undo its accuracy; else Philox.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: int = Field(ge=1, le=16384)
    network_size: int = Field(ge=2)
    batches_per_mc_run: int = Field(ge=1)
    threads_per_block: int = Field(default=256, ge=32, le=1024, multiple_of=32)
    mc_seed: int = Field(ge=0, lt=2**64)
    buffer_size: int = Field(default=10_000, ge=1)
    skip: int = Field(default=0, ge=0)
    dtype: Precision = Precision.float32
    sampling: Literal["auto", "pseudorandom", "sobol"] = "auto"

    @field_validator("mc_seed", mode="before")
    @classmethod
    def _plain_int(cls, value: object) -> object:
        return int(value) if isinstance(value, np.integer) else value

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
    """Simulates discounted payoffs. Pure: results depend on the contracts and their stream index only.

    Row i of a call is stream `sim_params.skip + offset + i`, and does not depend on the batch it is in.
    """

    def __init__(self, config: BlackScholesConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = require_device(device)
        params = config.sim_params
        if params.sampling == "auto":
            quasi = self.device.type == "cpu" and not config.normalize_forwards
            self.sampling = "sobol" if quasi else "pseudorandom"
        else:
            self.sampling = params.sampling
        if self.sampling == "sobol" and not config.simulate_log_return and params.timesteps > 21201:
            raise ConfigError("sampling='sobol' has at most 21,201 time steps")
        self._xp = array_module(self.device)

    def terminal_prices(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """Simulated prices at expiry. Shapes: n contracts -> (n, M), on the engine's device.

        Units: currency. Raises: ConfigError for a contract that cannot exist.
        """
        array = contract_array(contracts)
        if self.device.type == "cpu":
            return as_tensor(self._simulate(array, offset))
        with torch.cuda.device(self.device), on_torch_stream(self.device):
            return as_tensor(self._simulate(array, offset))

    def discounted_puts(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """Discounted put payoffs df max(K - S_T, 0). Shapes: n contracts -> (n, M). Units: currency."""
        array = contract_array(contracts)
        terminal = self.terminal_prices(array, offset=offset)
        columns = torch.from_numpy(array).to(self.device)
        strike = columns[:, 1:2].to(terminal.dtype)
        discount = torch.exp(-columns[:, 3:4] * columns[:, 2:3]).to(terminal.dtype)
        return (strike - terminal).clamp_(min=0).mul_(discount)

    def _simulate(self, contracts: np.ndarray[Any, Any], offset: int) -> Any:
        xp, params = self._xp, self.config.sim_params
        first = params.skip + offset
        table = xp.asarray(contracts)
        if self.device.type == "cuda" and self.sampling == "pseudorandom":
            terminal = simulate_terminal(
                table,
                xp.asarray(first, dtype=xp.uint64),
                seed=params.mc_seed,
                paths=params.paths,
                steps=params.timesteps,
                threads=params.threads_per_block,
                log_return=self.config.simulate_log_return,
                precision=params.dtype,
            )
        else:
            terminal = xp.empty((len(contracts), params.paths), dtype=params.dtype.numpy)
            walk = self._sobol_walk if self.sampling == "sobol" else self._pseudorandom_walk
            rows = max(1, _LANES // params.paths) if xp is np else max(1, (1 << 24) // params.paths)
            for start in range(0, len(contracts), rows):
                stop = min(start + rows, len(contracts))
                streams = xp.arange(first + start, first + stop, dtype=xp.uint64)
                terminal[start:stop] = walk(table[start:stop], streams)
        if self.config.normalize_forwards:
            forward = table[:, 0] * xp.exp((table[:, 3] - table[:, 4]) * table[:, 2])
            mean = terminal.mean(axis=1, dtype=xp.float64)
            terminal *= (forward / mean).astype(terminal.dtype)[:, None]
        return terminal

    def _pseudorandom_walk(self, table: Any, streams: Any) -> Any:
        xp, params = self._xp, self.config.sim_params
        per_block = 4 if params.dtype is Precision.float32 else 2
        paths = xp.arange(params.paths, dtype=xp.uint64)[None, :]
        low, high = (streams & xp.uint64(0xFFFFFFFF))[:, None], (streams >> xp.uint64(32))[:, None]

        def steps() -> Any:
            for block in range(-(-params.timesteps // per_block)):
                words = philox4x32(xp, params.mc_seed, (paths, block, low, high))
                yield from box_muller(xp, words, params.dtype)[: params.timesteps - block * per_block]

        return self._accumulate(table, steps())

    def _sobol_walk(self, table: Any, streams: Any) -> Any:
        xp, params = self._xp, self.config.sim_params
        seed, paths, steps = params.mc_seed, params.paths, params.timesteps
        if self.config.simulate_log_return:
            # A bridge's increments sum to its end point, and the log scheme reads nothing else: the
            # interior dimensions cancel exactly, so they are not drawn.
            end = sobol_normals(xp, seed, streams, paths, 1, params.dtype)[:, 0]
            return self._accumulate(table, iter((end * params.dtype.numpy.type(np.sqrt(steps)),)))
        normals = sobol_normals(xp, seed, streams, paths, steps, params.dtype)
        increments = xp.asarray(bridge_increments(steps).astype(params.dtype.numpy)) @ normals
        return self._accumulate(table, iter(increments[:, step] for step in range(steps)))

    def _accumulate(self, table: Any, increments: Any) -> Any:
        xp, params = self._xp, self.config.sim_params
        X0, _, T, r, d, v = (table[:, i : i + 1] for i in range(6))
        dt = T / params.timesteps
        dtype = params.dtype.numpy
        volatility = (v * xp.sqrt(dt)).astype(dtype)
        if self.config.simulate_log_return:
            total = next(increments)
            for z in increments:
                total = total + z
            drift = ((r - d - 0.5 * v * v) * T).astype(dtype)
            return X0.astype(dtype) * xp.exp(volatility * total + drift)
        price = X0.astype(dtype)
        growth = (1.0 + (r - d) * dt).astype(dtype)
        for z in increments:
            # Absorption by reflection: one Euler step may cross zero, a price may not.
            price = xp.abs(price * (volatility * z + growth))
        return price
