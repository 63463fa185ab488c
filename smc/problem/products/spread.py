"""Spread options: the difference of two prices at expiry against a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import black
from smc.problem.law import Law
from smc.problem.product import Bounds
from smc.problem.products.struck import StruckOption
from smc.problem.schema import Field

__all__ = ["SpreadCall", "SpreadPut"]

_STRIKE = Field("K", "strike", "in currency, at least 0", 0.0, 30.0, least=0.0)


class SpreadCall(StruckOption):
    """Pays max(S_1 - S_2 - K, 0)."""

    kind: ClassVar[str] = "spread_call"
    fields: ClassVar[tuple[Field, ...]] = (_STRIKE,)
    still: ClassVar[tuple[str, ...]] = ()
    option: ClassVar[Literal["put", "call"] | None] = "call"
    assets: ClassVar[int] = 2

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def payoff(self, seen: tuple[float, ...], spot: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(self.sign * (spot[0] - spot[1] - k[0]), 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted forward of the second asset with the strike, by the deviation of the ratio to it."""
        return self._against(law) * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """Kirk's approximation: the second price and the strike together are log-normal.

        Source: Kirk, "Correlation in the energy markets" (1995).
        """
        return black(law.forwards[:, 0], self._against(law), self.width(law), self.sign) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the second forward with the strike, from the first."""
        return (torch.log(law.forwards[:, 0] / self._against(law)),)

    def width(self, law: Law) -> Tensor:
        """The deviation of the ratio."""
        share, covariances = law.forwards[:, 1] / self._against(law), law.covariances
        variance = covariances[:, 0, 0] - 2 * share * covariances[:, 0, 1] + share.square() * covariances[:, 1, 1]
        return variance.clamp(min=1e-12).sqrt()

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """The strike's share."""
        return (law.c.K / self._against(law),)

    def expected(self, law: Law) -> Tensor:
        """The difference of the forwards."""
        return law.forwards[:, 0] - law.forwards[:, 1]

    def bounds(self, law: Law) -> Bounds:
        """What is certain of exercise; a call pays less than the first price, a put less than the second and K."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        if not law.known:
            return Bounds(nothing, endless, endless)
        most = law.forwards[:, 0] if self.option == "call" else self._against(law)
        lower = (self.sign * (self.expected(law) - law.c.K)).clamp(min=0)
        return Bounds(lower * law.discount, most * law.discount, endless)

    def _against(self, law: Law) -> Tensor:
        return law.forwards[:, 1] + law.c.K


class SpreadPut(SpreadCall):
    """Pays max(K - (S_1 - S_2), 0)."""

    kind: ClassVar[str] = "spread_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
