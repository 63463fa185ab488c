"""Double barrier options: they die when the price leaves the corridor between two barriers.

Both barriers are ratios to the spot. They are looked at on equally spaced dates, the last of which is expiry, or all
the time.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import double_barrier_option
from smc.problem.conditional import LEAST_VARIANCE, ExpectedOnPath, PricedOnBridge
from smc.problem.law import Law
from smc.problem.log_normal import FAR, option_within
from smc.problem.product import Bounds
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["DoubleKnockOutCall", "DoubleKnockOutPut"]

_HIGH = Field("H", "upper barrier", "a ratio to the spot, above 1", 1.15, 1.6, least=1.0, strict=True)
_LOW = Field("L", "lower barrier", "a ratio to the spot, above 0 and below 1", 0.5, 0.85, least=0.0, strict=True,
             most=1.0, below=True)  # fmt: skip
# Of the spot: the least room between strike and barrier that a scale is made of.
_LEAST_ROOM = 0.02
# Before the first date nothing bounds the end of a bridge.
_UNBOUND = 1e30


class DoubleKnockOutCall(PricedOnBridge, ExpectedOnPath):
    """Pays max(S_T - K, 0), unless the price is at or above H X0, or at or below L X0, on one of `dates` dates.

    With `monitoring` 'continuous' a Brownian bridge between two steps passes the one or the other; that it passes both
    is left out, which is as rare as steps are short.
    """

    kind: ClassVar[str] = "double_knock_out_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _LOW, _HIGH)
    inputs: ClassVar[tuple[str, ...] | None] = ("L", "H")
    still: ClassVar[tuple[str, ...]] = ("K",)
    ratios: ClassVar[tuple[str, ...]] = ("L", "H")
    option: ClassVar[Literal["put", "call"] | None] = "call"
    draws: ClassVar[int] = 2

    dates: WholeNumber = Setting(default=16, ge=1)
    monitoring: Literal["dates", "continuous"] = "dates"

    @property
    def continuous(self) -> bool:
        """Whether barriers are looked at all the time."""
        return self.monitoring == "continuous"

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """Strike, discount factor, the logarithms of both barriers, and how far they are."""
        low, high = math.log(c.L), math.log(c.H)
        spot = math.log(c.X0)
        return c.K, math.exp(-c.r * c.T), spot + low, spot + high, -low, high

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """1 while alive. All the time also the chance of that, and how far the barriers are."""
        return (1.0, 1.0, k[4], k[5]) if self.continuous else (1.0,)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 while alive, then 0."""
        at = math.log(spot)
        alive = seen[0] if k[2] < at < k[3] else 0.0
        return (alive, seen[1], seen[2], seen[3]) if self.continuous else (alive,)

    def between(
        self, seen: tuple[float, ...], spot: float, variation: float, normals: tuple[float, ...], share: float,
        k: tuple[float, ...],
    ) -> tuple[float, ...]:  # fmt: skip
        """As of one barrier, by the sum of the chances that either is passed."""
        at, per_variation = math.log(spot), 2.0 / max(variation, LEAST_VARIANCE)
        below, above = at - k[2], k[3] - at
        passed = math.exp(-max(seen[2], 0.0) * max(below, 0.0) * per_variation)
        passed = min(passed + math.exp(-max(seen[3], 0.0) * max(above, 0.0) * per_variation), 1.0)
        chance = math.exp(-0.5 * (normals[0] * normals[0] + normals[1] * normals[1]))
        return 0.0 if chance <= passed else seen[0], seen[1] * (1.0 - passed), below, above

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * seen[0] * max(self.sign * (spot - k[0]), 0.0)

    def expected_payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """By the chance of being alive."""
        return k[1] * seen[1] * max(self.sign * (spot - k[0]), 0.0)

    def begin_bridge(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """No bounds, below and above."""
        return -_UNBOUND, _UNBOUND

    def observe_bridge(
        self, kept: tuple[float, ...], log_price: float, variance: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """How far a bridge may be lowered and lifted, for each unit of variance."""
        return max(kept[0], (k[2] - log_price) / variance), min(kept[1], (k[3] - log_price) / variance)

    def on_bridge(
        self, kept: tuple[float, ...], log_price: float, own: float, variance: float, k: tuple[float, ...]
    ) -> float:
        """On a price that is log-normal and within both bounds."""
        low = log_price + max(variance * kept[0], -FAR)
        high = log_price + min(variance * kept[1], FAR)
        return k[1] * option_within(log_price - own, math.sqrt(variance), k[0], low, max(low, high), self.sign)

    # --- what is known of prices ---------------------------------------------------------------------

    def unit(self, law: Law) -> Tensor:
        """About how far payoffs spread: by the deviation, or the room up to the barrier, whichever is less."""
        whole = (law.forward if self.option == "call" else law.c.K) * law.deviation
        barrier = (law.c.H if self.option == "call" else law.c.L) * law.spot
        room = torch.maximum(self.sign * (barrier - law.c.K), _LEAST_ROOM * law.spot)
        return law.discount / (1 / whole + 1 / room)

    def anchor(self, law: Law) -> Tensor:
        """The price with barriers that are always looked at, a little further out where they are not."""
        dates = None if self.continuous else self.dates
        where = law.c.L, law.c.H, law.growth, law.deviation, dates
        return double_barrier_option(law.spot, law.c.K, *where, sign=self.sign) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike and of the barriers."""
        barriers = (law.growth - torch.log(law.c.L), law.growth - torch.log(law.c.H))
        return torch.log(law.spot / law.c.K) + law.growth, *barriers

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How wide the corridor is, and the guess of the price."""
        w = law.deviation
        nearest = (1 / torch.log(law.c.H) - 1 / torch.log(law.c.L)).log()
        return torch.log(torch.log(law.c.H / law.c.L) / w), -nearest - w.log(), torch.log1p(self.anchor(law))

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and what the price at the barrier pays, or the strike or the forward."""
        barrier = (law.c.H if self.option == "call" else law.c.L) * law.spot
        payoff = (self.sign * (barrier - law.c.K)).clamp(min=0) * law.discount
        most = law.forward * law.discount if self.option == "call" and law.known else payoff
        return Bounds(0 * payoff, torch.minimum(payoff, most), payoff)


class DoubleKnockOutPut(DoubleKnockOutCall):
    """Pays max(K - S_T, 0), unless the price is at or above H X0, or at or below L X0, on one of `dates` dates."""

    kind: ClassVar[str] = "double_knock_out_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
