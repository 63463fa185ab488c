"""The price at expiry itself, of which every payoff without dates is a function."""

from __future__ import annotations

from typing import Any, ClassVar

from smc.problem.product import Product
from smc.problem.products.european import STRIKE
from smc.problem.schema import Field

__all__ = ["TerminalPrice"]


class TerminalPrice(Product):
    """Pays S_T at expiry, not discounted: what European options are made of. The strike is not read."""

    kind: ClassVar[str] = "terminal_price"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    lipschitz: ClassVar[bool] = True

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """Nothing."""
        return (0.0,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The price."""
        return spot
