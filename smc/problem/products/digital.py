"""Cash-or-nothing options: one unit of currency if the price at expiry is beyond a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from smc.problem.product import Product
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["DigitalPut"]


class DigitalPut(Product):
    """Pays 1 if S_T < K."""

    kind: ClassVar[str] = "digital_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] if spot < k[0] else 0.0
