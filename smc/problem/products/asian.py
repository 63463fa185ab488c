"""Options on an average: of the prices at equally spaced dates, the last of which is expiry."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field as Setting

from smc.numeric_fields import WholeNumber
from smc.problem.product import Product
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["ArithmeticAsianCall", "ArithmeticAsianPut"]


class ArithmeticAsianPut(Product):
    """Pays max(K - A, 0), A being the mean of the prices at `dates` dates."""

    kind: ClassVar[str] = "arithmetic_asian_put"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True

    dates: WholeNumber = Setting(default=16, ge=1)

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and the weight of a date."""
        return c.K, math.exp(-c.r * c.T), 1.0 / self.dates

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the prices so far."""
        return (seen[0] + spot,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - k[2] * seen[0], 0.0)


class ArithmeticAsianCall(ArithmeticAsianPut):
    """Pays max(A - K, 0)."""

    kind: ClassVar[str] = "arithmetic_asian_call"

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[2] * seen[0] - k[0], 0.0)
