"""The Monte Carlo engine: every path of every contract of a batch at once, of any problem.

Sources: Euler-Maruyama and log-Euler schemes, Glasserman, "Monte Carlo Methods in Financial
Engineering" (2003), ch. 6; moment matching, ibid., section 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smc.errors import ConfigError
from smc.problem.conditional import is_conditional
from smc.problem.contracts import ContractsLike, contract_array
from smc.problem.law import Law
from smc.problem.problem import Problem
from smc.problem.products.terminal import TerminalPrice
from smc.simulation import linking, paths
from smc.simulation.config import BlackScholesConfig, ProblemConfig, SimulationParams
from smc.simulation.cuda import require_device
from smc.simulation.levels import quantile_levels
from smc.simulation.regression import regressed_prices
from smc.simulation.sizes import Sampling

__all__ = [
    "BlackScholes",
    "BlackScholesConfig",
    "Estimate",
    "Priced",
    "ProblemConfig",
    "Simulation",
    "SimulationParams",
    "engine_of",
]

# Payoffs that one thread of a CPU makes before it is given more.
_LANES = 1 << 15
# Payoffs that are held at a time where only their mean is wanted.
_PAYOFFS = 1 << 24

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Prices by simulation, and how far off they are likely to be. Shapes: (n,) each. Units: currency."""

    price: Array
    standard_error: Array
    paths: int


class Priced(NamedTuple):
    """Payoffs (n, M), and the prices of the same contracts by another estimator, (n,) float64. Units: currency."""

    payoffs: torch.Tensor
    prices: torch.Tensor


class Simulation:
    """Simulates any problem. Pure: results depend on the contracts and their stream index only.

    Row i of a call is stream `params.skip + offset + i`, and does not depend on the batch it is in. CPU and GPU
    simulate the same paths, up to the rounding of elementary functions; `sampling='auto'` is Sobol on a CPU and Philox
    on a GPU.
    `conditional`: whether `simulate_priced` may be asked for, where the problem allows it.
    Raises: ConfigError for a device that cannot be used, or a number of time steps that does not fit the product.
    """

    def __init__(
        self,
        problem: Problem,
        params: SimulationParams,
        device: torch.device | str = "cpu",
        *,
        conditional: bool = False,
    ) -> None:
        problem.check_steps(params.timesteps)
        problem.product.check_ready()
        self.conditional = conditional and is_conditional(problem)
        self.problem, self.params, self.device = problem, params, require_device(device)
        self.sampling: Sampling = "sobol" if self.device.type == "cpu" else "pseudorandom"
        if params.sampling != "auto":
            self.sampling = params.sampling

    @property
    def rows_at_once(self) -> int:
        """Contracts that one thread of a CPU simulates together."""
        return max(1, _LANES // self.params.paths)

    def payoffs(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """Discounted payoffs of every path. Shapes: n contracts -> (n, M), on the device. Units: currency.

        Raises: ConfigError for a contract that cannot exist, or a scalar method that cannot be compiled.
        """
        table = torch.from_numpy(contract_array(contracts, self.problem.schema)).to(self.device)
        first = torch.tensor(self.params.skip + offset, dtype=torch.int64, device=self.device)
        return self.simulate(table, first)

    def levels(self, contracts: ContractsLike, *, offset: int = 0) -> torch.Tensor:
        """The payoff's quantile function, averaged over `network_size` slices of probability; its mean is the price.

        Shapes: n contracts -> (n, N), ascending. Units: currency.
        """
        return quantile_levels(self.payoffs(contracts, offset=offset), self.params.network_size)

    def price(self, contracts: ContractsLike, paths: int = 1 << 20, *, offset: int = 0) -> Estimate:
        """Mean payoffs and their standard errors, of eight independent samples or more, `paths` together or more.

        Raises: ConfigError as `payoffs`.
        """
        table = contract_array(contracts, self.problem.schema)
        samples, at_once = max(8, -(-paths // self.params.paths)), max(1, _PAYOFFS // self.params.paths)
        means = np.empty((len(table), samples))
        for row, contract in enumerate(table):
            for start in range(0, samples, at_once):
                count = min(at_once, samples - start)
                many = self.payoffs(np.tile(contract, (count, 1)), offset=offset + row * samples + start)
                means[row, start : start + count] = many.mean(dim=1, dtype=torch.float64).cpu().numpy()
        error = means.std(axis=1, ddof=1) / np.sqrt(samples)
        return Estimate(means.mean(axis=1), error, samples * self.params.paths)

    def simulate(self, table: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Payoffs of contracts known to be good, `first` being row 0's stream.

        Reads both where they are, so that a CUDA graph that holds this call may be replayed on new ones.
        Shapes: (n, fields) float64 and () int64, on the device -> (n, M).
        """
        if self.device.type == "cuda":
            threads = self.params.threads_per_block
            return linking.simulate(self.problem, table, first, threads=threads, **self._sizes)
        given = table.numpy(), int(first)
        return torch.from_numpy(paths.simulate(self.problem, *given, rows_at_once=self.rows_at_once, **self._sizes))

    def simulate_pairs(
        self, table: torch.Tensor, moved: torch.Tensor, first: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Payoffs of contracts, and of contracts a little beside them on the same random numbers, as `simulate` does.

        Shapes: two of (n, fields) float64 and () int64, on the device -> two of (n, M).
        """
        if self.device.type == "cuda":
            threads = self.params.threads_per_block
            return linking.simulate_pairs(self.problem, table, moved, first, threads=threads, **self._sizes)
        given = table.numpy(), moved.numpy(), int(first)
        found = paths.simulate_pairs(self.problem, *given, rows_at_once=self.rows_at_once, **self._sizes)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def simulate_priced(self, tables: Sequence[torch.Tensor], first: torch.Tensor) -> list[Priced]:
        """Payoffs, and prices with far less noise than their means, as `simulate` does.

        For two tables, those of contracts and of others a little beside them, on the same random numbers.
        Shapes: one or two of (n, fields) float64 and () int64, on the device. Raises: ConfigError where the simulation
        or its problem is not conditional.
        """
        if not self.conditional:
            raise ConfigError(
                f"{self.problem.name} is simulated without a law of the price given the outer path, or something "
                "else to expect: give conditional=True for a problem that has one"
            )
        if self.device.type == "cuda":
            threads = self.params.threads_per_block
            outputs = linking.simulate_priced(self.problem, tables, first, threads=threads, **self._sizes)
        else:
            given = [table.numpy() for table in tables], int(first)
            found = paths.simulate_priced(self.problem, *given, rows_at_once=self.rows_at_once, **self._sizes)
            outputs = [torch.from_numpy(of_table) for of_table in found]
        return [Priced(of_table[:, 0].contiguous(), regressed_prices(of_table)) for of_table in outputs]

    @property
    def _sizes(self) -> Any:
        params = self.params
        return {
            "seed": params.mc_seed,
            "paths": params.paths,
            "steps": params.timesteps,
            "precision": params.dtype,
            "sampling": self.sampling,
        }


def engine_of(
    config: BlackScholesConfig | ProblemConfig, device: torch.device | str = "cpu"
) -> BlackScholes | Simulation:
    """What simulates a configuration. Raises: ConfigError as the two do."""
    if isinstance(config, BlackScholesConfig):
        return BlackScholes(config, device)
    return Simulation(config.problem, config.sim_params, device, conditional=config.conditional)


class BlackScholes:
    """Simulates terminal prices, from which European payoffs are taken, as purely as `Simulation`.

    Row i of a call is stream `sim_params.skip + offset + i`, and does not depend on the batch it is in.
    """

    def __init__(self, config: BlackScholesConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = require_device(device)
        self.problem = config.problem
        self.params = params = config.sim_params
        if params.sampling == "auto":
            quasi = self.device.type == "cpu" and not config.normalize_forwards
            self.sampling: Sampling = "sobol" if quasi else "pseudorandom"
        else:
            self.sampling = params.sampling
        if self.sampling == "sobol" and not config.simulate_log_return and params.timesteps > 21201:
            raise ConfigError("sampling='sobol' has at most 21,201 time steps")
        prices = Problem(self.problem.process, TerminalPrice())
        self._prices = Simulation(prices, params.model_copy(update={"sampling": self.sampling}), self.device)

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
        law = self.problem.law(torch.from_numpy(array).to(self.device))
        ceiling, discount = self.ceiling(law).to(terminal.dtype), law.discount.to(terminal.dtype)
        return (ceiling[:, None] - terminal).clamp_(min=0).mul_(discount[:, None])

    def ceiling(self, law: Law) -> torch.Tensor:
        """What prices at expiry have to be below to pay: strikes. Shapes: -> (n,). Units: currency."""
        ceiling = self.problem.product.shortfall(law)
        assert ceiling is not None
        return ceiling

    def simulate(self, table: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Terminal prices of contracts known to be good, `first` being row 0's stream.

        Reads both where they are, so that a CUDA graph that holds this call may be replayed on new ones.
        Shapes: (n, 6) float64 and () int64, on the engine's device -> (n, M).
        """
        terminal = self._prices.simulate(table, first)
        if self.config.normalize_forwards:
            forward = self.problem.law(table).forward
            if self.device.type == "cuda":
                mean = terminal.mean(dim=1, dtype=torch.float64)
            else:  # torch's mean of a single row depends on the number of threads
                mean = torch.from_numpy(terminal.numpy().mean(axis=1, dtype=np.float64))
            terminal *= (forward / mean).to(terminal.dtype)[:, None]
        return terminal

    @property
    def rows_at_once(self) -> int:
        """Contracts that one thread of a CPU simulates together."""
        return self._prices.rows_at_once
