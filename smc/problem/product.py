"""What a product is: what one path pays, in scalar functions of plain Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from smc.problem.schema import Field

__all__ = ["Product"]


class Product(BaseModel, ABC):
    """What is paid. A subclass is one file: its fields, and up to four scalar methods, compiled as a process's are.

    `kind` is the name in a checkpoint. `lipschitz` says whether the payoff moves little when a price does: only then
    has it a derivative along a path. A product that looks at prices before expiry says on how many equally spaced
    dates, the last of which is expiry: `dates`. `observe` is called at each, and never where `dates` is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    lipschitz: ClassVar[bool] = False
    assets: ClassVar[int] = 1

    dates: int = 0

    @abstractmethod
    def coefficients(self, c: Any) -> tuple[float, ...]:
        """What a contract's payoff needs, in double precision. `c` has the contract's fields by name."""

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """What is known of a path before the first date."""
        return (0.0,)

    def observe(self, seen: tuple[float, ...], spot: Any, date: float, k: tuple[float, ...]) -> tuple[float, ...]:
        """What is known after date number `date`, from 1 to `dates`, at which the price is `spot`."""
        return seen

    @abstractmethod
    def payoff(self, seen: tuple[float, ...], spot: Any, k: tuple[float, ...]) -> float:
        """What is paid, discounted to today. `spot` is the price at expiry. Units: currency."""
