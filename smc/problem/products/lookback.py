"""Lookback options: what the highest or the lowest price is beyond a strike, or beyond the price at expiry.

The extreme that was reached before today is a ratio to the spot, so that a domain of contracts stays a box. Prices are
looked at on equally spaced dates, the last of which is expiry, or all the time.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import expected_beyond
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["LOOKBACKS", "FloatingLookbackCall", "FloatingLookbackPut", "LookbackCall", "LookbackOption", "LookbackPut"]

_HIGHEST = Field("M", "highest price so far", "a ratio to the spot, at least 1", 1.0, 1.2, least=1.0)
_LOWEST = Field("M", "lowest price so far", "a ratio to the spot, above 0 and at most 1", 0.8, 1.0, least=0.0,
                strict=True, most=1.0)  # fmt: skip


class LookbackOption(Product):
    """Pays by the highest or the lowest price; a subclass says which, and what it is compared with.

    `monitoring`: on `dates` dates, or 'continuous'; then the extreme between two steps is that of a Brownian bridge.
    """

    lipschitz: ClassVar[bool] = True
    ratios: ClassVar[tuple[str, ...]] = ("M",)
    draws: ClassVar[int] = 2
    highest: ClassVar[bool] = True
    floating: ClassVar[bool] = False

    dates: WholeNumber = Setting(default=16, ge=1)
    monitoring: Literal["dates", "continuous"] = "dates"

    @property
    def continuous(self) -> bool:
        """Whether prices are looked at all the time."""
        return self.monitoring == "continuous"

    @property
    def way(self) -> float:
        """1 of the highest price, -1 of the lowest."""
        return 1.0 if self.highest else -1.0

    # --- what one path pays --------------------------------------------------------------------------

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """The discount factor, the extreme so far, the logarithms of that and of the spot; and the strike."""
        strike = 0.0 if self.floating else c.K
        return math.exp(-c.r * c.T), c.M * c.X0, math.log(c.M * c.X0), math.log(c.X0), strike

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """The extreme so far. All the time its logarithm, and that of the last price."""
        return (k[2], k[3]) if self.continuous else (k[1],)

    def beyond(self, one: float, other: float) -> float:
        """The more extreme of two."""
        return max(one, other) if self.highest else min(one, other)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The extreme so far."""
        if self.continuous:
            return self.beyond(seen[0], math.log(spot)), math.log(spot)
        return (self.beyond(seen[0], spot),)

    def between(
        self, seen: tuple[float, ...], spot: float, variation: float, normals: tuple[float, ...], share: float,
        k: tuple[float, ...],
    ) -> tuple[float, ...]:  # fmt: skip
        """The extreme of a Brownian bridge, which -2 ln U, a sum of two squared normals, tells.

        Source: Glasserman (2003), section 6.4.
        """
        last = math.log(spot)
        moved, squares = last - seen[1], normals[0] * normals[0] + normals[1] * normals[1]
        reached = 0.5 * (seen[1] + last + self.way * math.sqrt(moved * moved + variation * squares))
        return self.beyond(seen[0], reached), last

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        extreme = math.exp(seen[0]) if self.continuous else seen[0]
        against = spot if self.floating else k[4]
        return k[0] * max(self.way * (extreme - against), 0.0)

    # --- what is known of prices ---------------------------------------------------------------------

    def unit(self, law: Law) -> Tensor:
        """The discounted spot, by the deviation."""
        return law.spot * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """The price if the logarithm of the price is a Brownian motion, looked at a little less far out on dates."""
        dates = None if self.continuous else self.dates
        extreme = law.c.M * law.spot
        beyond = expected_beyond(law.spot, self._level(law), law.growth, law.deviation, dates, highest=self.highest)
        if self.floating:
            expected = self.way * (extreme - law.forward) + beyond
        else:
            expected = (self.way * (extreme - law.c.K)).clamp(min=0) + beyond
        return expected * law.discount / self.unit(law)

    def _level(self, law: Law) -> Tensor:
        """From which on a new extreme adds to the payoff."""
        extreme = law.c.M * law.spot
        if self.floating:
            return extreme
        return torch.maximum(extreme, law.c.K) if self.highest else torch.minimum(extreme, law.c.K)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the extreme, and of a strike."""
        extreme = law.growth - torch.log(law.c.M)
        return (extreme,) if self.floating else (extreme, torch.log(law.spot / law.c.K) + law.growth)

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """The guess of the price."""
        return (torch.log1p(self.anchor(law).clamp(min=0)),)

    def bounds(self, law: Law) -> Bounds:
        """What the extreme so far and the forward pay; of the lowest price also the strike, or the forward."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        extreme, strike = law.c.M * law.spot, None if self.floating else law.c.K
        payoff = strike * law.discount if strike is not None and not self.highest else endless
        if not law.known:
            return Bounds(nothing, payoff, payoff)
        reached = torch.maximum(extreme, law.forward) if self.highest else torch.minimum(extreme, law.forward)
        lower = (self.way * (reached - (law.forward if strike is None else strike))).clamp(min=0) * law.discount
        most = law.forward * law.discount if self.floating and not self.highest else payoff
        return Bounds(lower, most, payoff)


class LookbackCall(LookbackOption):
    """Pays max(max S - K, 0), the highest price so far and those on the dates being looked at."""

    kind: ClassVar[str] = "lookback_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _HIGHEST)
    inputs: ClassVar[tuple[str, ...] | None] = ("M",)
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "call"


class LookbackPut(LookbackOption):
    """Pays max(K - min S, 0), the lowest price so far and those on the dates being looked at."""

    kind: ClassVar[str] = "lookback_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _LOWEST)
    inputs: ClassVar[tuple[str, ...] | None] = ("M",)
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "put"
    highest: ClassVar[bool] = False


class FloatingLookbackCall(LookbackOption):
    """Pays S_T - min S, the lowest price so far and those on the dates being looked at."""

    kind: ClassVar[str] = "floating_lookback_call"
    fields: ClassVar[tuple[Field, ...]] = (_LOWEST,)
    inputs: ClassVar[tuple[str, ...] | None] = ("M",)
    option: ClassVar[Literal["put", "call"] | None] = "call"
    highest: ClassVar[bool] = False
    floating: ClassVar[bool] = True


class FloatingLookbackPut(LookbackOption):
    """Pays max S - S_T, the highest price so far and those on the dates being looked at."""

    kind: ClassVar[str] = "floating_lookback_put"
    fields: ClassVar[tuple[Field, ...]] = (_HIGHEST,)
    inputs: ClassVar[tuple[str, ...] | None] = ("M",)
    option: ClassVar[Literal["put", "call"] | None] = "put"
    floating: ClassVar[bool] = True


LOOKBACKS = (LookbackCall, LookbackPut, FloatingLookbackCall, FloatingLookbackPut)
"""All four."""
