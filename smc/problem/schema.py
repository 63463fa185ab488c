"""The named columns of a contract: what its parameters are called, in which unit, and what is allowed."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from smc.errors import ConfigError

__all__ = ["EXPIRY", "Field", "Schema"]


@dataclass(frozen=True)
class Field:
    """One parameter of a contract.

    `lower` and `upper` bound the default domain. A contract itself needs only to be at least `least`, or above it
    where `strict`, and at most `most`, or under it where `below`. `unit` completes "K is ...". Bounds beyond `doubtful`
    are taken for another unit, and questioned. Where `certain`, nothing is random at the least value, which is then no
    part of a domain.
    """

    name: str
    about: str
    unit: str
    lower: float
    upper: float
    least: float = float("-inf")
    strict: bool = False
    doubtful: float = float("inf")
    certain: bool = False
    most: float = float("inf")
    below: bool = False

    @property
    def allowed(self) -> str:
        """What a value has to be, in words."""
        allowed = "finite"
        if self.least > float("-inf"):
            allowed += f" and {'above' if self.strict else 'at least'} {self.least:g}"
        if self.most < float("inf"):
            allowed += f" and {'below' if self.below else 'at most'} {self.most:g}"
        return allowed

    def of(self, name: str, whose: str) -> Field:
        """The same parameter of one of several things."""
        return replace(self, name=name, about=f"{self.about} {whose}")

    def within(self, lower: float, upper: float) -> Field:
        """The same parameter with another default domain."""
        return replace(self, lower=lower, upper=upper)


EXPIRY = Field(
    "T", "time to expiry", "in years, so that 30 days are 0.082", 0.05, 2.0, least=0.0, doubtful=60.0, certain=True
)
"""The field that every problem has."""


class Schema(Sequence[Field]):
    """The fields of a problem in the order of a table's columns.

    Raises: ConfigError for a name that two fields have, or that is no name of Python's.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = tuple(fields)
        self.names = tuple(field.name for field in self._fields)
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise ConfigError(f"the field {twice[0]!r} is there twice: give process and product different names")
        odd = [name for name in self.names if not name.isidentifier() or name.startswith("_")]
        if odd:
            raise ConfigError(f"the field {odd[0]!r} is no name: letters, digits and '_', not first a digit or '_'")

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, index: int) -> Field:  # type: ignore[override]
        return self._fields[index]

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    @cached_property
    def row(self) -> Any:
        """A named tuple of the fields: one contract's values, or its columns."""
        return namedtuple("Contract", self.names)  # of names that no type checker knows

    def column(self, name: str) -> int:
        """Where a field stands. Raises: ConfigError if it does not."""
        if name not in self.names:
            raise ConfigError(f"there is no field {name!r}; the fields are {', '.join(self.names)}")
        return self.names.index(name)
