"""What puts and calls on anything have in common: a strike, the value of certain exercise, and parity."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.schema import Field

__all__ = ["STRIKE", "StruckOption"]

STRIKE = Field("K", "strike", "in currency", 50.0, 150.0, least=0.0, strict=True)


class StruckOption(Product):
    """Pays max(K - U, 0) or max(U - K, 0), as its `option` says, for something U whose expected value is known."""

    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)

    @abstractmethod
    def expected(self, law: Law) -> Tensor:
        """The expected value of what the strike is compared with. Shapes: -> (n,). Units: currency at expiry."""

    def bounds(self, law: Law) -> Bounds:
        """The value of exercise in any case, and the discounted strike or expected value; a call's payoff has none."""
        if self.option == "put":
            most = law.c.K * law.discount
            lower = (-self._exercised(law)).clamp(min=0) if law.known else 0 * most
            return Bounds(lower, most, most)
        if not law.known:
            return super().bounds(law)
        most = self.expected(law) * law.discount
        return Bounds(self._exercised(law).clamp(min=0), most, torch.full_like(most, math.inf))

    def parity(self, law: Law) -> Tensor | None:
        """A call is worth more than a put by what it is worth to exercise in any case."""
        if not law.known:
            return None
        return self._exercised(law) if self.option == "put" else -self._exercised(law)

    def _exercised(self, law: Law) -> Tensor:
        """What a call is worth that is exercised in any case."""
        return (self.expected(law) - law.c.K) * law.discount
