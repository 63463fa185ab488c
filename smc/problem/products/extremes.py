"""Options on the best or the worst of several assets at expiry."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import black, extreme_of
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["BestOfCall", "BestOfPut", "WorstOfCall", "WorstOfPut"]


class BestOfCall(Product):
    """Pays max(max S_i - K, 0)."""

    kind: ClassVar[str] = "best_of_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)
    option: ClassVar[Literal["put", "call"] | None] = "call"
    best: ClassVar[bool] = True

    n_assets: WholeNumber = Setting(default=2, ge=2, le=16)

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        best = max(spot[i] for i in range(self.n_assets))
        worst = min(spot[i] for i in range(self.n_assets))
        return k[1] * max(self.sign * ((best if self.best else worst) - k[0]), 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation."""
        return law.c.K * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the best or worst price were log-normal."""
        mean, deviation = self._matched(law)
        return black(mean, law.c.K, deviation, self.sign) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike from the expected best or worst price, and from each forward."""
        return torch.log(self._matched(law)[0] / law.c.K), *torch.log(law.forwards / law.c.K[:, None]).unbind(dim=1)

    def width(self, law: Law) -> Tensor:
        """That of the best or worst price."""
        return self._matched(law)[1]

    def bounds(self, law: Law) -> Bounds:
        """A put pays at most the strike; a best-of call the sum of the prices, a worst-of call the least of them."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        forwards, strike = law.forwards, law.c.K
        if self.option == "put":
            most = strike * law.discount
            return Bounds(nothing, most, most)
        if not law.known:
            return Bounds(nothing, endless, endless)
        expected = forwards.sum(dim=1) if self.best else forwards.amin(dim=1)
        lower = (forwards.amax(dim=1) - strike).clamp(min=0) if self.best else nothing
        return Bounds(lower * law.discount, expected * law.discount, endless)

    def _matched(self, law: Law) -> tuple[Tensor, Tensor]:
        return extreme_of(law.forwards, law.covariances, highest=self.best)


class BestOfPut(BestOfCall):
    """Pays max(K - max S_i, 0)."""

    kind: ClassVar[str] = "best_of_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"


class WorstOfCall(BestOfCall):
    """Pays max(min S_i - K, 0)."""

    kind: ClassVar[str] = "worst_of_call"
    best: ClassVar[bool] = False


class WorstOfPut(WorstOfCall):
    """Pays max(K - min S_i, 0)."""

    kind: ClassVar[str] = "worst_of_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
