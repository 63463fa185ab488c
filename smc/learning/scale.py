"""What the network sees and says: features of a contract, and spectra on a scale of order one.

A put divided by K df w, after a smooth intrinsic value is taken off bin 0, varies over the domain by a
factor of a few instead of a thousand; each bin is then standardised. Raw inputs and outputs cost three
orders of magnitude in accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from smc.problem.contracts import BoundSpec, columns

__all__ = ["Scaling", "features", "intrinsic", "spread_of", "unit_of_price"]

# Of the Bachelier at-the-money shape: softplus(1.7 x) / 1.7 follows E max(x + Z, 0) within 0.02.
_SHARPNESS = 1.7
# Widths, in standard deviations of the price's logarithm, over which moneyness is resolved.
_WIDTHS = (1.5, 3.0, 6.0)
# Total volatility below which prices hardly depend on it, but for their scale: ln w alone would spread these
# contracts, a few in a hundred, over a third of the feature's range, and gamma suffers.
_LEAST_VOLATILITY = 0.4


@dataclass(frozen=True)
class Scaling:
    """Per-bin mean and standard deviation of scaled spectra, measured on the first training contracts.

    Shapes: mean (bins, 2), its real and imaginary parts; spread (bins,). Part of every checkpoint: a model
    means nothing without it.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Scaling:
        """Measured on scaled spectra. Shapes: (n, bins, 2)."""
        spread = targets.var(dim=0).sum(dim=1).sqrt()
        # A bin that does not vary (the imaginary part of bin 0 never does) is still divided by something.
        floor = spread.max() * 1e-6 + torch.finfo(spread.dtype).tiny
        return cls(targets.mean(dim=0), spread.clamp(min=float(floor)))

    def to(self, device: torch.device) -> Scaling:
        """The same on another device."""
        return Scaling(self.mean.to(device), self.spread.to(device))

    def restore(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        """Network outputs to scaled spectra. Shapes: two of (n, bins) -> same."""
        return real * self.spread + self.mean[:, 0], imag * self.spread + self.mean[:, 1]


def features(contracts: Tensor, domain: Mapping[str, BoundSpec]) -> Tensor:
    """m = ln(F / K), w = v sqrt(T), ln(w + 0.4), tanh of m / w on three scales; T, r, d standardised over the domain.

    Shapes: (n, 6) -> (n, 9).
    """
    m, w = _moneyness(contracts)
    resolved = [torch.tanh(m / (width * w)) for width in _WIDTHS]
    c = columns(contracts)
    standard = [_standardised(getattr(c, name), domain[name]) for name in _STANDARDISED]
    return torch.stack([m, w, torch.log(w + _LEAST_VOLATILITY), *resolved, *standard], dim=1)


def spread_of(bound: BoundSpec) -> float:
    """Standard deviation of a parameter that is uniform over its bounds."""
    return (bound.upper - bound.lower) / float(np.sqrt(12.0))


def unit_of_price(contracts: Tensor) -> Tensor:
    """K df w, the scale of a put. Shapes: (n, 6) -> (n,). Units: currency."""
    _, w = _moneyness(contracts)
    c = columns(contracts)
    return c.K * torch.exp(-c.r * c.T) * w


def intrinsic(contracts: Tensor) -> Tensor:
    """Smooth intrinsic value of the put in units of `unit_of_price`. Shapes: (n, 6) -> (n,)."""
    m, w = _moneyness(contracts)
    return functional.softplus(-_SHARPNESS * torch.expm1(m) / w) / _SHARPNESS


_STANDARDISED = ("T", "r", "d")


def _moneyness(contracts: Tensor) -> tuple[Tensor, Tensor]:
    c = columns(contracts)
    return torch.log(c.X0 / c.K) + (c.r - c.d) * c.T, c.v * torch.sqrt(c.T)


def _standardised(values: Tensor, bound: BoundSpec) -> Tensor:
    return (values - (bound.lower + bound.upper) / 2) / spread_of(bound)
