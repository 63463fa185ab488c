"""Payoffs under geometric Brownian motion that are known to a dozen digits, in closed form or by recursion.

Nothing here is shared with the engine. What is looked at on dates is a recursion from date to date, each an integral
against a Gaussian: the first and the last step are in closed form, those between by Gauss-Legendre quadrature on panels
of a step's own width, which is exact to rounding for what is smooth on that scale. A contract takes milliseconds with
50 dates and seconds with 365.

Sources: barriers, Broadie and Yamamoto, "A double-exponential fast Gauss transform algorithm for pricing discrete
path-dependent options" (2005); averages, Carverhill and Clewlow, "Flexible convolution" (1990), Benhamou (2002), those
that are a strike, Henderson and Wojakowski, "On the equivalence of floating- and fixed-strike Asian options" (2002);
the highest of prices on dates, Lindley, "The theory of queues with a single server" (1952), as Spitzer's identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from smc.errors import ConfigError
from smc.problem.contracts import ContractsLike, contract_array
from smc.problem.oracles import closed_forms, structured
from smc.problem.oracles.closed_forms import black
from smc.problem.oracles.quadrature import (
    REACH,
    Unresolved,
    certain,
    normal_density,
    panels,
    reached,
    step_of,
    within,
)
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import BARRIERS
from smc.problem.products.bermudan import BermudanCall, BermudanPut
from smc.problem.products.cliquet import Cliquet
from smc.problem.products.double_barrier import DoubleKnockOutCall, DoubleKnockOutPut
from smc.problem.products.floating_asian import ArithmeticAsianFloatingCall, ArithmeticAsianFloatingPut
from smc.problem.products.lookback import LOOKBACKS

__all__ = ["RECURSIONS", "is_slow", "price", "two_valued_levels", "two_valued_tail"]

Array = npt.NDArray[np.float64]

# Dates by which the integral of the price is approximated, each twice as many; what is left falls as their fourth,
# eighth ... power.
_ROMBERG = (8, 16, 32, 64, 128)
# Dates from which on a recursion takes its time.
_MANY_DATES = 128


def price(problem: Problem, contracts: ContractsLike) -> Array:
    """Present values; NaN where the formula loses its digits. Shapes: n contracts -> (n,). Units: currency.

    Raises: ConfigError for a problem that has no formula here.
    """
    if isinstance(problem.process, GeometricBrownianMotion):
        table, product = contract_array(contracts, problem.schema), problem.product
        if (known := closed_forms.price(problem, table)) is not None:
            return known
        recursion = next((of for kind, of in RECURSIONS if type(product) is kind), None)
        if recursion is not None:
            rows = (problem.schema.row(*row) for row in table.tolist())

            def of(c: Any) -> float:
                try:
                    return math.exp(-c.r * c.T) * recursion(product, c)
                except Unresolved:
                    return math.nan

            return np.array([of(c) for c in rows])
    raise ConfigError(f"there is no formula here for {problem.name}")


def is_slow(product: Product) -> bool:
    """Whether a contract takes a tenth of a second or more."""
    over_time = getattr(product, "over", "") == "time" and not closed_forms.has_formula(product)
    return over_time or isinstance(product, Cliquet) or product.dates > _MANY_DATES


def two_valued_levels(prices: Array, most: Array, size: int) -> Array:
    """Means over equal slices of the quantile function of what pays nothing or `most`.

    Shapes: (n,), (n,) -> (n, size).
    """
    edges, most = np.linspace(0.0, 1.0, size + 1)[1:], most[:, None]
    return np.asarray(most * np.clip((edges - (1 - prices[:, None] / most)) * size, 0.0, 1.0))


def two_valued_tail(prices: Array, most: Array, u: float) -> Array:
    """Mean beyond the u quantile of what pays nothing or `most`. Shapes: (n,), (n,) -> (n,)."""
    return np.asarray(np.minimum(prices / (1 - u), most))


# --- barriers ---------------------------------------------------------------------------------------------


def _in_corridor(product: Any, c: Any, low: float, high: float, payoff: str, rebate: float) -> float:
    """What is paid where the price stays in a corridor on all dates, and a rebate on the date on which it does not.

    Of payoffs, 'option' or 'one'. Not discounted, but rebates are worth more for coming earlier.
    """
    drift, s = step_of(c, product.dates)
    grown = math.exp(c.r * c.T / product.dates)
    sign, at = (1.0 if product.option == "call" else -1.0), math.log(c.K / c.X0)

    def last(x: Array) -> Array:
        """One step before expiry."""
        chance = within(x, drift, s, low, high)[1]
        if payoff == "one":
            return chance
        bottom, top = (max(low, at), high) if sign > 0 else (low, min(high, at))
        value = rebate * (1 - chance)
        if bottom < top:
            asset, cash = within(x, drift, s, bottom, top)
            value = value + sign * (c.X0 * asset - c.K * cash)
        return np.asarray(value)

    if product.dates == 1:
        return float(last(np.zeros(1))[0])
    least, most = reached(c, product.dates)
    if low >= most or high <= least:  # nothing is left in the corridor to speak of
        least, most = low, high
    nodes, weights = panels(max(low, least), min(high, most), s)
    step = normal_density(nodes[None, :] - nodes[:, None] - drift, s) * weights
    leaves = 1 - within(nodes, drift, s, low, high)[1]
    value, worth = last(nodes), rebate
    for _ in range(product.dates - 2):
        worth *= grown
        value = step @ value + worth * leaves
    first = normal_density(nodes - drift, s) * weights
    leaving = 1 - within(np.zeros(1), drift, s, low, high)[1]
    return float(first @ value + worth * grown * leaving[0])


def _barrier(product: Any, c: Any) -> float:
    if (known := certain(product, c)) is not None:
        return known
    low, high = (-math.inf, math.log(c.H)) if product.up else (math.log(c.H), math.inf)
    if product.out:
        return _in_corridor(product, c, low, high, "option", product.rebate)
    sign = 1.0 if product.option == "call" else -1.0
    whole = float(black(c.X0 * math.exp((c.r - c.d) * c.T), c.K, c.v * math.sqrt(c.T), sign))
    value = max(whole - _in_corridor(product, c, low, high, "option", 0.0), 0.0)
    if product.rebate:
        value += product.rebate * _in_corridor(product, c, low, high, "one", 0.0)
    return value


def _double_barrier(product: Any, c: Any) -> float:
    if (known := certain(product, c)) is not None:
        return known
    return _in_corridor(product, c, math.log(c.L), math.log(c.H), "option", 0.0)


# --- averages ---------------------------------------------------------------------------------------------


def _asian(product: Any, c: Any) -> float:
    if (known := certain(product, c)) is not None:
        return known
    if product.over == "time":
        return _romberg(lambda dates: _time_average(product.sign, c, c.K, dates))
    sign = product.sign
    return _average(c.X0, c.K - product.first * c.X0, c, product.dates, product.each, 1.0, sign)


def _time_average(sign: float, c: Any, strike: float, dates: int) -> float:
    """By the trapezoidal rule."""
    return _average(c.X0, strike - 0.5 * c.X0 / dates, c, dates, 1.0 / dates, 0.5, sign)


def _romberg(of: Callable[[int], float]) -> float:
    """The limit for many dates of what has an error in even powers of their distance."""
    row = [of(dates) for dates in _ROMBERG]
    power = 4.0
    while len(row) > 1:
        row = [fine + (fine - coarse) / (power - 1) for coarse, fine in pairwise(row)]
        power *= 4
    return row[0]


def _average(X0: float, K: float, c: Any, dates: int, each: float, last: float, sign: float) -> float:
    """An option on the weighted sum of the prices, `each` for a date, and `last` times that for the last one.

    The sum of the prices is S_1 (1 + e^R_2 (1 + e^R_3 (...))); its brackets have densities, the innermost first.
    """
    drift, s = step_of(c, dates)
    if K <= 0:
        times = (c.r - c.d) * c.T * np.arange(1, dates + 1) / dates
        weights = np.append(np.ones(dates - 1), last)
        return (X0 * each * float(weights @ np.exp(times)) - K) if sign > 0 else 0.0

    def payoff(y: Array) -> Array:
        """Given what the first price is multiplied by, e^y each, the option is Black's."""
        return black(X0 * each * np.exp(y + drift + s * s / 2), K, np.full_like(y, s), sign)

    if dates == 1:
        return float(payoff(np.full(1, math.log(last)))[0])
    # L_k = R_k + ln(1 + e^L_(k+1)), from the last date to the second.
    mean, deviation = drift + math.log(last), s
    nodes, weights = panels(mean - REACH * deviation, mean + REACH * deviation, s)
    density = normal_density(nodes - mean, s)
    for _ in range(dates - 2):
        shifted, share = np.logaddexp(0.0, nodes), math.exp(mean - np.logaddexp(0.0, mean))
        mean, deviation = drift + float(np.logaddexp(0.0, mean)), math.hypot(s, share * deviation)
        # The logarithm of a sum leans to the right: its mean lies a little above that of its parts.
        later, later_weights = panels(mean - REACH * deviation, mean + (REACH + 2) * deviation, s)
        density = normal_density(later[:, None] - shifted[None, :] - drift, s) @ (weights * density)
        nodes, weights = later, later_weights
    return float((weights * density) @ payoff(np.logaddexp(0.0, nodes)))


def _floating_asian(product: Any, c: Any) -> float:
    """With the last price as the unit of account, prices over it are those of a path backwards, r and d exchanged."""
    if (known := certain(product, c)) is not None:
        return known
    back, sign = c._replace(r=c.d, d=c.r, X0=1.0), -product.sign
    forward = c.X0 * math.exp((c.r - c.d) * c.T)
    if product.over == "time":
        return forward * _romberg(lambda dates: _time_average(sign, back, 1.0, dates))
    n, each = product.dates, product.each
    # Backwards the last date comes first, at a ratio of 1, and today's price, if it counts, comes last.
    left = n if product.with_today else n - 1
    if left == 0:
        return max(-sign * (1 - each), 0.0) * forward
    return forward * _average(1.0, 1.0 - each, back._replace(T=c.T * left / n), left, each, 1.0, sign)


# --- extremes ---------------------------------------------------------------------------------------------


def _lookback(product: Any, c: Any) -> float:
    """The highest of n sums of steps has the law of a queue: W_(i+1) = max(0, W_i + step). The lowest is a mirror."""
    if (known := certain(product, c)) is not None:
        return known
    way, (drift, s) = product.way, step_of(c, product.dates)
    drift, extreme, forward = way * drift, c.M * c.X0, c.X0 * math.exp((c.r - c.d) * c.T)
    level = extreme
    if not product.floating:
        level = max(extreme, c.K) if product.highest else min(extreme, c.K)

    def beyond(x: Array) -> Array:
        """How far the extreme will be beyond the level, one step before expiry."""
        mean = c.X0 * np.exp(way * (x + drift) + s * s / 2)
        return black(mean, level, np.full_like(x, s), way)

    atom, nodes, weights = 1.0, np.zeros(0), np.zeros(0)
    density = np.zeros(0)
    if product.dates > 1:
        reach = REACH * s * math.sqrt(product.dates) + abs(drift) * product.dates
        nodes, weights = panels(0.0, reach, s)
        atom, density = float(ndtr(-drift / s)), normal_density(nodes - drift, s)
        step = normal_density(nodes[:, None] - nodes[None, :] - drift, s) * weights
        ends = ndtr(-(nodes + drift) / s) * weights
        for _ in range(product.dates - 2):
            atom, density = (
                atom * float(ndtr(-drift / s)) + float(ends @ density),
                atom * normal_density(nodes - drift, s) + step @ density,
            )
    expected = atom * float(beyond(np.zeros(1))[0]) + float((weights * density) @ beyond(nodes))
    if product.floating:
        return float(way * (extreme - forward) + expected)
    return float(max(way * (extreme - c.K), 0.0) + expected)


RECURSIONS: tuple[tuple[type, Callable[[Any, Any], float]], ...] = (
    *((kind, _barrier) for kind in BARRIERS),
    *((kind, _double_barrier) for kind in (DoubleKnockOutCall, DoubleKnockOutPut)),
    *((kind, _asian) for kind in (ArithmeticAsianPut, ArithmeticAsianCall)),
    *((kind, _floating_asian) for kind in (ArithmeticAsianFloatingCall, ArithmeticAsianFloatingPut)),
    *((kind, _lookback) for kind in LOOKBACKS),
    (Autocallable, structured.autocallable),
    (Cliquet, structured.cliquet),
    *((kind, structured.bermudan) for kind in (BermudanPut, BermudanCall)),
)
"""Expected payoffs, not discounted, of products and one contract each."""
