"""Straddles: how far the price at expiry is from a strike, on either side."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from smc.problem.anchors import smooth_intrinsic
from smc.problem.conditional import LEAST_VARIANCE, PricedOnLogNormal
from smc.problem.law import Law
from smc.problem.log_normal import FAR, option_within
from smc.problem.product import Bounds
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["Straddle"]


class Straddle(PricedOnLogNormal):
    """Pays |S_T - K|."""

    kind: ClassVar[str] = "straddle"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * abs(spot - k[0])

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """Black's formula, twice."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        call = option_within(mean, deviation, k[0], -FAR, FAR, 1.0)
        return k[1] * (call + option_within(mean, deviation, k[0], -FAR, FAR, -1.0))

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation."""
        return law.c.K * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The intrinsic values of both options, their kinks rounded."""
        away, w = torch.expm1(self.distances(law)[0]), law.deviation
        return smooth_intrinsic(away, w) + smooth_intrinsic(-away, w)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike."""
        return (torch.log(law.spot / law.c.K) + law.growth,)

    def bounds(self, law: Law) -> Bounds:
        """What the forward pays, and forward and strike together; a payoff has no bound."""
        if not law.known:
            return super().bounds(law)
        lower, upper = (law.forward - law.c.K).abs(), law.forward + law.c.K
        return Bounds(lower * law.discount, upper * law.discount, torch.full_like(lower, math.inf))
