"""What answers are compared with: the problem's oracle, and a large simulation where there is none."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from smc.models.numerical import Precision
from smc.problem.conditional import estimator_of
from smc.problem.oracles.oracle import Oracle, oracle_of
from smc.problem.problem import Problem
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation
from smc.simulation.levels import quantile_levels
from smc.simulation.sizes import sizes_of

__all__ = ["Known", "Reference", "reference_of"]

Array = npt.NDArray[np.float64]

# Steps of paths that a reference may take in all; contracts whose prices, and whose distributions, are simulated.
_PATH_STEPS = {"cpu": 1 << 29, "cuda": 1 << 38}
_PRICES, _DISTRIBUTIONS = 128, 64
_LEAST_PATHS, _MOST_PATHS = 1 << 14, 1 << 22
# Time steps of a process whose steps have a bias, at least; and where the product looks at prices between them.
_STEPS, _STEPS_BETWEEN = 128, 384
# Paths that are simulated together, a power of two as Sobol points like them.
_SAMPLE = 1 << 13
# Contracts that a recursion is asked for where each takes many of its answers.
_DEAR = 64
# Contracts that a slow oracle is asked the prices of.
_SLOW = 128
_SEED = 20_261_127
# Answers that are kept: the same sample is asked about for one version after the other.
_KEPT = 8


@dataclass(frozen=True)
class Known:
    """Values to compare with. Shapes: values and noise (m,) or (m, N), of the first m contracts that were asked about.

    `noise` is the standard error of what was simulated, else None; `about` says where values come from.
    """

    values: Array
    noise: Array | None
    about: str


class Reference:
    """The best that is known of a problem.

    What is simulated is simulated for the first contracts only, on random numbers that no training uses, with time
    steps so fine that their bias does not count: `path_steps` in all, by default 2^29 on a CPU and 2^38 on a GPU.
    """

    def __init__(self, problem: Problem, device: str = "cpu", *, path_steps: int | None = None) -> None:
        self.problem, self._device = problem, device
        self._path_steps = path_steps or _PATH_STEPS[torch.device(device).type]
        self.oracle: Oracle | None = oracle_of(problem)
        self._kept: OrderedDict[tuple[str, int, bytes], Known] = OrderedDict()

    def price(self, contracts: Array) -> Known:
        """Present values. Shapes: (n, fields) -> m of (n,)."""
        return self._once("price", 1, contracts, lambda: self._price(contracts))

    def levels(self, contracts: Array, size: int) -> Known:
        """Quantile levels of what was learnt. Shapes: (n, fields) -> m of (n, size); noise (m,), as a W2 distance."""
        return self._once("levels", size, contracts, lambda: self._levels(contracts, size))

    def _once(self, what: str, size: int, contracts: Array, work: Callable[[], Known]) -> Known:
        key = what, size, hashlib.sha256(contracts.tobytes()).digest()
        if key not in self._kept:
            self._kept[key] = work()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _price(self, contracts: Array) -> Known:
        if self.oracle is not None:
            asked = contracts[:_SLOW] if self.oracle.slow else contracts
            return Known(self.oracle.price(asked), None, self.oracle.about)
        few = contracts[:_PRICES]
        means = self._samples(few, self._paths(_PRICES), 1)[:, :, 0]
        error = means.std(axis=1, ddof=1) / np.sqrt(means.shape[1])
        return Known(means.mean(axis=1), error, self._about(_PRICES))

    def _levels(self, contracts: Array, size: int) -> Known:
        if self.oracle is not None and self.oracle.levels is not None:
            return Known(self.oracle.levels(contracts, size, self.oracle.kinds[0]), None, self.oracle.about)
        few = contracts[:_DISTRIBUTIONS]
        samples = self._samples(few, self._paths(_DISTRIBUTIONS), size)
        halves = [samples[:, part::2].mean(axis=1) for part in (0, 1)]
        noise = np.sqrt(np.square(halves[0] - halves[1]).mean(axis=1)) / 2
        return Known(samples.mean(axis=1), noise, self._about(_DISTRIBUTIONS))

    @property
    def greeks_of(self) -> int | None:
        """How many contracts it tells the Greeks of: None for all, 0 for none."""
        if self.oracle is None or self.oracle.greeks is None:
            return 0
        return _SLOW // 8 if self.oracle.slow else _DEAR if self.oracle.dear else None

    def _about(self, contracts: int) -> str:
        return f"simulated, 2^{self._paths(contracts).bit_length() - 1} paths"

    def _steps(self) -> int:
        product = self.problem.product
        dates = 0 if product.continuous else product.dates
        if product.continuous and not self.problem.process.exact:
            return _STEPS_BETWEEN
        if self.problem.process.exact and not product.continuous:
            return max(1, dates)
        return dates * -(-_STEPS // dates) if dates else _STEPS

    def _paths(self, contracts: int) -> int:
        normals = sizes_of(self.problem, estimator_of(self.problem)).normals
        most = self._path_steps // (contracts * self._steps() * normals)
        return max(_LEAST_PATHS, min(_MOST_PATHS, 1 << (most.bit_length() - 1)))

    def _samples(self, contracts: Array, paths: int, size: int) -> Array:
        """Levels by independent samples, or prices where one is wanted. Shapes: (n, fields) -> (n, samples, size).

        Of a problem that is conditional, prices are expected payoffs, which have a fraction of the noise.
        """
        params = SimulationParams(
            timesteps=self._steps(),
            network_size=max(2, size),
            batches_per_mc_run=max(1, _SAMPLE // max(2, size)),
            mc_seed=_SEED,
            dtype=Precision.float64,
        )
        simulation = Simulation(self.problem, params, self._device, conditional=True)
        count = max(2, paths // params.paths)
        found = np.empty((len(contracts), count, max(2, size)))
        for row, contract in enumerate(contracts):
            many = np.tile(contract, (count, 1))
            if not simulation.conditional:
                found[row] = simulation.levels(many, offset=row * count).cpu().numpy()
                continue
            table = torch.from_numpy(many).to(simulation.device)
            (sample,) = simulation.simulate_priced([table], torch.tensor(row * count, device=simulation.device))
            if size == 1:
                found[row] = sample.prices[:, None].cpu().numpy()
            else:
                found[row] = quantile_levels(sample.payoffs, size).cpu().numpy()
        return found if size > 1 else found.mean(axis=2, keepdims=True)


@lru_cache(maxsize=16)
def reference_of(problem: Problem, device: str = "cpu") -> Reference:
    """A problem's reference."""
    return Reference(problem, device)
