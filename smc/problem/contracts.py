"""Contracts and the domain they are drawn from.

A contract is one number for each field of a problem's schema; a batch of them is an array with a row for each, whose
columns stand in the order of the schema. Where no schema is given it is that of a European option under Black-Scholes,
which has six fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from smc.errors import ConfigError
from smc.numeric_fields import RealNumber
from smc.problem.problem import EUROPEAN_PUT
from smc.problem.schema import Schema

__all__ = [
    "DEFAULT_DOMAIN",
    "FIELDS",
    "SCHEMA",
    "BoundSpec",
    "Contract",
    "ContractsLike",
    "bound_of",
    "columns",
    "contract_array",
    "is_random",
    "outside_domain",
    "question_units",
    "resolve_domain",
    "unit_of",
]

SCHEMA: Final = EUROPEAN_PUT.schema
FIELDS: Final = SCHEMA.names


class Contract(BaseModel):
    """One European option.

    Units: X0, K in currency; T in years; r, d continuous rates per year; v per sqrt(year).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    X0: RealNumber = Field(gt=0, description="spot")
    K: RealNumber = Field(gt=0, description="strike")
    T: RealNumber = Field(ge=0, description="time to expiry")
    r: RealNumber = Field(description="interest rate")
    d: RealNumber = Field(description="dividend yield")
    v: RealNumber = Field(ge=0, description="volatility")


class BoundSpec(BaseModel):
    """A closed interval of one contract field, lower < upper."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lower: RealNumber
    upper: RealNumber

    @model_validator(mode="after")
    def _ordered(self) -> BoundSpec:
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper, got {self.lower} and {self.upper}")
        return self


DEFAULT_DOMAIN: Final[Mapping[str, BoundSpec]] = {
    field.name: BoundSpec(lower=field.lower, upper=field.upper) for field in SCHEMA
}

ContractsLike = Contract | Mapping[str, Any] | Sequence[Contract | Mapping[str, Any]] | npt.ArrayLike


def resolve_domain(
    bounds: Mapping[str, BoundSpec | Mapping[str, float]], schema: Schema = SCHEMA
) -> dict[str, BoundSpec]:
    """Complete `bounds` with the schema's defaults and check it; `{}` means the whole default.

    Raises: ConfigError for an unknown field, inverted bounds, or bounds no contract can have.
    """
    unknown = sorted(set(bounds) - set(schema.names))
    if unknown:
        raise ConfigError(f"domain_bounds: unknown field {unknown[0]!r}; allowed are {', '.join(schema.names)}")
    domain = {field.name: BoundSpec(lower=field.lower, upper=field.upper) for field in schema}
    for name, spec in bounds.items():
        domain[name] = bound_of(name, spec)
    for field in schema:
        above = field.strict or field.certain
        if domain[field.name].lower < field.least or (above and domain[field.name].lower == field.least):
            exactly = f" ({field.name} = {field.least:g} is priced exactly, without training)"
            raise ConfigError(
                f"domain_bounds[{field.name!r}]: lower bound must be {'above' if above else 'at least'} "
                f"{field.least:g}, got {domain[field.name].lower}{exactly if field.certain else ''}"
            )
        upper = domain[field.name].upper
        if upper > field.most or (field.below and upper == field.most):
            raise ConfigError(
                f"domain_bounds[{field.name!r}]: upper bound must be {'below' if field.below else 'at most'} "
                f"{field.most:g}, got {upper}"
            )
    return domain


def bound_of(name: str, bound: BoundSpec | Mapping[str, float]) -> BoundSpec:
    """The bounds of a field. Raises: ConfigError naming the field."""
    try:
        return BoundSpec.model_validate(bound)
    except ValueError as error:
        raise ConfigError(f"domain_bounds[{name!r}]: {_first_line(error)}") from None


def unit_of(field: str, schema: Schema = SCHEMA) -> str:
    """What to add to a message about a field that is easily given in another unit; nothing for the others."""
    known = schema[schema.column(field)]
    return f" ({field} is {known.unit})" if known.doubtful < float("inf") else ""


def question_units(domain: Mapping[str, BoundSpec], schema: Schema = SCHEMA) -> None:
    """Warn of bounds that are taken for days or percent: they can be meant, but hardly ever are."""
    for field in schema:
        bound = domain[field.name]
        if max(abs(bound.lower), abs(bound.upper)) > field.doubtful:
            warnings.warn(
                f"domain_bounds[{field.name!r}] reaches from {bound.lower:g} to {bound.upper:g}: is that the right "
                f"unit?{unit_of(field.name, schema)}",
                stacklevel=3,
            )


def contract_array(contracts: ContractsLike, schema: Schema = SCHEMA) -> npt.NDArray[np.float64]:
    """Any form of contracts as a float64 array.

    What has names is read by them, in any order: Contracts, mappings of the fields, a mapping of columns, a pandas or
    polars table, a NumPy array of records. What has none, by position, in the order of the schema.
    Shapes: one contract, a sequence or table of n, (fields,) or (n, fields) -> (n, fields).
    Raises: ConfigError naming the first contract and field that is wrong, or the fields that are missing or unknown.
    """
    if isinstance(contracts, Contract | Mapping) and not _has_columns(contracts):
        contracts = [contracts]
    if (columns := _columns(contracts, schema)) is not None:
        array = _joined(columns)
    elif (
        schema == SCHEMA
        and isinstance(contracts, Sequence)
        and contracts
        and all(isinstance(c, Contract) for c in contracts)
    ):
        array = np.array([[getattr(c, f) for f in FIELDS] for c in contracts], dtype=np.float64)
    elif isinstance(contracts, Sequence) and contracts and all(isinstance(c, Contract | Mapping) for c in contracts):
        array = np.empty((len(contracts), len(schema)))
        for row, contract in enumerate(contracts):
            given = {f: getattr(contract, f) for f in FIELDS} if isinstance(contract, Contract) else contract
            _check_names(given, f"contracts[{row}]", schema)
            array[row] = [_number(given[field], row, field) for field in schema.names]
    else:
        array = _by_position(contracts, schema)
    if array.size == 0:
        return np.empty((0, len(schema)))
    _check_values(array, schema)
    return array


def _has_columns(table: object) -> bool:
    return isinstance(table, Mapping) and any(np.ndim(values) > 0 for values in table.values())


def _columns(contracts: Any, schema: Schema) -> Mapping[str, Any] | None:
    """The columns of something that names them."""
    if _has_columns(contracts):
        _check_names(contracts, "contracts", schema)
        return {field: contracts[field] for field in schema.names}
    names = getattr(contracts, "columns", None)
    if names is None and isinstance(contracts, np.ndarray):
        names = contracts.dtype.names
    if names is None or not hasattr(contracts, "__getitem__"):
        return None
    _check_names(list(names), "contracts", schema)
    return {field: contracts[field] for field in schema.names}


def _check_names(names: Iterable[Any], where: str, schema: Schema) -> None:
    given = list(names)
    wrong = [repr(name) for name in given if name not in schema.names]
    missing = [field for field in schema.names if field not in given]
    twice = [field for field in schema.names if given.count(field) > 1]
    for what, found in (("unknown", wrong), ("missing", missing), ("there twice", twice)):
        if found:
            raise ConfigError(f"{where}: {', '.join(found)} {what}; the fields are {', '.join(schema.names)}")


def _joined(columns: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    read = [_column(values, field) for field, values in columns.items()]
    lengths = {field: len(values) for field, values in zip(columns, read, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"contracts: the columns have different lengths: {lengths}")
    return np.stack(read, axis=1)


def _column(values: Any, field: str) -> npt.NDArray[np.float64]:
    """Shapes: (n,) of anything -> (n,)."""
    masked = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
    if masked is not None and masked.any():
        raise ConfigError(f"contracts[{int(np.flatnonzero(masked)[0])}].{field} is masked: it has no value")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ConfigError(f"contracts: the column {field} has shape {array.shape}, it must be (n,)")
    if array.dtype.kind in "iuf":
        return array.astype(np.float64)
    return np.array([_number(value, row, field) for row, value in enumerate(array.tolist())], dtype=np.float64)


def _by_position(contracts: Any, schema: Schema) -> npt.NDArray[np.float64]:
    """Shapes: (fields,) or (n, fields) -> (n, fields)."""
    if hasattr(contracts, "detach"):  # a torch tensor, possibly on the GPU
        contracts = contracts.detach().cpu().numpy()
    try:
        array = np.ma.array(contracts) if isinstance(contracts, np.ma.MaskedArray) else np.array(contracts)
        # NumPy makes text of numbers beside a text, and numbers of truth values beside a number.
        if array.size and (array.dtype.kind not in "iuf" or _holds_truth(contracts)):
            array = np.array(contracts, dtype=object)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"contracts: not an array of numbers ({error})") from None
    if array.size == 0:
        return np.empty((0, len(schema)))
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != len(schema):
        columns = ", ".join(schema.names)
        raise ConfigError(f"contracts: expected shape (n, {len(schema)}) with columns {columns}, got {array.shape}")
    return _joined(dict(zip(schema.names, array.T, strict=True)))


def _holds_truth(rows: Any) -> bool:
    if not isinstance(rows, list | tuple):
        return False
    items = (item for row in rows for item in (row if isinstance(row, list | tuple) else [row]))
    return any(isinstance(item, bool | np.bool_) for item in items)


def _number(value: Any, row: int, field: str) -> float:
    """Raises: ConfigError for what is no number, or might be meant as something else."""
    if value is None:
        return np.nan
    refused = bool | np.bool_ | str | bytes | complex | np.complexfloating
    try:
        if not isinstance(value, refused) and hasattr(value, "__float__"):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"contracts: not an array of numbers: contracts[{row}].{field} is {value!r}")


def columns(table: Any, schema: Schema = SCHEMA) -> Any:
    """A table's columns by their names: `columns(table).K`. Shapes: (n, fields), an array or a tensor -> each (n,)."""
    return schema.row(*(table[:, i] for i in range(len(schema))))


def is_random(table: Any) -> Any:
    """Which contracts have an outcome that is not known today. Shapes: (n, fields) -> (n,)."""
    c = columns(table)
    return (c.T > 0) & (c.v > 0)


def outside_domain(
    contracts: npt.NDArray[np.float64], domain: Mapping[str, BoundSpec], schema: Schema = SCHEMA
) -> dict[str, int]:
    """For each field that some contract has outside the domain, the row of the first one."""
    outside = {}
    for column, name in enumerate(schema.names):
        bound = domain[name]
        slack = 1e-12 * (bound.upper - bound.lower)
        values = contracts[:, column]
        rows = np.flatnonzero((values < bound.lower - slack) | (values > bound.upper + slack))
        if rows.size:
            outside[name] = int(rows[0])
    return outside


def _check_values(array: npt.NDArray[np.float64], schema: Schema) -> None:
    for column, field in enumerate(schema):
        values = array[:, column]
        bad = ~np.isfinite(values) | ((values <= field.least) if field.strict else (values < field.least))
        bad |= (values >= field.most) if field.below else (values > field.most)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ConfigError(
                f"contracts[{row}].{field.name} must be {field.allowed}, got {values[row]}{unit_of(field.name, schema)}"
            )


def _first_line(error: ValueError) -> str:
    details: Iterable[Any] = getattr(error, "errors", lambda: [])()
    for detail in details:
        where = ".".join(str(part) for part in detail["loc"])
        message = str(detail["msg"]).removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return str(error)
