"""The distribution of a discounted payoff, read from its quantile levels: moments, quantiles, tails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from smc.problem.oracles.black_scholes import check_probability
from smc.simulation.levels import valid_levels

__all__ = ["PayoffDistribution"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PayoffDistribution:
    """Distribution of the discounted payoff of n contracts, as quantile levels.

    Valid by construction: `from_levels` sorts the levels, holds them within the payoff's bounds and
    keeps the mean at the price. Between the levels the quantile function is taken as linear.
    Shapes: levels (n, N) ascending, an array or a tensor on any device; what is computed from them is NumPy's.
    Units: currency, discounted.
    """

    levels: Array | torch.Tensor

    @classmethod
    def from_levels(cls, levels: Array, price: Array, upper: Array) -> PayoffDistribution:
        """Nearest valid distribution with this mean. Shapes: (n, N), (n,), (n,) payoff maximum."""
        return cls(valid_levels(*(torch.from_numpy(values) for values in (levels, price, upper))).numpy())

    @cached_property
    def host_levels(self) -> Array:
        """The levels as a NumPy array, wherever they are."""
        return self.levels if isinstance(self.levels, np.ndarray) else self.levels.cpu().numpy()

    @property
    def mean(self) -> Array:
        """Expected discounted payoff, the price. Shapes: -> (n,)."""
        return self.host_levels.mean(axis=1)

    @property
    def std(self) -> Array:
        """Standard deviation of the discounted payoff. Shapes: -> (n,)."""
        return np.asarray(self.host_levels.std(axis=1))

    def quantile(self, u: npt.ArrayLike) -> Array:
        """Quantile function at levels u in [0, 1]. Shapes: (m,) -> (n, m)."""
        levels = np.atleast_1d(np.asarray(u, dtype=np.float64))
        check_probability(levels)
        n = self.host_levels.shape[1]
        position = np.clip(levels * n - 0.5, 0, n - 1)
        below = np.minimum(position.astype(int), max(n - 2, 0))
        share = position - below
        above = np.minimum(below + 1, n - 1)
        return self.host_levels[:, below] * (1 - share) + self.host_levels[:, above] * share

    def cdf(self, x: npt.ArrayLike) -> Array:
        """Probability that the discounted payoff is at most x. Shapes: (m,) -> (n, m)."""
        values = np.atleast_1d(np.asarray(x, dtype=np.float64))
        n = self.host_levels.shape[1]
        middles = (np.arange(n) + 0.5) / n
        rows = []
        for row in self.host_levels:
            # Ties are an atom of the distribution: the right end of a run of equal levels counts.
            unique, last = np.unique(row[::-1], return_index=True)
            at = middles[n - 1 - last]
            inside = np.interp(values, unique, at)
            rows.append(np.where(values < row[0], 0.0, np.where(values >= row[-1], 1.0, inside)))
        return np.array(rows).reshape(-1, len(values))

    def var(self, u: float) -> Array:
        """Value at risk of the option's seller: the u quantile of the payoff. Shapes: -> (n,).

        It is that of the discounted payoff at expiry under the pricing measure, not of the option's value some days
        from now, and the values at risk of several contracts do not add up to that of a book.
        """
        return self.quantile(u)[:, 0]

    def cvar(self, u: float) -> Array:
        """Mean payoff over the outcomes above the u quantile, under the measure of `var`. Shapes: -> (n,).

        Exact for levels that are exact slice averages, up to the part of a slice that u cuts off.
        """
        check_probability(np.array([u]))
        if u == 1.0:
            return self.host_levels[:, -1].copy()
        n = self.host_levels.shape[1]
        whole = int(np.floor(u * n))
        weights = np.zeros(n)
        weights[whole:] = 1.0
        cut = u * n - whole
        weights[whole] = 1.0 - cut
        tail = self.host_levels @ weights
        if cut > 0 and 0 < whole < n - 1:
            # The kept part of the cut slice lies in its upper end: follow the local slope.
            slope = (self.host_levels[:, whole + 1] - self.host_levels[:, whole - 1]) / 2
            tail = tail + slope * cut * (1 - cut) / 2
        return np.asarray(tail / (n * (1 - u)))

    def expectation(self, function: Callable[[Array], Array]) -> Array:
        """Expected value of a function of the discounted payoff. Shapes: (n, N) -> (n, N); -> (n,)."""
        return np.asarray(function(self.host_levels)).mean(axis=1)
