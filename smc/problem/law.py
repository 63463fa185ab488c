"""What is known of a problem's prices before anything is simulated: forwards, and how far prices spread around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smc.problem.process import Process

__all__ = ["Law"]

# The volatility that sets a scale where a process does not say its own: nothing but a unit depends on it.
_GUESS = 0.3


@dataclass(frozen=True)
class Law:
    """The law of the prices of n contracts, as far as their process tells it.

    `c` has the contracts' columns by name, tensors of shape (n,). Where `known` is false the process does not tell its
    law: forwards are spots and deviations a guess, good enough for the scale of what is learnt and for nothing else.
    """

    process: Process
    c: Any

    @property
    def known(self) -> bool:
        """Whether the process tells its forwards and deviations."""
        if self.process.assets > 1:
            return self.process.growths(self.c, self.c.T) is not None
        return (
            self.process.growth(self.c, self.c.T) is not None and self.process.deviation(self.c, self.c.T) is not None
        )

    @property
    def spot(self) -> Tensor:
        """Prices today; of several assets their mean. Shapes: -> (n,)."""
        spot: Tensor = getattr(self.c, self.process.fields[0].name)
        return spot if self.process.assets == 1 else self.spots.mean(dim=1)

    @property
    def spots(self) -> Tensor:
        """Prices today of each asset. Shapes: -> (n, assets)."""
        fields = self.process.fields[: self.process.assets]
        return torch.stack([getattr(self.c, field.name) for field in fields], dim=1)

    @property
    def forwards(self) -> Tensor:
        """Expected prices at expiry of each asset. Shapes: -> (n, assets)."""
        return self.spots * self._growths(self.c.T).exp()

    @property
    def covariances(self) -> Tensor:
        """Covariances of the logarithms of the prices at expiry. Shapes: -> (n, assets, assets)."""
        return self.covariances_at(self.c.T)

    @property
    def growth(self) -> Tensor:
        """Logarithm of the expected price at expiry over the spot. Shapes: -> (n,)."""
        return self._growth(self.c, self.c.T)

    @property
    def forward(self) -> Tensor:
        """Expected prices at expiry; of several assets their mean. Shapes: -> (n,)."""
        return self.spot * self.growth.exp()

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the logarithm of the price at expiry. Shapes: -> (n,)."""
        return self._deviation(self.c, self.c.T)

    @property
    def log_median(self) -> Tensor:
        """Logarithm of the median price at expiry, where logarithms of prices are normal. Shapes: -> (n,)."""
        return self.spot.log() + self.growth - self.deviation.square() / 2

    @property
    def discount(self) -> Tensor:
        """What one unit of currency at expiry is worth today. Shapes: -> (n,)."""
        discount: Tensor = self.process.discount(self.c, self.c.T)
        return discount

    def on_dates(self, dates: int) -> tuple[Tensor, Tensor]:
        """Expected prices, and variances of their logarithms, on equally spaced dates. Shapes: -> two of (n, dates)."""
        by_row = type(self.c)(*(column[:, None] for column in self.c))
        share = by_row.T.new_tensor(range(1, dates + 1)) / dates
        times = by_row.T * share
        return self.spot[:, None] * self._growth(by_row, times).exp(), self._deviation(by_row, times).square()

    def covariances_at(self, t: Tensor) -> Tensor:
        """Covariances of the logarithms of the prices after t years. Shapes: (n,) -> (n, assets, assets)."""
        known = self.process.covariances(self.c, t)
        if known is not None:
            covariances: Tensor = known
            return covariances
        return torch.diag_embed(self._deviation(self.c, t).square()[:, None].expand(-1, self.process.assets))

    def paths(self, dates: int) -> Tensor:
        """Expected prices of each asset on equally spaced dates. Shapes: -> (n, dates, assets)."""
        times = [self.c.T * (date / dates) for date in range(1, dates + 1)]
        return torch.stack([self.spots * self._growths(t).exp() for t in times], dim=1)

    def _growths(self, t: Tensor) -> Tensor:
        growths = self.process.growths(self.c, t)
        if growths is None:
            return self._growth(self.c, t)[:, None].expand(-1, self.process.assets)
        known: Tensor = growths
        return known

    def _growth(self, c: Any, t: Tensor) -> Tensor:
        growth = self.process.growth(c, t)
        return 0 * t if growth is None else growth

    def _deviation(self, c: Any, t: Tensor) -> Tensor:
        deviation = self.process.deviation(c, t)
        return _GUESS * t.sqrt() if deviation is None else deviation
