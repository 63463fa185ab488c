"""What the network sees and says: features of a contract, and spectra on a scale of order one.

A price divided by its unit (of a put K df w), after the product's anchor (of a put a smooth intrinsic value) is taken
off bin 0, varies over the domain by a factor of a few instead of a thousand; each bin is then standardised. Raw inputs
and outputs cost three orders of magnitude in accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.problem.contracts import BoundSpec, resolve_domain
from smc.problem.law import Law
from smc.problem.problem import EUROPEAN_PUT, Problem
from smc.problem.product import Bounds
from smc.problem.schema import EXPIRY

__all__ = ["Scaling", "View", "features", "input_count", "intrinsic", "spread_of", "unit_of_price"]

# Widths, in standard deviations of the price's logarithm, over which moneyness is resolved.
_WIDTHS = (1.5, 3.0, 6.0)
# Total volatility below which prices hardly depend on it, but for their scale: ln w alone would spread these
# contracts, a few in a hundred, over a third of the feature's range, and gamma suffers.
_LEAST_VOLATILITY = 0.4
# Between weights equal in units of price (exponent 0) and in bp of spot (2): measured by benchmarks.accuracy.
_WEIGHT_EXPONENT: Final = 0.5


@dataclass(frozen=True)
class Scaling:
    """Per-bin mean and standard deviation of scaled spectra, measured on the first training contracts.

    Shapes: mean (bins, 2), its real and imaginary parts; spread (bins,). Part of every checkpoint: a model
    means nothing without it.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Scaling:
        """Measured on scaled spectra. Shapes: (n, bins, 2)."""
        spread = targets.var(dim=0).sum(dim=1).sqrt()
        # A bin that does not vary (the imaginary part of bin 0 never does) is still divided by something.
        floor = spread.max() * 1e-6 + torch.finfo(spread.dtype).tiny
        return cls(targets.mean(dim=0), spread.clamp(min=float(floor)))

    def to(self, device: torch.device) -> Scaling:
        """The same on another device."""
        return Scaling(self.mean.to(device), self.spread.to(device))

    def restore(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        """Network outputs to scaled spectra. Shapes: two of (n, bins) -> same."""
        return real * self.spread + self.mean[:, 0], imag * self.spread + self.mean[:, 1]


class View:
    """What the network sees of a problem's contracts, and the scale of what it says of them.

    It is the one home of that scale: labels are divided by `unit` and have `anchor` taken off their bin 0, predictions
    the other way round. Shapes: tables (n, fields) in double precision.
    """

    def __init__(self, problem: Problem, domain: Mapping[str, BoundSpec]) -> None:
        self.problem, self.domain = problem, domain
        process, product = problem.process, problem.product
        own = [field.name for field in process.fields]
        seen = own[process.assets :] if process.inputs is None else list(process.inputs)
        if product.inputs is None:  # nothing is known of how a price depends on its spots
            seen = [*own[: process.assets], *seen, *(field.name for field in product.fields)]
        else:
            seen += product.inputs
        self._standardised = [EXPIRY.name, *seen]

    def check(self) -> None:
        """Raises: ConfigError where features or scale of a contract at the domain's ends are no numbers."""
        names = self.problem.schema.names
        ends = [[getattr(self.domain[name], end) for name in names] for end in ("lower", "upper")]
        for contract in [*ends, *self.middle().tolist()]:
            table = torch.tensor([contract], dtype=torch.float64)
            unit = self.unit(table)
            found = {"features": self.features(table), "anchor": self.anchor(table), "unit": unit, "weight": 1 / unit}
            for what, values in found.items():
                if not bool(values.isfinite().all()) or bool((unit < 0).any()):
                    raise ConfigError(
                        f"{self.problem.name}: the {what} of {dict(zip(names, contract, strict=True))} is "
                        f"{values.flatten().tolist()}: it must be finite all over the domain, and the unit above 0"
                    )

    def features(self, table: Tensor) -> Tensor:
        """Log distances m, deviation w, ln(w + 0.4), tanh of each m / w on three scales, what product and process
        add, and the fields that stand for themselves, standardised over the domain.

        Of a put: m = ln(F / K), w = v sqrt(T), T, r, d. Shapes: (n, fields) -> (n, inputs).
        """
        law = self.problem.law(table)
        distances, w, more = (self._told(what, law) for what in ("distances", "width", "features"))
        more = (*more, *self._of_the_law(law))
        resolved = [torch.tanh(m / (width * w)) for m in distances for width in _WIDTHS]
        standard = [_standardised(getattr(law.c, name), self.domain[name]) for name in self._standardised]
        spread = torch.log(w + _LEAST_VOLATILITY)
        return torch.stack([*distances, w, spread, *resolved, *more, *standard], dim=1)

    def unit(self, table: Tensor) -> Tensor:
        """The scale of prices. Shapes: (n, fields) -> (n,). Units: currency."""
        unit: Tensor = self._told("unit", self.problem.law(table))
        return unit

    def anchor(self, table: Tensor) -> Tensor:
        """What is taken off the price, in units of `unit`. Shapes: (n, fields) -> (n,)."""
        anchor: Tensor = self._told("anchor", self.problem.law(table))
        return anchor

    def bounds(self, table: Tensor) -> Bounds:
        """What prices and payoffs cannot be beyond. Shapes: (n, fields) -> (n,) each."""
        bounds: Bounds = self._told("bounds", self.problem.law(table))
        return bounds

    def _told(self, what: str, law: Law) -> Any:
        """What the product says of contracts with this law. Raises: ConfigError naming the method that fails."""
        product = self.problem.product
        try:
            return getattr(product, what)(law)
        except Exception as error:  # it may be anybody's own
            where = f"{type(product).__name__}.{what} of {self.problem.name}"
            raise ConfigError(f"{where} fails: {type(error).__name__}: {error}") from error

    def _of_the_law(self, law: Law) -> tuple[Tensor, ...]:
        """What the process adds to the features. Raises: ConfigError if it fails."""
        process = self.problem.process
        try:
            return process.features(law.c)
        except Exception as error:  # it may be anybody's own
            where = f"{type(process).__name__}.features of {self.problem.name}"
            raise ConfigError(f"{where} fails: {type(error).__name__}: {error}") from error

    def weight(self, table: Tensor) -> Tensor:
        """How much a contract counts in the loss. Shapes: (n, fields) -> (n,)."""
        law = self.problem.law(table)
        weight: Tensor = (self.problem.product.unit(law) / self.problem.product.notionals(law)) ** _WEIGHT_EXPONENT
        return weight

    def moves(self, table: Tensor) -> Tensor:
        """How far each field is moved for a derivative: as far as the price can tell apart, or the domain reaches.

        Shapes: (n, fields) -> (n, fields).
        """
        law = self.problem.law(table)
        spots = [field.name for field in self.problem.process.fields[: self.problem.process.assets]]
        ones = torch.ones_like(law.c.T)
        moves = {}
        for field in self.problem.schema:
            value = getattr(law.c, field.name)
            if field.name in spots:
                moves[field.name] = value * law.deviation
            elif field.name in self.problem.product.still or field.name in self.problem.process.still:
                moves[field.name] = 0 * ones
            elif field.least == 0:  # what cannot be negative moves in proportion to itself
                moves[field.name] = value / 2
            else:
                moves[field.name] = spread_of(self.domain[field.name]) * ones
        return torch.stack([moves[name] for name in self.problem.schema.names], dim=1)

    def middle(self, rows: int = 1) -> Tensor:
        """The contract in the middle of the domain, so many times. Shapes: -> (rows, fields)."""
        middle = [(b.lower + b.upper) / 2 for b in (self.domain[name] for name in self.problem.schema.names)]
        return torch.tensor(middle, dtype=torch.float64).expand(rows, -1).contiguous()


@lru_cache(maxsize=64)
def input_count(problem: Problem) -> int:
    """How many features the network of a problem sees."""
    view = View(problem, resolve_domain({}, problem.schema))
    return view.features(view.middle()).shape[1]


def features(contracts: Tensor, domain: Mapping[str, BoundSpec]) -> Tensor:
    """Those of a European put under geometric Brownian motion. Shapes: (n, 6) -> (n, 9)."""
    return View(EUROPEAN_PUT, domain).features(contracts)


def unit_of_price(contracts: Tensor) -> Tensor:
    """K df w, the scale of a European put. Shapes: (n, 6) -> (n,). Units: currency."""
    return View(EUROPEAN_PUT, {}).unit(contracts)


def intrinsic(contracts: Tensor) -> Tensor:
    """Smooth intrinsic value of a European put in units of `unit_of_price`. Shapes: (n, 6) -> (n,)."""
    return View(EUROPEAN_PUT, {}).anchor(contracts)


def spread_of(bound: BoundSpec) -> float:
    """Standard deviation of a parameter that is uniform over its bounds."""
    return (bound.upper - bound.lower) / float(np.sqrt(12.0))


def _standardised(values: Tensor, bound: BoundSpec) -> Tensor:
    return (values - (bound.lower + bound.upper) / 2) / spread_of(bound)
