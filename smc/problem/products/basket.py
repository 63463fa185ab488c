"""Options on a basket: the weighted sum of the prices of several assets at expiry."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from pydantic import model_validator
from torch import Tensor

from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.anchors import black, matched_sum
from smc.problem.law import Law
from smc.problem.products.struck import StruckOption

__all__ = ["BasketCall", "BasketPut"]


class BasketPut(StruckOption):
    """Pays max(K - B, 0), B being the sum of w_i S_i at expiry. Weights are 1 / `n_assets` each unless given."""

    kind: ClassVar[str] = "basket_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"

    n_assets: WholeNumber = Setting(default=2, ge=2, le=16)
    weights: tuple[RealNumber, ...] = ()

    @model_validator(mode="after")
    def _weigh_each(self) -> BasketPut:
        if self.weights and (len(self.weights) != self.n_assets or min(self.weights) <= 0):
            raise ValueError(f"weights must be {self.n_assets} numbers above 0, got {self.weights}")
        return self

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights."""
        return self.weights or (1.0 / self.n_assets,) * self.n_assets

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - sum(self.shares[i] * spot[i] for i in range(self.n_assets)), 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation of the basket."""
        return law.c.K * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the basket were log-normal with its first two moments."""
        mean, deviation = self._matched(law)
        return black(mean, law.c.K, deviation, 1.0 if self.option == "call" else -1.0) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike, from the expected basket."""
        return (torch.log(self.expected(law) / law.c.K),)

    def width(self, law: Law) -> Tensor:
        """That of the basket."""
        return self._matched(law)[1]

    def expected(self, law: Law) -> Tensor:
        """The weighted sum of the forwards."""
        return self._matched(law)[0]

    def notionals(self, law: Law) -> Tensor:
        """The basket today."""
        return law.spots @ law.spot.new_tensor(self.shares)

    def _matched(self, law: Law) -> tuple[Tensor, Tensor]:
        return matched_sum(law.forwards * law.spot.new_tensor(self.shares), law.covariances)


class BasketCall(BasketPut):
    """Pays max(B - K, 0)."""

    kind: ClassVar[str] = "basket_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"

    def payoff(self, seen: tuple[float, ...], spot: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(sum(self.shares[i] * spot[i] for i in range(self.n_assets)) - k[0], 0.0)
