"""Autocallable notes: redeemed early once the price is high enough, with coupons, and at risk at expiry if it is low.

A Phoenix note pays a coupon on each date on which the price is at or above a level, and with a memory those that it
has missed, too. With the coupon's level at that of redemption it is a note whose coupons are paid when it is called.
No public standard defines these notes; terms here are those of term sheets.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field as Setting
from pydantic import StrictBool
from torch import Tensor

from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.anchors import NoteTerms, note_on_dates
from smc.problem.conditional import PricedOnBridge
from smc.problem.law import Law
from smc.problem.log_normal import FAR
from smc.problem.normal import lower_tail
from smc.problem.product import Bounds
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["NOTE_FIELDS", "Autocallable"]

NOTE_FIELDS = (
    Field("call_level", "level of redemption", "a ratio to the initial price", 0.95, 1.1, least=0.0, strict=True),
    Field("coupon_level", "level of coupons", "a ratio to the initial price", 0.65, 0.95, least=0.0, strict=True),
    Field("protection", "level below which redemption falls with the price", "a ratio to the initial price", 0.5, 0.8,
          least=0.0, strict=True),
    Field("coupon", "coupon of a date", "a share of the nominal, so that 2 % is 0.02", 0.0, 0.04, least=0.0),
)  # fmt: skip
"""What a note promises, beside its initial price."""

# Before the first date nothing bounds the end of a bridge, nor does a deviation of so many.
_UNBOUND, _CERTAIN = 1e30, 1e4


class Autocallable(PricedOnBridge):
    """A note on `nominal`, looked at on `dates` dates until it is called; what is paid is discounted from its date.

    On a date with S >= coupon_level x K it pays `coupon` x nominal, with `memory` also for the dates since the last
    coupon; with S >= call_level x K it pays the nominal and ends. At expiry it pays the nominal, or nominal x S / K if
    S < protection x K. K is the initial price.
    """

    kind: ClassVar[str] = "autocallable"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, *NOTE_FIELDS)
    inputs: ClassVar[tuple[str, ...] | None] = ("call_level", "coupon_level", "protection", "coupon")
    still: ClassVar[tuple[str, ...]] = ("K",)
    notional: ClassVar[str] = "nominal"

    dates: WholeNumber = Setting(default=4, ge=1)
    memory: StrictBool = True
    nominal: RealNumber = Setting(default=100.0, gt=0)

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """The levels of redemption, coupon and protection; the initial price, the coupon, and a date's discount."""
        discount = math.exp(-c.r * c.T / self.dates)
        return c.call_level * c.K, c.coupon_level * c.K, c.protection * c.K, c.K, self.nominal * c.coupon, discount

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """1 until it is called; what has been paid, how many coupons have not, and the discount factor."""
        return 1.0, 0.0, 0.0, 1.0

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """Coupons, then the call."""
        discount = seen[3] * k[5]
        due = seen[2] + 1.0
        coupon = seen[0] * discount * k[4] * due if spot >= k[1] else 0.0
        unpaid = (0.0 if spot >= k[1] else due) if self.memory else 0.0
        called = seen[0] if spot >= k[0] else 0.0
        return seen[0] - called, seen[1] + coupon + called * discount * self.nominal, unpaid, discount

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """What was paid, and what is redeemed at expiry."""
        redeemed = self.nominal if spot >= k[2] else self.nominal * spot / k[3]
        return seen[1] + seen[0] * seen[3] * redeemed

    # --- on a bridge ---------------------------------------------------------------------------------

    def begin_bridge(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """No date yet."""
        return (*tuple(_UNBOUND for i in range(self.dates)), *tuple(_UNBOUND for i in range(self.dates)))

    def observe_bridge(
        self, kept: tuple[float, ...], log_price: float, variance: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """How far a bridge has to be lifted for each unit of variance, on each date: to the call, and to the coupon."""
        call, coupon = (math.log(k[0]) - log_price) / variance, (math.log(k[1]) - log_price) / variance
        return (
            *tuple(call if date == i + 1 else kept[i] for i in range(self.dates)),
            *tuple(coupon if date == i + 1 else kept[self.dates + i] for i in range(self.dates)),
        )

    def on_bridge(
        self, kept: tuple[float, ...], log_price: float, own: float, variance: float, k: tuple[float, ...]
    ) -> float:
        """Each payment by the probability that the end of the bridge lies where it is made."""
        deviation = math.sqrt(variance)
        # In deviations of the bridge's end: below these there is no call, and no coupon.
        called = tuple((min(variance * kept[i], FAR) + own) / deviation for i in range(self.dates))
        without_call = tuple(lower_tail(called[i]) for i in range(self.dates))
        without_coupon = tuple(
            lower_tail((min(variance * kept[self.dates + i], FAR) + own) / deviation) for i in range(self.dates)
        )
        value, discount, alive, bound = 0.0, 1.0, 1.0, _CERTAIN
        for i in range(self.dates):
            discount = discount * k[5]
            # A coupon is paid by those ends that were too low for it on all dates since its own, and now are not.
            missed, due = alive, max(alive - without_coupon[i], 0.0)
            if self.memory:
                for back in range(1, i + 1):
                    missed = min(missed, without_coupon[i - back])
                    due = due + max(missed - without_coupon[i], 0.0)
            value = value + discount * (k[4] * due + self.nominal * max(alive - without_call[i], 0.0))
            alive = min(alive, without_call[i])
            bound = min(bound, called[i])
        low = min(bound, (math.log(k[2]) - log_price + own) / deviation)
        lost = min(alive, lower_tail(low))
        price = math.exp(log_price - own + 0.5 * variance) * lower_tail(low - deviation)
        return value + discount * self.nominal * (alive - lost + price / k[3])

    # --- what is known of prices ---------------------------------------------------------------------

    def unit(self, law: Law) -> Tensor:
        """The discounted nominal, by the deviation."""
        return self.nominal * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The price if each date depended on the one before it alone."""
        return note_on_dates(*law.on_dates(self.dates), self._terms(law)) * self.nominal / self.unit(law)

    def _terms(self, law: Law) -> NoteTerms:
        c, share = law.c, law.spot.new_tensor(range(1, self.dates + 1)) / self.dates
        discounts = torch.exp(law.discount.log()[:, None] * share)
        levels = c.call_level * c.K, c.coupon_level * c.K, c.protection * c.K
        return NoteTerms(*levels, c.K, c.coupon, discounts, memory=self.memory)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the levels of redemption, coupon and protection."""
        away = torch.log(law.spot / law.c.K) + law.growth
        return tuple(away - torch.log(getattr(law.c, name)) for name in ("call_level", "coupon_level", "protection"))

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How far the levels are on the first date; and the guess of the price."""
        first, variance = (of_date[:, 0] for of_date in law.on_dates(self.dates))
        ahead = (torch.log(first / (law.c.K * level)) for level in (law.c.call_level, law.c.coupon_level))
        resolved = tuple(torch.tanh(x / (2 * variance.sqrt())) for x in ahead)
        return *resolved, self.anchor(law) * law.deviation

    def bounds(self, law: Law) -> Bounds:
        """Nothing; the nominal and all coupons, from the date on which they are worth most."""
        redeemed = law.c.protection.clamp(min=1.0)
        most = self.nominal * (redeemed + self.dates * law.c.coupon) * law.discount.clamp(min=1.0)
        return Bounds(0 * most, most, most)

    def notionals(self, law: Law) -> Tensor:
        """The nominal."""
        return 0 * law.spot + self.nominal
