"""Barrier options, looked at on equally spaced dates, the last of which is expiry.

The barrier is a ratio to the spot, so that a domain of contracts stays a box.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import barrier_call
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["DownAndOutCall", "UpAndOutCall"]

_UP = Field("H", "barrier", "a ratio to the spot, above 1", 1.1, 1.6, least=1.0, strict=True)
_DOWN = Field("H", "barrier", "a ratio to the spot, below 1", 0.6, 0.95, least=0.0, strict=True)
# Of the spot: the least room below a barrier that a scale is made of.
_LEAST_ROOM = 0.02


class UpAndOutCall(Product):
    """Pays max(S_T - K, 0), unless the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_out_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _UP)
    inputs: ClassVar[tuple[str, ...] | None] = ("H",)
    still: ClassVar[tuple[str, ...]] = ("K",)
    ratios: ClassVar[tuple[str, ...]] = ("H",)
    option: ClassVar[Literal["put", "call"] | None] = "call"
    up: ClassVar[bool] = True

    dates: WholeNumber = Setting(default=16, ge=1)

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and the barrier's price."""
        return c.K, math.exp(-c.r * c.T), c.H * c.X0

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """Alive."""
        return (1.0,)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 while alive, then 0."""
        return (seen[0] if spot < k[2] else 0.0,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * seen[0] * max(spot - k[0], 0.0)

    def unit(self, law: Law) -> Tensor:
        """About how far payoffs spread: by the deviation, or the room below the barrier, whichever is less."""
        room = torch.maximum(law.c.H * law.spot - law.c.K, _LEAST_ROOM * law.spot)
        return law.discount / (1 / (law.forward * law.deviation) + 1 / room)

    def anchor(self, law: Law) -> Tensor:
        """The price with a barrier that is always looked at, a little further out."""
        return self._guess(law) * law.discount / self.unit(law)

    def _guess(self, law: Law) -> Tensor:
        return barrier_call(law.spot, law.c.K, law.c.H, law.growth, law.deviation, self.dates, up=self.up)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike and of the barrier."""
        return torch.log(law.spot / law.c.K) + law.growth, law.growth - torch.log(law.c.H)

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How far the barrier is from the spot and from the strike, and the guess of the price."""
        w, away = law.deviation, torch.log(law.c.H)
        beyond = away + torch.log(law.spot / law.c.K)
        return torch.log(away.abs() / w), torch.tanh(beyond / (2 * w)), torch.log1p(self.anchor(law))

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and what the highest price below the barrier pays, or the forward."""
        most = (law.c.H * law.spot - law.c.K).clamp(min=0) * law.discount
        return Bounds(0 * most, torch.minimum(most, law.forward * law.discount) if law.known else most, most)


class DownAndOutCall(UpAndOutCall):
    """Pays max(S_T - K, 0), unless the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_out_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _DOWN)
    up: ClassVar[bool] = False

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 while alive, then 0."""
        return (seen[0] if spot > k[2] else 0.0,)

    def unit(self, law: Law) -> Tensor:
        """The discounted forward, by the deviation."""
        return law.forward * law.discount * law.deviation

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and the discounted forward; a payoff has no bound."""
        if not law.known:
            return Product.bounds(self, law)
        most = law.forward * law.discount
        return Bounds(0 * most, most, torch.full_like(most, math.inf))
