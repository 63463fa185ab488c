"""Payoff samples <-> the quantile spectrum, and the distribution read back from it.

All M payoffs of a contract are sorted, consecutive runs of B = M / N are averaged (the quantile
function averaged over N equal slices of probability: its *levels*), and one real FFT of the levels,
divided by N, is the spectrum: N // 2 + 1 complex bins, bin 0 exactly the Monte Carlo price. By Parseval,
the bins' squared error (inner bins counted twice) is the squared Wasserstein-2 distance of the levels.

Source: Wasserstein distance as the L2 distance of quantile functions, Villani, "Topics in Optimal
Transportation" (2003), section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from smc.errors import ConfigError
from smc.spectrum_cuda import MOST_PATHS, put_levels

__all__ = [
    "PayoffDistribution",
    "bin_weights",
    "levels_from_spectrum",
    "put_spectrum",
    "quantile_levels",
    "quantile_spectrum",
    "valid_levels",
]

Array = npt.NDArray[np.float64]

# Of the interval of shifts that may be needed: what is left is a 2^-32 of the payoff's range.
_HALVINGS = 32


def quantile_levels(payoffs: torch.Tensor, network_size: int) -> torch.Tensor:
    """Sort and average: the quantile function over `network_size` equal slices.

    Shapes: (n, M), M a multiple of N -> (n, N), ascending.
    """
    n, samples = payoffs.shape
    _check_slices(samples, network_size)
    if payoffs.device.type == "cpu":  # NumPy's vectorised sort is five times torch's on one core
        ordered = torch.from_numpy(np.sort(payoffs.numpy(), axis=1))
    else:
        ordered = payoffs.sort(dim=1).values
    return ordered.view(n, network_size, -1).mean(dim=2)


def quantile_spectrum(payoffs: torch.Tensor, network_size: int) -> torch.Tensor:
    """The training target. Shapes: (n, M) -> complex (n, N // 2 + 1); bin 0 is the sample mean."""
    levels = quantile_levels(payoffs, network_size)
    if len(levels) == 1:
        # With several threads torch rounds a single row otherwise than the same row among others, and a target
        # must not depend on the batch it was simulated in.
        return torch.fft.rfft(levels.repeat(2, 1), norm="forward")[:1]
    return torch.fft.rfft(levels, norm="forward")


def put_spectrum(terminal: torch.Tensor, strike: torch.Tensor, scale: torch.Tensor, network_size: int) -> torch.Tensor:
    """Spectrum of the payoff scale x max(strike - terminal, 0). `terminal` may be overwritten.

    Shapes: terminal (n, M), none negative; strike and scale (n,) -> complex (n, N // 2 + 1).
    """
    _check_slices(terminal.shape[1], network_size)
    if terminal.device.type == "cuda" and terminal.shape[1] <= MOST_PATHS:
        levels = put_levels(terminal, strike, scale, network_size)
        return torch.fft.rfft(levels, norm="forward")
    return quantile_spectrum((strike[:, None] - terminal).clamp_(min=0).mul_(scale[:, None]), network_size)


def levels_from_spectrum(spectrum: torch.Tensor, network_size: int) -> torch.Tensor:
    """Inverse of the transform. Shapes: complex (n, N // 2 + 1) -> (n, N)."""
    return torch.fft.irfft(spectrum, n=network_size, norm="forward")


def bin_weights(network_size: int) -> torch.Tensor:
    """How often each bin of the half spectrum counts in the full one. Shapes: -> (N // 2 + 1,)."""
    weights = torch.full((network_size // 2 + 1,), 2.0, dtype=torch.float64)
    weights[0] = 1
    if network_size % 2 == 0:
        weights[-1] = 1
    return weights


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
        _check_probability(levels)
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
        return np.array(rows)

    def var(self, u: float) -> Array:
        """Value at risk of the option's seller: the u quantile of the payoff. Shapes: -> (n,)."""
        return self.quantile(u)[:, 0]

    def cvar(self, u: float) -> Array:
        """Mean payoff over the outcomes above the u quantile. Shapes: -> (n,).

        Exact for levels that are exact slice averages, up to the part of a slice that u cuts off.
        """
        _check_probability(np.array([u]))
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


def _check_slices(samples: int, network_size: int) -> None:
    if samples % network_size:
        raise ConfigError(f"{samples} payoffs cannot be averaged into {network_size} equal slices")


def valid_levels(levels: torch.Tensor, price: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """The levels in order, shifted and held within the payoff's bounds, so that the price is their mean.

    Of all levels in the same order within the bounds and with this mean, these are the nearest in W2: the
    projection onto a box and a sum is one shift, clipped. To scale them instead would move the tail.
    Shapes: (n, N), (n,), (n,) payoff maximum -> (n, N).
    """
    size = levels.shape[1]
    ordered, upper = levels.sort(dim=1).values, upper[:, None]
    wanted = torch.minimum(price.clamp(min=0)[:, None], upper)
    # The mean after a shift rises with it, from 0 at `low` to `upper` at `high`: halve the interval.
    low, high = -ordered[:, -1:], upper - ordered[:, :1]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = torch.minimum((ordered + middle).clamp_(min=0), upper).mean(dim=1, keepdim=True) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    held = torch.minimum((ordered + low).clamp_(min=0), upper)
    # What halving left open goes to the levels that are free to move, in proportion to their room.
    room = upper - held
    missing = (wanted - held.mean(dim=1, keepdim=True)) * size
    total = room.sum(dim=1, keepdim=True)
    return torch.minimum(held + room * torch.where(total > 0, missing / total, 0.0).clamp_(min=0), upper)


def _check_probability(levels: npt.NDArray[Any]) -> None:
    if np.any(~((levels >= 0) & (levels <= 1))):
        raise ConfigError("probability levels must lie in [0, 1]")
