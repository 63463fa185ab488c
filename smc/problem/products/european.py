"""European options: what the price at expiry is below, or above, a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import smooth_intrinsic
from smc.problem.conditional import LEAST_VARIANCE, PricedOnLogNormal
from smc.problem.law import Law
from smc.problem.normal import lower_tail, upper_tail
from smc.problem.products.struck import STRIKE, StruckOption
from smc.problem.reflection import Reflection

__all__ = ["STRIKE", "EuropeanCall", "EuropeanPut"]


class EuropeanPut(StruckOption, PricedOnLogNormal):
    """Pays max(K - S_T, 0)."""

    kind: ClassVar[str] = "european_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
    reflection: ClassVar[Reflection | None] = Reflection()

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - spot, 0.0)

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """Black's formula."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        d = (mean - math.log(k[0])) / deviation
        forward = math.exp(mean + 0.5 * deviation * deviation)
        return k[1] * max(k[0] * upper_tail(d) - forward * upper_tail(d + deviation), 0.0)

    def shortfall(self, law: Law) -> Tensor | None:
        """The strike."""
        return law.c.K

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation."""
        return law.c.K * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The intrinsic value, its kink rounded."""
        return smooth_intrinsic(torch.expm1(self.distances(law)[0]), law.deviation)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike."""
        return (torch.log(law.spot / law.c.K) + law.growth,)

    def expected(self, law: Law) -> Tensor:
        """The forward."""
        return law.forward


class EuropeanCall(EuropeanPut):
    """Pays max(S_T - K, 0)."""

    kind: ClassVar[str] = "european_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
    reflection: ClassVar[Reflection | None] = None

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(spot - k[0], 0.0)

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """Black's formula."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        d = (mean - math.log(k[0])) / deviation
        forward = math.exp(mean + 0.5 * deviation * deviation)
        return k[1] * max(forward * lower_tail(d + deviation) - k[0] * lower_tail(d), 0.0)

    def shortfall(self, law: Law) -> Tensor | None:
        """A call pays what is above."""
        return None

    def unit(self, law: Law) -> Tensor:
        """The discounted forward, by the deviation."""
        return law.forward * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The intrinsic value, its kink rounded."""
        return smooth_intrinsic(torch.expm1(-self.distances(law)[0]), law.deviation)
