"""Options on a geometric average: the exponential of the mean of the logarithms of prices."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import geometric_average
from smc.problem.law import Law
from smc.problem.product import Bounds
from smc.problem.products.asian import LEAST_PRICE, FixedStrikeAverage

__all__ = ["GeometricAsianCall", "GeometricAsianPut"]


class GeometricAsianPut(FixedStrikeAverage):
    """Pays max(K - G, 0), G being the geometric mean of the prices."""

    kind: ClassVar[str] = "geometric_asian_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and today's part of the mean logarithm."""
        return c.K, math.exp(-c.r * c.T), self.first * math.log(c.X0) if self.with_today else 0.0

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the logarithms so far."""
        return (seen[0] + math.log(max(spot, LEAST_PRICE)),)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        average = math.exp(self.each * seen[0] + k[2] - self.excess * math.log(max(spot, LEAST_PRICE)))
        return k[1] * max(self.sign * (average - k[0]), 0.0)

    def matched(self, law: Law) -> tuple[Tensor, Tensor]:
        """That of log-normal prices."""
        return geometric_average(*self.on_dates(law))

    def bounds(self, law: Law) -> Bounds:
        """As of any average; where the expected one is not known, it is at most that of the prices."""
        if law.process.log_normal or not law.known:
            return super().bounds(law)
        nothing, strike = 0 * law.spot, law.c.K * law.discount
        if self.option == "put":
            return Bounds(nothing, strike, strike)
        forwards, _, weights = self.on_dates(law)
        return Bounds(nothing, forwards @ weights * law.discount, torch.full_like(nothing, math.inf))

    def parity(self, law: Law) -> Tensor | None:
        """Only of log-normal prices the expected average is known."""
        return super().parity(law) if law.process.log_normal else None


class GeometricAsianCall(GeometricAsianPut):
    """Pays max(G - K, 0)."""

    kind: ClassVar[str] = "geometric_asian_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
