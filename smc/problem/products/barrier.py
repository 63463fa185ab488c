"""Barrier options, looked at on equally spaced dates, the last of which is expiry.

The barrier is a ratio to the spot, so that a domain of contracts stays a box.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field as Setting

from smc.numeric_fields import WholeNumber
from smc.problem.product import Product
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["DownAndOutCall", "UpAndOutCall"]

_UP = Field("H", "barrier", "a ratio to the spot, above 1", 1.1, 1.6, least=1.0, strict=True)
_DOWN = Field("H", "barrier", "a ratio to the spot, below 1", 0.6, 0.95, least=0.0, strict=True)


class UpAndOutCall(Product):
    """Pays max(S_T - K, 0), unless the price is at or above H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "up_and_out_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _UP)

    dates: WholeNumber = Setting(default=16, ge=1)

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and the barrier's price."""
        return c.K, math.exp(-c.r * c.T), c.H * c.X0

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """Alive."""
        return (1.0,)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 while alive, then 0."""
        return (seen[0] if spot < k[2] else 0.0,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * seen[0] * max(spot - k[0], 0.0)


class DownAndOutCall(UpAndOutCall):
    """Pays max(S_T - K, 0), unless the price is at or below H X0 on one of `dates` dates."""

    kind: ClassVar[str] = "down_and_out_call"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, _DOWN)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """1 while alive, then 0."""
        return (seen[0] if spot > k[2] else 0.0,)
