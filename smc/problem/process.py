"""What a process is: how the state of one path moves, in scalar functions of plain Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from smc.problem.schema import Field

__all__ = ["Process"]


class Process(BaseModel, ABC):
    """How the market moves. A subclass is one file: its fields, and four scalar methods.

    The methods are compiled, for a CPU by Numba and into one kernel for a GPU, with the settings of the instance as
    constants. They may use arithmetic, comparisons, conditional expressions, tuples, loops over ranges, the functions
    of `math` and other scalar functions; no arrays and no objects. In Python they work as they stand.

    Attributes of the class: `kind`, the name in a checkpoint; `fields`, the spots first; `normals`, how many a step
    takes; `assets`, how many spots there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    normals: ClassVar[int] = 1
    assets: ClassVar[int] = 1

    @property
    def exact(self) -> bool:
        """Whether one step of any length has the right law: then a payoff of the last spot needs one normal."""
        return False

    @abstractmethod
    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """What a contract's steps of `dt` years need, in double precision. `c` has the contract's fields by name."""

    @abstractmethod
    def start(self, c: Any) -> tuple[float, ...]:
        """The state at the beginning."""

    @abstractmethod
    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The state one step later. `k` are the coefficients."""

    @abstractmethod
    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> Any:
        """The price that a state means, or a tuple of as many as there are assets. Units: currency."""
