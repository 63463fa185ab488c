"""European options: what the price at expiry is below, or above, a strike."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from smc.problem.product import Product
from smc.problem.schema import Field

__all__ = ["STRIKE", "EuropeanCall", "EuropeanPut"]

STRIKE = Field("K", "strike", "in currency", 50.0, 150.0, least=0.0, strict=True)


class EuropeanPut(Product):
    """Pays max(K - S_T, 0)."""

    kind: ClassVar[str] = "european_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Strike and discount factor."""
        return c.K, math.exp(-c.r * c.T)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - spot, 0.0)


class EuropeanCall(EuropeanPut):
    """Pays max(S_T - K, 0)."""

    kind: ClassVar[str] = "european_call"

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(spot - k[0], 0.0)
