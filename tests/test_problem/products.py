"""Every product of the library, on four dates where it has dates."""

from __future__ import annotations

from typing import Any

from smc.problem.problem import _PRODUCTS
from smc.problem.product import Product

__all__ = ["kinds", "products"]


def kinds() -> dict[str, type[Product]]:
    """The library's own, by name."""
    return {name: kind for name, kind in _PRODUCTS.items() if kind.__module__.startswith("smc.")}


def products(*, dates: int = 4) -> list[Product]:
    """One of each, and another for each way of looking at prices."""
    found: list[Product] = []
    for kind in kinds().values():
        fields = kind.model_fields
        given: dict[str, Any] = {"dates": dates} if kind().dates > 1 and kind.kind[:13] != "forward_start" else {}
        found.append(kind(**given))
        if "monitoring" in fields:
            found.append(kind(**given, monitoring="continuous"))
        if "over" in fields:
            found += [kind(**given, over=over) for over in ("today and dates", "time")]
    return found
