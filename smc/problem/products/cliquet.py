"""Cliquets: the sum of the returns between dates, each within bounds, and all together not below another.

Nothing of the price today is in the payoff: a cliquet that has just been set depends on its volatility alone.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.anchors import bachelier, clipped_return
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.schema import Field

__all__ = ["Cliquet"]

# A price that is divided by is at least this: what was absorbed at 0 has a return of -1, and so the floor.
_LEAST = 1e-30

_FIELDS = (
    Field("cap", "most that a return counts", "a share, so that 3 % is 0.03", 0.02, 0.12, least=0.0, strict=True),
    Field("floor", "least that a return counts", "a share, 0 or below", -0.1, 0.0, least=-1.0, most=0.0),
    Field("least", "least that is paid", "a share, 0 or above", 0.0, 0.1, least=0.0),
)


class Cliquet(Product):
    """Pays nominal x max(least, sum of min(max(S_i / S_(i-1) - 1, floor), cap)) at expiry, over `dates` dates."""

    kind: ClassVar[str] = "cliquet"
    fields: ClassVar[tuple[Field, ...]] = _FIELDS
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ("cap", "floor", "least")
    notional: ClassVar[str] = "nominal"

    dates: WholeNumber = Setting(default=8, ge=1)
    nominal: RealNumber = Setting(default=100.0, gt=0)

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """What is paid for a return of 1, discounted; the bounds; and the spot."""
        return self.nominal * math.exp(-c.r * c.T), c.cap, c.floor, c.least, c.X0

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """The sum of returns, and the last price."""
        return 0.0, k[4]

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """One return more."""
        return seen[0] + min(max(spot / max(seen[1], _LEAST) - 1.0, k[2]), k[1]), spot

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[0] * max(seen[0], k[3])

    def unit(self, law: Law) -> Tensor:
        """By the deviation of the sum."""
        return self.nominal * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the sum were normal with its first two moments."""
        mean, deviation = self._sum(law)
        return (law.c.least + bachelier(mean - law.c.least, deviation)) * self.nominal * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the least that is paid, from the expected sum."""
        return (self._sum(law)[0] - law.c.least,)

    def width(self, law: Law) -> Tensor:
        """The deviation of the sum."""
        return self._sum(law)[1]

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How far the bounds of a return are, in its deviations; how much of what is between them the sum has."""
        step = law.deviation / self.dates**0.5
        mean, _ = self._sum(law)
        share = (mean / self.dates - law.c.floor) / (law.c.cap - law.c.floor)
        return (law.c.cap / step).log(), -law.c.floor / (step - law.c.floor), share, step.log()

    def bounds(self, law: Law) -> Bounds:
        """The least that is paid, and what all the most returns together pay."""
        discounted = self.nominal * law.discount
        least, most = law.c.least * discounted, (self.dates * law.c.cap) * discounted
        most = most.clamp(min=0).maximum(least)
        return Bounds(least, most, most)

    def notionals(self, law: Law) -> Tensor:
        """The nominal."""
        return 0 * law.spot + self.nominal

    def _sum(self, law: Law) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the sum of the returns, as if they were independent."""
        forwards, variances = law.on_dates(self.dates)
        before = torch.cat([law.spot[:, None], forwards[:, :-1]], dim=1)
        earlier = torch.cat([0 * variances[:, :1], variances[:, :-1]], dim=1)
        deviation = (variances - earlier).clamp(min=1e-12).sqrt()
        mean, variance = clipped_return(forwards / before, deviation, law.c.floor[:, None], law.c.cap[:, None])
        return mean.sum(dim=1), variance.sum(dim=1).sqrt()
