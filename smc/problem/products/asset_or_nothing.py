"""Asset-or-nothing options: the price at expiry itself, if it is beyond a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import smooth_digital
from smc.problem.conditional import LEAST_VARIANCE, PricedOnLogNormal
from smc.problem.law import Law
from smc.problem.log_normal import FAR, price_within
from smc.problem.product import Bounds
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["AssetOrNothingCall", "AssetOrNothingPut"]


class AssetOrNothingCall(PricedOnLogNormal):
    """Pays S_T if S_T > K."""

    kind: ClassVar[str] = "asset_or_nothing_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "call"

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, its logarithm, and the discount factor."""
        return c.K, math.log(c.K), math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[2] * spot if self.sign * (spot - k[0]) > 0.0 else 0.0

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The expected price where it is paid."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        low, high = (k[1], FAR) if self.sign > 0.0 else (-FAR, k[1])
        return k[2] * price_within(mean, deviation, low, high)

    def unit(self, law: Law) -> Tensor:
        """The discounted forward."""
        return law.forward * law.discount

    def anchor(self, law: Law) -> Tensor:
        """A rounded step."""
        return smooth_digital(self.sign * (self.distances(law)[0] / law.deviation + law.deviation / 2))

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike."""
        return (torch.log(law.spot / law.c.K) + law.growth,)

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and the forward or the strike."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        payoff = endless if self.option == "call" else law.c.K * law.discount
        most = torch.minimum(payoff, law.forward * law.discount) if law.known else payoff
        return Bounds(nothing, most, payoff)


class AssetOrNothingPut(AssetOrNothingCall):
    """Pays S_T if S_T < K."""

    kind: ClassVar[str] = "asset_or_nothing_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
