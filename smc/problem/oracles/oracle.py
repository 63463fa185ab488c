"""Which reference a problem has: what is known exactly of its prices, sensitivities and distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smc.problem.oracles import black_scholes, heston, log_normal
from smc.problem.oracles.black_scholes import Greeks, OptionKind
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.barrier import DownAndOutCall, UpAndOutCall
from smc.problem.products.cash_or_nothing import CashOrNothingCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut

__all__ = ["Oracle", "greeks_by_differences", "oracle_of"]

Array = npt.NDArray[np.float64]

# Of a value that is moved for a difference, relative to itself; and of an interest rate, which may be 0.
_SHARE, _RATE_STEP = 1e-3, 1e-4


@dataclass(frozen=True)
class Oracle:
    """What is known of a problem's answers. Each function takes contracts as a table; what is None is not known.

    Shapes: prices (n,); levels (n, N), the payoff's quantile function over equal slices of probability; tails (n,), the
    mean payoff beyond a level. `kinds` are the options that levels and tails are known of, the priced one first.
    """

    about: str
    kinds: tuple[OptionKind | None, ...]
    price: Callable[[Array], Array]
    greeks: Callable[[Array], Greeks] | None = None
    levels: Callable[[Array, int, Any], Array] | None = None
    tail: Callable[[Array, float, Any], Array] | None = None
    implied_volatility: Callable[[Array, Array], Array] | None = None
    dear: bool = False
    """Whether an answer takes milliseconds a contract."""


def oracle_of(problem: Problem) -> Oracle | None:
    """A problem's oracle; None where there is none but a simulation."""
    kind = type(problem.product)
    if type(problem.process) is Heston and kind in (EuropeanPut, EuropeanCall):
        option: OptionKind = "put" if kind is EuropeanPut else "call"

        def by_fourier(table: Array) -> Array:
            return heston.price(problem.schema.row(*table.T), option)

        return Oracle("Fourier inversion", (option,), by_fourier)
    if type(problem.process) is not GeometricBrownianMotion:
        return None
    if kind in (EuropeanPut, EuropeanCall):
        own: OptionKind = "put" if kind is EuropeanPut else "call"
        return Oracle(
            "closed form",
            ("put", "call") if own == "put" else ("call", "put"),
            lambda table: black_scholes.price(table, own),
            lambda table: black_scholes.greeks(table, own),
            black_scholes.payoff_bin_averages,
            black_scholes.cvar,
            lambda table, prices: black_scholes.implied_volatility(table, prices, own),
        )
    if kind not in (
        DigitalPut, CashOrNothingCall, ArithmeticAsianPut, ArithmeticAsianCall, UpAndOutCall, DownAndOutCall
    ):  # fmt: skip
        return None

    def price(table: Array) -> Array:
        return log_normal.price(problem, table)

    def greeks(table: Array) -> Greeks:
        return greeks_by_differences(problem, price, table)

    if not isinstance(problem.product, DigitalPut):
        return Oracle("recursion from date to date", (problem.product.option,), price, greeks, dear=True)
    amount = problem.product.cash if isinstance(problem.product, CashOrNothingCall) else 1.0

    def most(table: Array) -> Array:
        c = problem.schema.row(*table.T)
        return np.asarray(amount * np.exp(-c.r * c.T))

    def levels(table: Array, size: int, of: Any) -> Array:
        return log_normal.two_valued_levels(price(table), most(table), size)

    def tail(table: Array, u: float, of: Any) -> Array:
        return log_normal.two_valued_tail(price(table), most(table), u)

    return Oracle("closed form", (problem.product.option,), price, greeks, levels, tail)


def greeks_by_differences(problem: Problem, price: Callable[[Array], Array], table: Array) -> Greeks:
    """Sensitivities of a price that is exact to a dozen digits, by central differences.

    What the product gives as a ratio to the spot is a price in the contract, and stays where it is as the spot moves.
    Shapes: (n, fields) -> five of (n,).
    """
    schema, product = problem.schema, problem.product
    spot = problem.process.fields[0].name
    base = price(table)

    def moved(name: str, share: float = 0.0, step: float = 0.0) -> Array:
        other = table.copy()
        column = schema.column(name)
        other[:, column] = other[:, column] * (1 + share) + step
        if name == spot:
            for ratio in product.ratios:
                other[:, schema.column(ratio)] /= 1 + share
        return price(other)

    def slope(name: str) -> Array:
        width = 2 * _SHARE * table[:, schema.column(name)]
        return np.asarray((moved(name, _SHARE) - moved(name, -_SHARE)) / width)

    up, down = moved(spot, _SHARE), moved(spot, -_SHARE)
    step = _SHARE * table[:, schema.column(spot)]
    rho = (moved("r", step=_RATE_STEP) - moved("r", step=-_RATE_STEP)) / (2 * _RATE_STEP)
    return Greeks((up - down) / (2 * step), (up - 2 * base + down) / step**2, slope("v"), -slope("T"), rho)
