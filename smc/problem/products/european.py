"""European options: what the price at expiry is below, or above, a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import smooth_intrinsic
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.reflection import Reflection
from smc.problem.schema import Field

__all__ = ["STRIKE", "EuropeanCall", "EuropeanPut"]

STRIKE = Field("K", "strike", "in currency", 50.0, 150.0, least=0.0, strict=True)


class EuropeanPut(Product):
    """Pays max(K - S_T, 0)."""

    kind: ClassVar[str] = "european_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "put"
    reflection: ClassVar[Reflection | None] = Reflection()

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - spot, 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation."""
        return law.c.K * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The intrinsic value, its kink rounded."""
        return smooth_intrinsic(torch.expm1(self.distances(law)[0]), law.deviation)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike."""
        return (torch.log(law.spot / law.c.K) + law.growth,)

    def bounds(self, law: Law) -> Bounds:
        """The value of exercise at expiry, and the discounted strike."""
        most = law.c.K * law.discount
        lower = (-self._forward_value(law)).clamp(min=0) if law.known else 0 * most
        return Bounds(lower, most, most)

    def parity(self, law: Law) -> Tensor | None:
        """A call is worth more by the value of the forward."""
        return self._forward_value(law) if law.known else None

    def _forward_value(self, law: Law) -> Tensor:
        return (law.forward - law.c.K) * law.discount


class EuropeanCall(EuropeanPut):
    """Pays max(S_T - K, 0)."""

    kind: ClassVar[str] = "european_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
    reflection: ClassVar[Reflection | None] = None

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(spot - k[0], 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted forward, by the deviation."""
        return law.forward * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The intrinsic value, its kink rounded."""
        return smooth_intrinsic(torch.expm1(-self.distances(law)[0]), law.deviation)

    def bounds(self, law: Law) -> Bounds:
        """The value of exercise at expiry, and the discounted forward; a payoff has no bound."""
        if not law.known:
            return Product.bounds(self, law)
        most = law.forward * law.discount
        return Bounds(self._forward_value(law).clamp(min=0), most, torch.full_like(most, math.inf))

    def parity(self, law: Law) -> Tensor | None:
        """A put is worth less by the value of the forward."""
        return -self._forward_value(law) if law.known else None
