"""The price of one asset on one of several dates, of which policies and upper bounds are made."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field as Setting

from smc.numeric_fields import WholeNumber
from smc.problem.product import Product
from smc.problem.schema import Field

__all__ = ["PriceOnDate"]

_FIELDS = (
    Field("date", "number of the date", "from 1 to the last", 1.0, 2.0, least=1.0),
    Field("asset", "number of the asset", "from 0", 0.0, 1.0, least=0.0),
)


class PriceOnDate(Product):
    """Pays the price of asset number `asset` on date number `date`, at once and not discounted.

    Both are fields of the contract: calls with the same stream see the same paths, on another date.
    """

    kind: ClassVar[str] = "price_on_date"
    fields: ClassVar[tuple[Field, ...]] = _FIELDS
    lipschitz: ClassVar[bool] = True

    dates: WholeNumber = Setting(default=1, ge=1)
    n_assets: WholeNumber = Setting(default=1, ge=1, le=16)

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    @property
    def single(self) -> bool:
        """Whether a price is a number, and not a tuple of them."""
        return self.n_assets == 1

    def coefficients(self, c: Any) -> tuple[float, float]:
        """Date and asset."""
        return c.date, c.asset

    def chosen(self, spot: Any, k: tuple[float, ...]) -> float:
        """The price of the asset."""
        if self.single:
            return spot
        return sum((spot[i] if k[1] == i else 0.0) for i in range(self.n_assets))

    def observe(
        self, seen: tuple[float, ...], spot: Any, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The price, once its date has come."""
        return (self.chosen(spot, k) if date == k[0] else seen[0],)

    def payoff(self, seen: tuple[float, ...], spot: Any, k: tuple[float, ...]) -> float:
        """The price."""
        return seen[0]
