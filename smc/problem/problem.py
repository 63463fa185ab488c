"""A problem is a process and a product; its fields are those of both. The kinds of both are known by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from smc.errors import ConfigError
from smc.problem.law import Law
from smc.problem.process import Process
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM, OneFactorGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.asset_or_nothing import AssetOrNothingCall, AssetOrNothingPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import (
    DownAndInCall,
    DownAndInPut,
    DownAndOutCall,
    DownAndOutPut,
    UpAndInCall,
    UpAndInPut,
    UpAndOutCall,
    UpAndOutPut,
)
from smc.problem.products.basket import BasketCall, BasketPut
from smc.problem.products.bermudan import BermudanCall, BermudanMaxCall, BermudanPut
from smc.problem.products.cash_or_nothing import CashOrNothingCall, CashOrNothingPut
from smc.problem.products.cliquet import Cliquet
from smc.problem.products.digital import DigitalPut
from smc.problem.products.double_barrier import DoubleKnockOutCall, DoubleKnockOutPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.extremes import BestOfCall, BestOfPut, WorstOfCall, WorstOfPut
from smc.problem.products.floating_asian import (
    ArithmeticAsianFloatingCall,
    ArithmeticAsianFloatingPut,
    GeometricAsianFloatingCall,
    GeometricAsianFloatingPut,
)
from smc.problem.products.forward_start import ForwardStartCall, ForwardStartPut
from smc.problem.products.geometric_asian import GeometricAsianCall, GeometricAsianPut
from smc.problem.products.lookback import FloatingLookbackCall, FloatingLookbackPut, LookbackCall, LookbackPut
from smc.problem.products.spread import SpreadCall, SpreadPut
from smc.problem.products.straddle import Straddle
from smc.problem.products.terminal import TerminalPrice
from smc.problem.products.worst_of_autocallable import WorstOfAutocallable
from smc.problem.schema import EXPIRY, Schema

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EUROPEAN_PUT", "Problem", "known_fields", "process_of", "product_of", "register"]

# What looks at prices between steps takes the variance in between for constant: its bias falls with the step, and is
# larger than that of prices on the steps.
_FINER_BETWEEN, _LEAST_BETWEEN = 3, 16

Kind = TypeVar("Kind", bound=type[Process] | type[Product])

_PROCESSES: dict[str, type[Process]] = {}
_PRODUCTS: dict[str, type[Product]] = {}


@dataclass(frozen=True)
class Problem:
    """What is simulated and learnt: how the market moves, and what is paid.

    Raises: ConfigError where the two do not go together: a field that both have, or another number of assets.
    """

    process: Process
    product: Product

    def __post_init__(self) -> None:
        if self.process.assets != self.product.assets:
            raise ConfigError(
                f"{self.process.kind} has {self.process.assets} assets and {self.product.kind} is on "
                f"{self.product.assets}"
            )
        for part in (self.process, self.product):
            for name in ("kind", "fields"):
                if not hasattr(type(part), name):
                    raise ConfigError(f"{type(part).__name__} has no {name}: it is an attribute of the class")
        if self.product.continuous and not self.process.continuous:
            raise ConfigError(
                f"{self.product.kind} looks at prices between dates, and what they do there is not known of "
                f"{self.process.kind}: monitor on dates"
            )
        names = self.schema.names
        for part in (self.process, self.product):
            for attribute in ("inputs", "still", "ratios", "reads"):
                wrong = [name for name in getattr(part, attribute, None) or () if name not in names]
                if wrong:
                    raise ConfigError(
                        f"{type(part).__name__}.{attribute} names {wrong[0]!r}, which is no field of {self.name}; the "
                        f"fields are {', '.join(names)}"
                    )

    @cached_property
    def schema(self) -> Schema:
        """Its fields: the spots, what the product has, the time to expiry, and the rest of the process."""
        spots, rest = self.process.fields[: self.process.assets], self.process.fields[self.process.assets :]
        return Schema((*spots, *self.product.fields, EXPIRY, *rest))

    @property
    def name(self) -> str:
        """Both kinds."""
        return f"{self.process.kind} x {self.product.kind}"

    @property
    def title(self) -> str:
        """Both, as people write them."""
        return f"{self.product.title}s under {self.process.title}"

    def law(self, table: Tensor) -> Law:
        """What is known of the prices of a table of contracts. Shapes: (n, fields)."""
        return Law(self.process, self.schema.row(*table.unbind(dim=1)))

    def is_random(self, table: Tensor) -> Tensor:
        """Which contracts have an outcome that is not known today. Shapes: (n, fields) -> (n,)."""
        law = self.law(table)
        return law.c.T > 0 if not law.known else law.deviation > 0

    def certain_payoffs(self, table: Tensor) -> npt.NDArray[np.float64]:
        """What contracts pay whose prices are certain: those of their forwards. Shapes: (n, fields) -> (n,).

        Units: currency, discounted.
        """
        product, dates = self.product, max(1, self.product.dates)
        expected = self.law(table).paths(dates)
        prices = (expected[:, :, 0] if self.process.assets == 1 else expected).tolist()
        paid = np.empty(len(table))
        for row, (contract, path) in enumerate(zip(table.tolist(), prices, strict=True)):
            paid[row] = product.certain_payoff(path, self.schema.row(*contract))
        return paid + 0.0  # what is worth nothing is 0, not -0

    def check_steps(self, steps: int) -> None:
        """Raises: ConfigError for a number of time steps that has no step at some date of the product."""
        if self.product.dates and not self.product.continuous and steps % self.product.dates:
            raise ConfigError(
                f"timesteps is {steps}, and {self.product.kind} looks at the price on {self.product.dates} dates: give "
                f"a multiple of {self.product.dates}"
            )

    def default_steps(self, domain: Mapping[str, Any]) -> int:
        """Time steps that are enough for all contracts of a domain: as many as the process asks for, on all dates.

        `domain` gives each field's bounds, `lower` and `upper`.
        """
        contract = {field.name: float(domain[field.name].upper) for field in self.schema}

        def needed(contract: Mapping[str, float]) -> float:
            return contract[EXPIRY.name] / self.process.longest_step(self.schema.row(**contract))

        for field in self.process.fields:
            other = contract | {field.name: float(domain[field.name].lower)}
            if needed(other) > needed(contract):
                contract = other
        if self.product.continuous:  # which uses no dates
            finer = 1 if self.process.exact else _FINER_BETWEEN
            return max(_LEAST_BETWEEN, math.ceil(finer * needed(contract) - 1e-9))
        dates = max(1, self.product.dates)
        return dates * max(1, math.ceil(needed(contract) / dates - 1e-9))


def register(kind: Kind) -> Kind:
    """Make a process or a product known by its `kind`, so that a checkpoint that names it can be read.

    Raises: ConfigError if it has none, or another class has it already.
    """
    table: dict[str, Any] = _PROCESSES if issubclass(kind, Process) else _PRODUCTS
    name = getattr(kind, "kind", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"{kind.__name__}.kind is {name!r}: it must be a name of letters, digits and '_'")
    known = table.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(f"the kind {name!r} is {known.__module__}.{known.__qualname__} already")
    table[name] = kind
    return kind


def process_of(settings: Mapping[str, Any]) -> Process:
    """The process that settings with a `kind` describe. Raises: ConfigError for an unknown kind or setting."""
    return _made("process", _PROCESSES, settings)  # type: ignore[return-value]


def product_of(settings: Mapping[str, Any]) -> Product:
    """The product that settings with a `kind` describe. Raises: ConfigError for an unknown kind or setting."""
    return _made("product", _PRODUCTS, settings)  # type: ignore[return-value]


def known_fields() -> tuple[str, ...]:
    """The names of the fields of every process and product that is known."""
    kinds: list[type[Process] | type[Product]] = [*_PROCESSES.values(), *_PRODUCTS.values()]
    fields = ((kind.largest() or kind).fields for kind in kinds)
    return tuple(dict.fromkeys([*(field.name for some in fields for field in some), EXPIRY.name]))


def _made(what: str, table: Mapping[str, Any], settings: Mapping[str, Any]) -> Process | Product:
    name = str(settings.get("kind"))
    if name not in table:
        raise ConfigError(
            f"there is no {what} of the kind {name!r}: there are {', '.join(table)}; register your own with "
            f"smc.problem.problem.register before what names it is read: commands take its file as --models FILE"
        )
    try:
        made: Process | Product = table[name](**{key: value for key, value in settings.items() if key != "kind"})
    except ValidationError as error:
        wrong = error.errors()[0]
        setting = ".".join(str(part) for part in wrong["loc"])
        if not setting:  # of settings that do not go together
            raise ConfigError(f"{what} {name}: {wrong['msg'].removeprefix('Value error, ')}") from None
        kind = table[name]
        dateless = issubclass(kind, Product) and not kind.looks_at_dates()
        settings_of = ", ".join(key for key in kind.model_fields if not (dateless and key == "dates")) or "none"
        allowed = f"; its settings: {settings_of}" if wrong["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{what} {name}: {setting}: {wrong['msg']}, got {wrong['input']!r}{allowed}") from None
    return made


EUROPEAN_PUT = Problem(GeometricBrownianMotion(), EuropeanPut())
"""What everything is about unless something else is asked for."""

for _kind in (
    GeometricBrownianMotion,
    Heston,
    Bates,
    ConstantElasticity,
    OneFactorGBM,
    CorrelatedGBM,
    LiftedRoughHeston,
    ArithmeticAsianCall,
    ArithmeticAsianPut,
    ArithmeticAsianFloatingCall,
    ArithmeticAsianFloatingPut,
    GeometricAsianCall,
    GeometricAsianPut,
    GeometricAsianFloatingCall,
    GeometricAsianFloatingPut,
    AssetOrNothingCall,
    AssetOrNothingPut,
    Autocallable,
    BasketCall,
    BasketPut,
    BermudanCall,
    BermudanMaxCall,
    BermudanPut,
    BestOfCall,
    BestOfPut,
    CashOrNothingCall,
    CashOrNothingPut,
    Cliquet,
    DigitalPut,
    DoubleKnockOutCall,
    DoubleKnockOutPut,
    DownAndInCall,
    DownAndInPut,
    DownAndOutCall,
    DownAndOutPut,
    EuropeanCall,
    EuropeanPut,
    FloatingLookbackCall,
    FloatingLookbackPut,
    ForwardStartCall,
    ForwardStartPut,
    LookbackCall,
    LookbackPut,
    SpreadCall,
    SpreadPut,
    Straddle,
    TerminalPrice,
    UpAndInCall,
    UpAndInPut,
    UpAndOutCall,
    UpAndOutPut,
    WorstOfAutocallable,
    WorstOfCall,
    WorstOfPut,
):
    register(_kind)
