"""How far a trained pricer is from the best reference there is, contract by contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.learning.error_bars import LEVEL, ErrorBars
from smc.prediction.distribution import PayoffDistribution
from smc.prediction.duality import has_upper_bound, upper_bound
from smc.prediction.predictor import Kind
from smc.prediction.reference import Known, reference_of
from smc.problem.contracts import BoundSpec, ContractsLike
from smc.problem.law import Law
from smc.problem.oracles.black_scholes import Greeks
from smc.problem.problem import Problem
from smc.problem.sobol_sampler import SobolSampler

__all__ = [
    "QUANTITIES",
    "Coverage",
    "Measure",
    "Predicts",
    "coverage",
    "distance",
    "evaluate",
    "objective_value",
    "price_error",
]

Array = npt.NDArray[np.float64]

# Below this, in units of spot for a volatility of 1.00, a price hardly depends on volatility and implies none.
_LEAST_VEGA = 0.02
_TAIL = 0.975
# Contracts whose upper bound is simulated.
_BOUNDED = 16
# The sample on which trials of a search are compared.
_OBJECTIVE_CONTRACTS = 2048
_OBJECTIVE_SEED = 20_261_124


class Predicts(Protocol):
    """What can be measured: a pricer, or a predictor."""

    @property
    def problem(self) -> Problem:
        """What it was trained on."""
        ...

    @property
    def domain(self) -> Mapping[str, BoundSpec]:
        """The contracts that it was trained on."""
        ...

    @property
    def error_bars(self) -> ErrorBars | None:
        """How far off answers are likely to be, if that was measured."""
        ...

    def predict_error_bar(self, contracts: ContractsLike | Tensor) -> Array | Tensor:
        """Half-widths of the intervals around prices. Shapes: -> (n,)."""
        ...

    @property
    def distribution_kinds(self) -> tuple[Kind, ...]:
        """What there are distributions of."""
        ...

    def predict_price(self, contracts: ContractsLike | Tensor, kind: Kind = "learnt") -> Array | Tensor:
        """Present values. Shapes: -> (n,)."""
        ...

    def predict_distribution(self, contracts: ContractsLike | Tensor, kind: Kind = "learnt") -> PayoffDistribution:
        """Distributions of the discounted payoff. Shapes: -> levels (n, N)."""
        ...

    def predict_sensitivities(self, contracts: ContractsLike | Tensor, kind: Kind = "learnt") -> Any:
        """Derivatives of the price by every field. Shapes: -> (n,) each."""
        ...

    def predict_greeks(self, contracts: ContractsLike | Tensor, kind: Kind = "learnt") -> Greeks:
        """Derivatives of the price. Shapes: -> five of (n,)."""
        ...


@dataclass(frozen=True)
class Measure:
    """One quantity over a sample of contracts: learnt minus what it is compared with.

    Shapes: errors (n,), NaN where the quantity does not exist, or nothing to compare it with. `size` is the mean
    magnitude of the quantity where the error is not already on a scale that says enough, None otherwise. `reference`
    says what it was compared with, and `noise` the standard error of that where it was simulated, in the same unit.
    """

    name: str
    unit: str
    errors: Array
    size: float | None = None
    reference: str = "closed form"
    noise: float | None = None

    @property
    def count(self) -> int:
        """Contracts that were compared."""
        return int((~np.isnan(self.errors)).sum())

    @property
    def rmse(self) -> float:
        """Root of the mean squared error."""
        return float(np.sqrt(np.nanmean(np.square(self.errors))))

    @property
    def p99(self) -> float:
        """99th percentile of the error's magnitude."""
        return float(np.nanquantile(np.abs(self.errors), 0.99))

    @property
    def maximum(self) -> float:
        """The largest error."""
        return float(np.nanmax(np.abs(self.errors)))

    @property
    def worst(self) -> int:
        """The contract with the largest error."""
        return int(np.nanargmax(np.abs(self.errors)))

    @property
    def ranks(self) -> dict[str, int]:
        """Contracts from what is typical to the worst, by the size of their error."""
        order = np.argsort(np.abs(self.errors))[: self.count]
        shares = {"median": 0.5, "90th percentile": 0.9, "99th percentile": 0.99, "worst": 1.0}
        return {name: int(order[int(share * (len(order) - 1))]) for name, share in shares.items()}

    @property
    def known(self) -> str:
        """A word for what it was compared with."""
        return "exact" if self.noise is None else "simulated"

    @property
    def compared(self) -> str:
        """What it was compared with, in words."""
        if self.noise is None:
            return self.reference
        return f"{self.reference}, standard error {self.noise:.2g}" + (f" {self.unit}" if self.unit else "")

    @property
    def relative(self) -> float | None:
        """The RMSE as a share of the quantity's mean magnitude; None of a quantity that is always 0."""
        return self.rmse / self.size if self.size else None


QUANTITIES: Final = (
    "price", "implied volatility", "delta", "gamma", "vega", "theta", "rho",
    "gap to the upper bound", "W2, put", "CVaR97.5, put", "W2, call", "CVaR97.5, call", "W2", "CVaR97.5",
)  # fmt: skip
"""What is measured, by name; of distributions those of a put, of a call, or of a product that is neither."""


def evaluate(pricer: Predicts, contracts: Array) -> dict[str, Measure]:
    """Every quantity that a pricer predicts, against the problem's oracle or a large simulation, by name.

    Prices and distributions are compared in basis points of each contract's spot, or of what its product names; W2 is
    the Wasserstein distance of the levels, never negative; Greeks are those of what was learnt. Of what is simulated
    the first contracts are compared. Shapes: (n, fields).
    """
    return {measure.name: measure for measure in _measures(pricer, contracts)}


@dataclass(frozen=True)
class Coverage:
    """How many of the contracts that were compared have their price within its error bars.

    `width` is the median of the half-widths, in `unit`.
    """

    share: float
    count: int
    width: float
    unit: str

    @property
    def line(self) -> str:
        """In words."""
        return (
            f"error bars of {LEVEL:.0%}: {self.share:.1%} of {self.count:,} contracts lie within; in the median they "
            f"reach {self.width:.2g} {self.unit} to either side"
        )


def coverage(pricer: Predicts, contracts: Array) -> Coverage | None:
    """Whether error bars hold what they promise; None of a pricer that has none. Shapes: (n, fields)."""
    if pricer.error_bars is None or not pricer.error_bars.known:
        return None
    known, law = reference_of(pricer.problem).price(contracts), pricer.problem.law(torch.from_numpy(contracts))
    count = len(known.values)
    apart = np.abs(np.asarray(pricer.predict_price(contracts[:count])) - known.values)
    bars = np.asarray(pricer.predict_error_bar(contracts[:count]))
    told = ~np.isnan(apart)
    width = float(np.median(bars * 1e4 / pricer.problem.product.notionals(law).numpy()[:count]))
    return Coverage(float((apart <= bars)[told].mean()), int(told.sum()), width, _unit(pricer))


def distance(measures: Mapping[str, Measure]) -> Measure:
    """How far the distributions are of what was learnt."""
    return next(measure for name, measure in measures.items() if name.startswith("W2"))


def objective_value(pricer: Predicts, quantity: str) -> float:
    """The RMSE of one quantity over a sample of the pricer's domain that is always the same.

    Raises: ConfigError for one that the pricer's problem does not have.
    """
    sampler = SobolSampler(pricer.domain, seed=_OBJECTIVE_SEED, schema=pricer.problem.schema)
    names = []
    for measure in _measures(pricer, sampler.sample(_OBJECTIVE_CONTRACTS)):
        if measure.name == quantity:
            return measure.rmse
        names.append(measure.name)
    raise ConfigError(f"{pricer.problem.name} has no {quantity!r} to measure; there are {'; '.join(names)}")


def price_error(pricer: Predicts, contracts: Array) -> Measure:
    """The first of these alone: the price of what was learnt. Shapes: (n, fields)."""
    return next(_measures(pricer, contracts))


def _measures(pricer: Predicts, contracts: Array) -> Iterator[Measure]:
    problem, reference = pricer.problem, reference_of(pricer.problem)
    law = problem.law(torch.from_numpy(contracts))
    basis = 1e4 / problem.product.notionals(law).numpy()
    unit = _unit(pricer)
    learnt = np.asarray(pricer.predict_price(contracts))
    yield _compared("price", unit, learnt, reference.price(contracts), basis)
    oracle = reference.oracle
    if oracle is not None and oracle.implied_volatility is not None:
        exact = oracle.implied_volatility(contracts, reference.price(contracts).values)
        implied = oracle.implied_volatility(contracts, learnt) - exact
        sensitive = _vega(law, exact) >= _LEAST_VEGA * law.spot.numpy()
        yield Measure("implied volatility", "bp", np.where(sensitive, implied, np.nan) * 1e4, reference=oracle.about)
    few = contracts[: reference.greeks_of]
    if oracle is not None and oracle.greeks is not None and len(few):
        greeks, known = pricer.predict_greeks(few), oracle.greeks(few)
        for name, ours, theirs in zip(known._fields, greeks, known, strict=True):
            yield Measure(
                name, "", _padded(ours - theirs, len(contracts)), float(np.nanmean(np.abs(theirs))), oracle.about
            )
    if has_upper_bound(problem):
        bound = upper_bound(problem, contracts[:_BOUNDED])
        apart = (bound.price - learnt[:_BOUNDED]) * basis[:_BOUNDED]
        noise = _root_mean_square(bound.standard_error * basis[:_BOUNDED])
        yield Measure("gap to the upper bound", unit, _padded(apart, len(contracts)), None, "duality", noise)
    yield from _of_distributions(pricer, contracts, basis, unit)


def _unit(pricer: Predicts) -> str:
    return f"bp of {pricer.problem.product.notional}"


def _vega(law: Law, volatility: Array) -> Array:
    """Of an option on a log-normal price with this volatility, discounted. Shapes: (n,) -> (n,)."""
    forward, c = law.forward.numpy(), law.c
    root = np.sqrt(c.T.numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        d1 = np.log(forward / c.K.numpy()) / (volatility * root) + volatility * root / 2
    return np.asarray(law.discount.numpy() * forward * root * np.exp(-d1 * d1 / 2) / np.sqrt(2 * np.pi))


def _of_distributions(pricer: Predicts, contracts: Array, basis: Array, unit: str) -> Iterator[Measure]:
    reference = reference_of(pricer.problem)
    oracle, option = reference.oracle, pricer.problem.product.option
    for kind in pricer.distribution_kinds:
        suffix = f", {kind}" if option is not None else ""
        distribution = pricer.predict_distribution(contracts, kind)
        size = distribution.levels.shape[1]
        if oracle is not None and oracle.levels is not None and oracle.tail is not None:
            known = Known(oracle.levels(contracts, size, kind), None, oracle.about)
            tail = oracle.tail(contracts, _TAIL, kind)
        else:
            known = reference.levels(contracts, size)
            tail = PayoffDistribution(known.values).cvar(_TAIL)
        count = len(known.values)
        apart = np.sqrt(np.square(distribution.host_levels[:count] - known.values).mean(axis=1))
        noise = None if known.noise is None else _root_mean_square(known.noise * basis[:count])
        away = _padded(apart * basis[:count], len(contracts))
        yield Measure(f"W2{suffix}", unit, away, None, known.about, noise)
        exact = Known(tail, None, known.about)
        size_of = None if kind == "put" else float(np.nanmean(tail * basis[:count]))
        yield _compared(f"CVaR97.5{suffix}", unit, distribution.cvar(_TAIL), exact, basis, size_of)


def _compared(
    name: str, unit: str, learnt: Array, known: Known, basis: Array, size: float | None = None
) -> Measure:  # fmt: skip
    count = len(known.values)
    errors = _padded((learnt[:count] - known.values) * basis[:count], len(learnt))
    noise = None if known.noise is None else _root_mean_square(known.noise * basis[:count])
    return Measure(name, unit, errors, size, known.about, noise)


def _padded(errors: Array, count: int) -> Array:
    return np.concatenate([errors, np.full(count - len(errors), np.nan)])


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.nanmean(np.square(values))))
