"""Which reference a problem has: what is known exactly of its prices, sensitivities and distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from smc.problem.oracles import basket, black_scholes, cev, closed_forms, heston, log_normal, rainbow
from smc.problem.oracles.black_scholes import Greeks, OptionKind
from smc.problem.problem import Problem
from smc.problem.process import Process
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import SeveralAssets
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.product import Product
from smc.problem.products.asset_or_nothing import AssetOrNothingCall, AssetOrNothingPut
from smc.problem.products.basket import BasketCall, BasketPut
from smc.problem.products.cash_or_nothing import CashOrNothingCall, CashOrNothingPut
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.extremes import BestOfCall, BestOfPut, WorstOfCall, WorstOfPut
from smc.problem.products.spread import SpreadCall, SpreadPut
from smc.problem.products.straddle import Straddle

__all__ = ["Oracle", "greeks_by_differences", "oracle_of"]

Array = npt.NDArray[np.float64]

# Of a value that is moved for a difference, relative to itself; and of an interest rate, which may be 0.
_SHARE, _RATE_STEP = 1e-3, 1e-4


@dataclass(frozen=True)
class Oracle:
    """What is known of a problem's answers. Each function takes contracts as a table; what is None is not known.

    Shapes: prices (n,); levels (n, N), the payoff's quantile function over equal slices of probability; tails (n,), the
    mean payoff beyond a level; implied volatilities (n,), of contracts and prices, NaN where there is none. `kinds` are
    the options that levels and tails are known of, the priced one first.
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
    slow: bool = False
    """Whether it takes a tenth of a second or more."""


def oracle_of(problem: Problem) -> Oracle | None:
    """A problem's oracle; None where there is none but a simulation."""
    for processes, products, make in _ORACLES:
        if type(problem.process) in processes and type(problem.product) in products:
            return make(problem)
    if isinstance(problem.process, SeveralAssets):
        if type(problem.product) in (BasketPut, BasketCall):
            return _of_basket(problem)
        if type(problem.product) in _OF_TWO and problem.process.assets == 2:
            return _of_two(problem)
    return None


def _option(problem: Problem) -> OptionKind:
    option = problem.product.option
    assert option is not None
    return option


def _black_scholes(problem: Problem) -> Oracle:
    own = _option(problem)
    return Oracle(
        "closed form",
        ("put", "call") if own == "put" else ("call", "put"),
        lambda table: black_scholes.price(table, own),
        lambda table: black_scholes.greeks(table, own),
        black_scholes.payoff_bin_averages,
        black_scholes.cvar,
        lambda table, prices: black_scholes.implied_volatility(table, prices, own),
    )


def _fourier(problem: Problem) -> Oracle:
    own = _option(problem)

    def price(table: Array) -> Array:
        return heston.price(problem.schema.row(*table.T), own)

    def greeks(table: Array) -> Greeks:
        c = problem.schema.row(*table.T)
        theta = -_slope(problem, price, table, "T")
        return Greeks(
            heston.delta(c, own), heston.gamma(c), heston.price_by_variance(c), theta, heston.rho(c, own)
        )  # fmt: skip

    return Oracle("Fourier inversion", (own,), price, greeks, implied_volatility=_implied(problem))


def _chi_square(problem: Problem) -> Oracle:
    own = _option(problem)

    def price(table: Array) -> Array:
        return cev.price(problem.schema.row(*table.T), own)

    greeks = partial(greeks_by_differences, problem, price)
    return Oracle("closed form", (own,), price, greeks, implied_volatility=_implied(problem))


def _log_normal(problem: Problem) -> Oracle:
    """A formula or a recursion under geometric Brownian motion."""
    price = partial(log_normal.price, problem)
    greeks = partial(greeks_by_differences, problem, price)
    dear = not closed_forms.has_formula(problem.product)
    about = "recursion from date to date" if dear else "closed form"
    slow = dear and log_normal.is_slow(problem.product)
    return Oracle(about, (problem.product.option,), price, greeks, dear=dear, slow=slow)


def _two_valued(problem: Problem) -> Oracle:
    by_price = _log_normal(problem) if isinstance(problem.process, GeometricBrownianMotion) else _of_terminal(problem)
    product, price = problem.product, by_price.price
    amount = product.cash if isinstance(product, CashOrNothingCall) else 1.0

    def most(table: Array) -> Array:
        c = problem.schema.row(*table.T)
        return np.asarray(amount * np.exp(-c.r * c.T))

    def levels(table: Array, size: int, of: Any) -> Array:
        return log_normal.two_valued_levels(price(table), most(table), size)

    def tail(table: Array, u: float, of: Any) -> Array:
        return log_normal.two_valued_tail(price(table), most(table), u)

    return Oracle(by_price.about, (product.option,), price, by_price.greeks, levels, tail)


def _of_terminal(problem: Problem) -> Oracle:
    """Straddles and digitals from prices and deltas of European options.

    Prices scale with the spot: a call is X0 delta less K times the probability of exercise.
    """
    product, option = problem.product, problem.product.option or "call"

    def price(table: Array) -> Array:
        c = problem.schema.row(*table.T)
        if isinstance(product, Straddle):
            return heston.price(c, "call") + heston.price(c, "put")
        asset = np.abs(c.X0 * heston.delta(c, option))
        if isinstance(product, AssetOrNothingCall):
            return asset
        amount = product.cash if isinstance(product, CashOrNothingCall) else 1.0
        less = asset - heston.price(c, option) if option == "call" else asset + heston.price(c, option)
        return np.asarray(amount * np.maximum(less / c.K, 0.0))

    priced = _where_random(problem, price)
    greeks = partial(greeks_by_differences, problem, priced)
    return Oracle("Fourier inversion", (product.option,), priced, greeks, dear=True)


def _where_random(problem: Problem, price: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A formula where something is random; elsewhere what is certain."""

    def priced(table: Array) -> Array:
        contracts = torch.from_numpy(table)
        random = problem.is_random(contracts).numpy()
        found = np.empty(len(table))
        if random.any():
            found[random] = price(table[random])
        found[~random] = problem.certain_payoffs(contracts[torch.from_numpy(~random)])
        return found

    return priced


def _of_two(problem: Problem) -> Oracle:
    product, own = problem.product, _option(problem)

    def price(table: Array) -> Array:
        law = problem.law(torch.from_numpy(table))
        given = law.forwards.numpy(), law.covariances.numpy(), law.c.K.numpy()
        sign = 1.0 if own == "call" else -1.0
        if isinstance(product, BestOfCall):
            return np.asarray(law.discount.numpy() * rainbow.best_or_worst(*given, best=product.best, sign=sign))
        return np.asarray(law.discount.numpy() * rainbow.spread(*given, sign=sign))

    about = "closed form" if isinstance(product, BestOfCall) else "quadrature"
    return Oracle(about, (own,), _where_random(problem, price))


def _of_basket(problem: Problem) -> Oracle:
    own, product = _option(problem), problem.product
    assert isinstance(product, BasketPut)

    def price(table: Array) -> Array:
        law = problem.law(torch.from_numpy(table))
        forwards = law.forwards.numpy() * product.shares
        covariances, discounts = law.covariances.numpy(), law.discount.numpy()
        if problem.process.assets == 2:
            sign = 1.0 if own == "call" else -1.0
            return np.asarray(discounts * rainbow.sum_of_two(forwards, covariances, law.c.K.numpy(), sign=sign))
        rows = zip(forwards, covariances, law.c.K.numpy(), strict=True)
        return np.asarray(discounts * [basket.price(*row, own) for row in rows])

    if problem.process.assets == 2:
        return Oracle("quadrature", (own,), _where_random(problem, price))
    return Oracle("quadrature", (own,), price, dear=True)


_EUROPEAN: tuple[type[Product], ...] = (EuropeanPut, EuropeanCall)
_CASH: tuple[type[Product], ...] = (DigitalPut, CashOrNothingCall, CashOrNothingPut)
_AT_EXPIRY: tuple[type[Product], ...] = (Straddle, AssetOrNothingCall, AssetOrNothingPut)
_OF_TWO: tuple[type[Product], ...] = (SpreadCall, SpreadPut, BestOfCall, BestOfPut, WorstOfCall, WorstOfPut)

_ORACLES: tuple[tuple[tuple[type[Process], ...], tuple[type[Product], ...], Callable[[Problem], Oracle]], ...] = (
    ((GeometricBrownianMotion,), _EUROPEAN, _black_scholes),
    ((GeometricBrownianMotion, Heston, Bates), _CASH, _two_valued),
    ((GeometricBrownianMotion,), tuple(kind for kind, _ in closed_forms.FORMULAS), _log_normal),
    ((GeometricBrownianMotion,), tuple(kind for kind, _ in log_normal.RECURSIONS), _log_normal),
    ((Heston, Bates), _EUROPEAN, _fourier),
    ((Heston, Bates), _AT_EXPIRY, _of_terminal),
    ((ConstantElasticity,), _EUROPEAN, _chi_square),
)


def _implied(problem: Problem) -> Callable[[Array, Array], Array]:
    """The volatility of geometric Brownian motion that gives the same price."""

    def implied(table: Array, prices: Array) -> Array:
        c = problem.schema.row(*table.T)
        plain = np.stack([c.X0, c.K, c.T, c.r, c.d, np.ones_like(c.T)], axis=1)
        return black_scholes.implied_volatility(plain, prices, _option(problem))

    return implied


def greeks_by_differences(problem: Problem, price: Callable[[Array], Array], table: Array) -> Greeks:
    """Sensitivities of a price that is exact to a dozen digits, by central differences.

    What the product gives as a ratio to the spot is a price in the contract, and stays where it is as the spot moves.
    Shapes: (n, fields) -> five of (n,).
    """
    schema, spot = problem.schema, problem.process.fields[0].name
    volatility = problem.process.volatility
    assert volatility is not None
    base, side = price(table), _side(problem, table)
    near, far = (_moved(problem, price, table, spot, share * _SHARE) for share in
                 (np.where(side == 0, 1, side), np.where(side == 0, -1, 2 * side)))  # fmt: skip
    step = _SHARE * table[:, schema.column(spot)]
    delta = np.where(side == 0, near - far, side * (4 * near - far - 3 * base)) / (2 * step)
    gamma = np.where(side == 0, near - 2 * base + far, base - 2 * near + far) / step**2
    rates = [_moved(problem, price, table, "r", step=way * _RATE_STEP) for way in (1, -1)]
    vega, theta = (_slope(problem, price, table, name) for name in (volatility, "T"))
    return Greeks(delta, gamma, vega, -theta, (rates[0] - rates[1]) / (2 * _RATE_STEP))


def _side(problem: Problem, table: Array) -> Array:
    """To which side the spot may be moved, 0 where to both: a ratio that it takes along has its limits.

    The highest price so far cannot be below today's. Shapes: -> (n,).
    """
    side = np.zeros(len(table))
    for name in problem.product.ratios:
        field = problem.schema[problem.schema.column(name)]
        ratio = table[:, problem.schema.column(name)]
        side = np.where(ratio / (1 + _SHARE) < field.least, -1.0, side)
        side = np.where(ratio / (1 - _SHARE) > field.most, 1.0, side)
    return side


def _moved(
    problem: Problem, price: Callable[[Array], Array], table: Array, name: str, share: Any = 0.0, step: float = 0.0
) -> Array:
    """Prices with one field moved by a share of itself, one for all contracts or one for each, or by a step."""
    schema, other = problem.schema, table.copy()
    column = schema.column(name)
    other[:, column] = other[:, column] * (1 + share) + step
    if name == problem.process.fields[0].name:
        for ratio in problem.product.ratios:
            other[:, schema.column(ratio)] /= 1 + share
    return price(other)


def _slope(problem: Problem, price: Callable[[Array], Array], table: Array, name: str) -> Array:
    width = 2 * _SHARE * table[:, problem.schema.column(name)]
    up, down = (_moved(problem, price, table, name, way * _SHARE) for way in (1, -1))
    return np.asarray((up - down) / width)
