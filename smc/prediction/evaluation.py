"""How far a trained pricer is from the closed form, contract by contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from smc.problem.contracts import BoundSpec, ContractsLike, columns
from smc.problem.oracles import black_scholes
from smc.problem.oracles.black_scholes import Greeks, OptionKind
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.levels import PayoffDistribution

__all__ = ["QUANTITIES", "Measure", "Predicts", "evaluate", "objective_value", "price_error"]

Array = npt.NDArray[np.float64]

# Below this, in units of spot for a volatility of 1.00, a price hardly depends on volatility and implies none.
_LEAST_VEGA = 0.02
_TAIL = 0.975
# The sample on which trials of a search are compared.
_OBJECTIVE_CONTRACTS = 2048
_OBJECTIVE_SEED = 20_261_124


class Predicts(Protocol):
    """What can be measured: a pricer, or a predictor."""

    @property
    def domain(self) -> Mapping[str, BoundSpec]:
        """What it was trained on."""
        ...

    def predict_price(self, contracts: ContractsLike | Tensor, kind: OptionKind = "put") -> Array | Tensor:
        """Present values. Shapes: -> (n,)."""
        ...

    def predict_distribution(self, contracts: ContractsLike | Tensor, kind: OptionKind = "put") -> PayoffDistribution:
        """Distributions of the discounted payoff. Shapes: -> levels (n, N)."""
        ...

    def predict_greeks(self, contracts: ContractsLike | Tensor, kind: OptionKind = "put") -> Greeks:
        """Derivatives of the price. Shapes: -> five of (n,)."""
        ...


@dataclass(frozen=True)
class Measure:
    """One quantity over a sample of contracts: learnt minus exact.

    Shapes: errors (n,), NaN where the quantity does not exist. `size` is the mean magnitude of the exact quantity
    where the error is not already on a scale that says enough, None otherwise.
    """

    name: str
    unit: str
    errors: Array
    size: float | None = None

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
    def relative(self) -> float | None:
        """The RMSE as a share of the quantity's mean magnitude."""
        return None if self.size is None else self.rmse / self.size


QUANTITIES: Final = (
    "price", "implied volatility", "delta", "gamma", "vega", "theta", "rho",
    "W2, put", "CVaR97.5, put", "W2, call", "CVaR97.5, call",
)  # fmt: skip
"""What is measured, by name."""


def evaluate(pricer: Predicts, contracts: Array) -> dict[str, Measure]:
    """Every quantity that a pricer predicts, against its exact value, by name.

    Prices and distributions are compared in basis points of each contract's spot; W2 is the Wasserstein distance of
    the levels, never negative; Greeks are the put's. Shapes: (n, 6), at least one of them with a volatility to imply.
    """
    return {measure.name: measure for measure in _measures(pricer, contracts)}


def objective_value(pricer: Predicts, quantity: str) -> float:
    """The RMSE of one quantity over a sample of the pricer's domain that is always the same."""
    contracts = SobolSampler(pricer.domain, seed=_OBJECTIVE_SEED).sample(_OBJECTIVE_CONTRACTS)
    return evaluate(pricer, contracts)[quantity].rmse


def price_error(pricer: Predicts, contracts: Array) -> Measure:
    """The first of these alone: the put's price. Shapes: (n, 6)."""
    return _of_price(contracts, np.asarray(pricer.predict_price(contracts)))


def _of_price(contracts: Array, learnt: Array) -> Measure:
    return Measure("price", "bp of spot", (learnt - black_scholes.price(contracts)) / columns(contracts).X0 * 1e4)


def _measures(pricer: Predicts, contracts: Array) -> Iterator[Measure]:
    c = columns(contracts)
    basis = 1e4 / c.X0
    learnt = np.asarray(pricer.predict_price(contracts))
    yield _of_price(contracts, learnt)
    greeks, exact = pricer.predict_greeks(contracts), black_scholes.greeks(contracts)
    implied = black_scholes.implied_volatility(contracts, learnt) - c.v
    sensitive = exact.vega >= _LEAST_VEGA * c.X0
    yield Measure("implied volatility", "bp", np.where(sensitive, implied, np.nan) * 1e4)
    for name, ours, theirs in zip(exact._fields, greeks, exact, strict=True):
        yield Measure(name, "", ours - theirs, float(np.abs(theirs).mean()))
    kinds: tuple[black_scholes.OptionKind, ...] = ("put", "call")
    for kind in kinds:
        distribution = pricer.predict_distribution(contracts, kind)
        levels = distribution.host_levels
        averages = black_scholes.payoff_bin_averages(contracts, levels.shape[1], kind)
        yield Measure(f"W2, {kind}", "bp of spot", np.sqrt(np.square(levels - averages).mean(axis=1)) * basis)
        tail = black_scholes.cvar(contracts, _TAIL, kind)
        size = float((tail * basis).mean()) if kind == "call" else None
        yield Measure(f"CVaR97.5, {kind}", "bp of spot", (distribution.cvar(_TAIL) - tail) * basis, size)
