"""Contracts and the domain they are drawn from.

A European option under Black-Scholes is six numbers. Everywhere in the library a batch of contracts
is an (n, 6) array whose columns are `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from smc.errors import ConfigError

__all__ = [
    "DEFAULT_DOMAIN",
    "FIELDS",
    "BoundSpec",
    "Contract",
    "ContractsLike",
    "contract_array",
    "outside_domain",
    "resolve_domain",
]

FIELDS: Final = ("X0", "K", "T", "r", "d", "v")


class Contract(BaseModel):
    """One European option.

    Units: X0, K in currency; T in years; r, d continuous rates per year; v per sqrt(year).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    X0: float = Field(gt=0, description="spot")
    K: float = Field(gt=0, description="strike")
    T: float = Field(ge=0, description="time to expiry")
    r: float = Field(description="interest rate")
    d: float = Field(description="dividend yield")
    v: float = Field(ge=0, description="volatility")


class BoundSpec(BaseModel):
    """A closed interval of one contract field, lower < upper."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lower: float
    upper: float

    @model_validator(mode="after")
    def _ordered(self) -> BoundSpec:
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper, got {self.lower} and {self.upper}")
        return self


DEFAULT_DOMAIN: Final[Mapping[str, BoundSpec]] = {
    "X0": BoundSpec(lower=50.0, upper=150.0),
    "K": BoundSpec(lower=50.0, upper=150.0),
    "T": BoundSpec(lower=0.05, upper=2.0),
    "r": BoundSpec(lower=0.0, upper=0.08),
    "d": BoundSpec(lower=0.0, upper=0.04),
    "v": BoundSpec(lower=0.05, upper=0.6),
}

ContractsLike = Contract | Sequence[Contract] | npt.ArrayLike


def resolve_domain(bounds: Mapping[str, BoundSpec | Mapping[str, float]]) -> dict[str, BoundSpec]:
    """Complete `bounds` with `DEFAULT_DOMAIN` and check it; `{}` means the whole default.

    Raises: ConfigError for an unknown field, inverted bounds, or bounds no contract can have.
    """
    unknown = sorted(set(bounds) - set(FIELDS))
    if unknown:
        raise ConfigError(f"domain_bounds: unknown field {unknown[0]!r}; allowed are {', '.join(FIELDS)}")
    domain = dict(DEFAULT_DOMAIN)
    for name, spec in bounds.items():
        try:
            domain[name] = BoundSpec.model_validate(spec)
        except ValueError as error:
            raise ConfigError(f"domain_bounds[{name!r}]: {_first_line(error)}") from None
    for name in ("X0", "K", "T", "v"):
        if domain[name].lower <= 0:
            raise ConfigError(
                f"domain_bounds[{name!r}]: lower bound must be above 0, got {domain[name].lower}"
                + (" (T = 0 and v = 0 are priced exactly, without training)" if name in "Tv" else "")
            )
    return domain


def contract_array(contracts: ContractsLike) -> npt.NDArray[np.float64]:
    """Any form of contracts as a float64 array.

    Shapes: one Contract, a sequence of n Contracts, (6,) or (n, 6) -> (n, 6).
    Raises: ConfigError naming the first contract and field that is wrong.
    """
    if isinstance(contracts, Contract):
        contracts = [contracts]
    if isinstance(contracts, Sequence) and contracts and all(isinstance(c, Contract) for c in contracts):
        return np.array([[getattr(c, f) for f in FIELDS] for c in contracts], dtype=np.float64)
    if hasattr(contracts, "detach"):  # a torch tensor, possibly on the GPU
        contracts = contracts.detach().cpu().numpy()
    try:
        array = np.array(contracts, dtype=np.float64, ndmin=2)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"contracts: not an array of numbers ({error})") from None
    if array.size == 0:
        return np.empty((0, len(FIELDS)))
    if array.ndim != 2 or array.shape[1] != len(FIELDS):
        raise ConfigError(f"contracts: expected shape (n, 6) with columns {', '.join(FIELDS)}, got {array.shape}")
    _check_values(array)
    return array


def outside_domain(contracts: npt.NDArray[np.float64], domain: Mapping[str, BoundSpec]) -> dict[str, int]:
    """For each field that some contract has outside the domain, the row of the first one."""
    outside = {}
    for column, name in enumerate(FIELDS):
        bound = domain[name]
        slack = 1e-12 * (bound.upper - bound.lower)
        values = contracts[:, column]
        rows = np.flatnonzero((values < bound.lower - slack) | (values > bound.upper + slack))
        if rows.size:
            outside[name] = int(rows[0])
    return outside


def _check_values(array: npt.NDArray[np.float64]) -> None:
    lowest: dict[str, tuple[bool, str]] = {
        "X0": (True, "above 0"),
        "K": (True, "above 0"),
        "T": (False, "at least 0"),
        "v": (False, "at least 0"),
    }
    for column, name in enumerate(FIELDS):
        values = array[:, column]
        bad = ~np.isfinite(values)
        allowed = "finite"
        if name in lowest:
            strict, allowed = lowest[name]
            bad |= (values <= 0) if strict else (values < 0)
            allowed = f"finite and {allowed}"
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ConfigError(f"contracts[{row}].{name} must be {allowed}, got {values[row]}")


def _first_line(error: ValueError) -> str:
    details: Iterable[Any] = getattr(error, "errors", lambda: [])()
    for detail in details:
        where = ".".join(str(part) for part in detail["loc"])
        message = str(detail["msg"]).removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return str(error)
