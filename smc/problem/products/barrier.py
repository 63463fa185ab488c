"""Barrier options: they die, or come into being, when the price passes a barrier.

The barrier is a ratio to the spot, so that a domain of contracts stays a box. It is looked at on equally spaced dates,
the last of which is expiry, or all the time. A rebate is paid when an option dies, or at expiry if it never came into
being.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.anchors import barrier_option, barrier_survival
from smc.problem.conditional import LEAST_VARIANCE, ExpectedOnPath, PricedOnBridge
from smc.problem.law import Law
from smc.problem.log_normal import FAR, chance_within, option_within
from smc.problem.product import Bounds
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = [
    "BARRIERS",
    "BarrierOption",
    "DownAndInCall",
    "DownAndInPut",
    "DownAndOutCall",
    "DownAndOutPut",
    "UpAndInCall",
    "UpAndInPut",
    "UpAndOutCall",
    "UpAndOutPut",
]

_UP = Field("H", "barrier", "a ratio to the spot, above 1", 1.1, 1.6, least=1.0, strict=True)
_DOWN = Field("H", "barrier", "a ratio to the spot, below 1", 0.6, 0.95, least=0.0, strict=True, most=1.0, below=True)
# Of the spot: the least room between strike and barrier that a scale is made of.
_LEAST_ROOM = 0.02
# Before the first date nothing bounds the end of a bridge.
_UNBOUND = 1e30


class BarrierOption(PricedOnBridge, ExpectedOnPath):
    """Pays as a put or a call; a subclass says which, on which side the barrier is, and what passing it does.

    `monitoring`: on `dates` dates, or 'continuous'; then between two steps the barrier is passed with the probability
    of a Brownian bridge. `rebate` is in currency.
    """

    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _UP)
    inputs: ClassVar[tuple[str, ...] | None] = ("H",)
    still: ClassVar[tuple[str, ...]] = ("K",)
    ratios: ClassVar[tuple[str, ...]] = ("H",)
    draws: ClassVar[int] = 2
    recent: ClassVar[tuple[str, ...]] = ("monitoring", "rebate")
    up: ClassVar[bool] = True
    out: ClassVar[bool] = True

    dates: WholeNumber = Setting(default=16, ge=1)
    monitoring: Literal["dates", "continuous"] = "dates"
    rebate: RealNumber = Setting(default=0.0, ge=0)

    @property
    def continuous(self) -> bool:
        """Whether it is looked at all the time."""
        return self.monitoring == "continuous"

    @property
    def bridged(self) -> bool:
        """Not where something is paid on the date of the passage, which the bound of a bridge does not tell."""
        return not (self.out and self.rebate)

    @property
    def way(self) -> float:
        """1 of a barrier above the spot, -1 below."""
        return 1.0 if self.up else -1.0

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    # --- what one path pays --------------------------------------------------------------------------

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """Strike, discount factor, the barrier and its logarithm, the discount's, and how far the barrier is."""
        return c.K, math.exp(-c.r * c.T), c.H * c.X0, math.log(c.H * c.X0), -c.r * c.T, self.way * math.log(c.H)

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """1 before the passage. All the time also its chance, how far the barrier is, and the rebates so far."""
        return (1.0, 1.0, k[5], 0.0) if self.continuous else (1.0,)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 before the passage, then minus the rebate that was paid at it, discounted."""
        passed = self.rebated((date - 0.5 if self.continuous else date) / self.dates, k)
        alive = passed if seen[0] > 0.0 and self.way * (spot - k[2]) >= 0.0 else seen[0]
        return (alive, seen[1], seen[2], seen[3]) if self.continuous else (alive,)

    def rebated(self, share: float, k: tuple[float, ...]) -> float:
        """What stands for a passage after this share of the time to expiry."""
        return -self.rebate * math.exp(k[4] * share) if self.out else 0.0

    def between(
        self, seen: tuple[float, ...], spot: float, variation: float, normals: tuple[float, ...], share: float,
        k: tuple[float, ...],
    ) -> tuple[float, ...]:  # fmt: skip
        """As above. A Brownian bridge passes with the probability exp(-exponent), as an exponential number is above.

        Source: Glasserman (2003), section 6.4.
        """
        away = self.way * (k[3] - math.log(spot))
        exponent = max(2.0 * max(seen[2], 0.0) * max(away, 0.0) / max(variation, LEAST_VARIANCE), 0.0)
        passes = 0.5 * (normals[0] * normals[0] + normals[1] * normals[1]) >= exponent
        passed = self.rebated(share, k)
        chance = seen[1] * math.exp(-exponent)
        return (
            passed if seen[0] > 0.0 and passes else seen[0],
            seen[1] - chance,
            away,
            seen[3] - chance * passed,
        )

    def vanilla(self, spot: float, k: tuple[float, ...]) -> float:
        """What the option pays without a barrier, discounted."""
        return k[1] * max(self.sign * (spot - k[0]), 0.0)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        if self.out:
            return self.vanilla(spot, k) if seen[0] > 0.0 else -seen[0]
        return self.rebate * k[1] if seen[0] > 0.0 else self.vanilla(spot, k)

    def expected_payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """By the chance of no passage."""
        if self.out:
            return seen[1] * self.vanilla(spot, k) + seen[3]
        return seen[1] * self.rebate * k[1] + (1.0 - seen[1]) * self.vanilla(spot, k)

    def begin_bridge(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """No bound."""
        return (_UNBOUND,)

    def observe_bridge(
        self, kept: tuple[float, ...], log_price: float, variance: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """How far a bridge may be lifted, for each unit of variance, before the price passes on some date."""
        return (min(kept[0], self.way * (k[3] - log_price) / variance),)

    def on_bridge(
        self, kept: tuple[float, ...], log_price: float, own: float, variance: float, k: tuple[float, ...]
    ) -> float:
        """On a price that is log-normal and, unless the option has died, on this side of a bound."""
        mean, deviation = log_price - own, math.sqrt(variance)
        bound = log_price + self.way * min(variance * kept[0], FAR)
        low, high = -FAR if self.up else bound, bound if self.up else FAR
        alive = option_within(mean, deviation, k[0], low, high, self.sign)
        if self.out:
            return k[1] * alive
        whole = option_within(mean, deviation, k[0], -FAR, FAR, self.sign)
        return k[1] * (max(whole - alive, 0.0) + self.rebate * chance_within(mean, deviation, low, high))

    # --- what is known of prices ---------------------------------------------------------------------

    @property
    def reverse(self) -> bool:
        """Whether it dies where it would pay most."""
        return self.out and self.up == (self.option == "call")

    def unit(self, law: Law) -> Tensor:
        """About how far payoffs spread: by the deviation or, where payoffs end there, the room up to the barrier."""
        whole = (law.forward if self.option == "call" else law.c.K) * law.deviation
        if not self.reverse:
            return law.discount * whole
        room = torch.maximum(self.way * (law.c.H * law.spot - law.c.K), _LEAST_ROOM * law.spot)
        return law.discount / (1 / whole + 1 / room)

    def anchor(self, law: Law) -> Tensor:
        """The price with a barrier that is always looked at, a little further out where it is not."""
        return self._guess(law) * law.discount / self.unit(law)

    def _guess(self, law: Law) -> Tensor:
        dates = None if self.continuous else self.dates
        where = law.c.H, law.growth, law.deviation, dates
        alive = barrier_option(law.spot, law.c.K, *where, up=self.up, sign=self.sign)
        survival = barrier_survival(*where, up=self.up) if self.rebate else 0.0
        if self.out:
            return alive + self.rebate * (1 - survival) if self.rebate else alive
        whole = barrier_option(law.spot, law.c.K, None, law.growth, law.deviation, dates, up=self.up, sign=self.sign)
        return (whole - alive).clamp(min=0) + self.rebate * survival

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike and of the barrier."""
        return torch.log(law.spot / law.c.K) + law.growth, law.growth - torch.log(law.c.H)

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How far the barrier is from the spot and from the strike, and the guess of the price."""
        w, away = law.deviation, torch.log(law.c.H)
        beyond = away + torch.log(law.spot / law.c.K)
        return torch.log(away.abs() / w), torch.tanh(beyond / (2 * w)), torch.log1p(self.anchor(law))

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and what may be paid: the strike, the expected price, or what is left of them by the barrier."""
        room = (self.way * (law.c.H * law.spot - law.c.K)).clamp(min=0)
        endless = torch.full_like(room, math.inf)
        whole = law.c.K if self.option == "put" else law.forward if law.known else endless
        payoff = room if self.reverse else law.c.K + 0 * room if self.option == "put" else endless
        most = torch.minimum(payoff, whole) * law.discount
        rebate = self.rebate * law.discount if not self.out else self.rebate * law.discount.clamp(min=1)
        if self.out:
            return Bounds(0 * most, most + rebate, torch.maximum(payoff * law.discount, rebate))
        return Bounds(0 * most, most + rebate, torch.maximum(payoff * law.discount, rebate))


class UpAndOutCall(BarrierOption):
    """Pays max(S_T - K, 0), unless the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_out_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"


class UpAndOutPut(BarrierOption):
    """Pays max(K - S_T, 0), unless the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_out_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"


class DownAndOutCall(BarrierOption):
    """Pays max(S_T - K, 0), unless the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_out_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _DOWN)
    up: ClassVar[bool] = False


class DownAndOutPut(DownAndOutCall):
    """Pays max(K - S_T, 0), unless the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_out_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"


class UpAndInCall(UpAndOutCall):
    """Pays max(S_T - K, 0) if the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_in_call"
    out: ClassVar[bool] = False


class UpAndInPut(UpAndOutPut):
    """Pays max(K - S_T, 0) if the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_in_put"
    out: ClassVar[bool] = False


class DownAndInCall(DownAndOutCall):
    """Pays max(S_T - K, 0) if the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_in_call"
    out: ClassVar[bool] = False


class DownAndInPut(DownAndOutPut):
    """Pays max(K - S_T, 0) if the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_in_put"
    out: ClassVar[bool] = False


BARRIERS = (
    UpAndOutCall, UpAndOutPut, DownAndOutCall, DownAndOutPut, UpAndInCall, UpAndInPut, DownAndInCall, DownAndInPut
)  # fmt: skip
"""All eight."""
