"""Cash-or-nothing options: one unit of currency if the price at expiry is beyond a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import Tensor

from smc.problem.anchors import smooth_digital
from smc.problem.conditional import LEAST_VARIANCE, PricedOnLogNormal
from smc.problem.law import Law
from smc.problem.normal import upper_tail
from smc.problem.product import Bounds
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["DigitalPut"]


class DigitalPut(PricedOnLogNormal):
    """Pays 1 if S_T < K."""

    kind: ClassVar[str] = "digital_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "put"
    notional: ClassVar[str] = "payment"

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] if spot < k[0] else 0.0

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The probability that it pays, discounted."""
        return k[1] * upper_tail((mean - math.log(k[0])) / math.sqrt(max(variance, LEAST_VARIANCE)))

    def unit(self, law: Law) -> Tensor:
        """What is paid, discounted."""
        return law.discount

    def anchor(self, law: Law) -> Tensor:
        """A rounded step. That of a log-normal price would be the answer itself under geometric Brownian motion."""
        return smooth_digital(law.deviation / 2 - self.distances(law)[0] / law.deviation)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike."""
        return ((law.spot / law.c.K).log() + law.growth,)

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and what is paid."""
        return Bounds(0 * law.discount, law.discount, law.discount)

    def notionals(self, law: Law) -> Tensor:
        """One unit of currency."""
        return 0 * law.spot + 1
