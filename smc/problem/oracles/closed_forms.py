"""Payoffs under geometric Brownian motion that are known in closed form. Nothing here is shared with the engine.

Sources: Haug, "The complete guide to option pricing formulas" (2007): forward start 2.5, lookbacks 4.15, barriers
4.17, binary options 4.19, geometric averages 4.20; double barriers, Ikeda and Kunitomo (1992).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtr

from smc.problem.problem import Problem
from smc.problem.product import Product
from smc.problem.products.asset_or_nothing import AssetOrNothingCall, AssetOrNothingPut
from smc.problem.products.barrier import BARRIERS, BarrierOption
from smc.problem.products.cash_or_nothing import CashOrNothingCall, CashOrNothingPut
from smc.problem.products.digital import DigitalPut
from smc.problem.products.double_barrier import DoubleKnockOutCall, DoubleKnockOutPut
from smc.problem.products.floating_asian import GeometricAsianFloatingCall, GeometricAsianFloatingPut
from smc.problem.products.forward_start import ForwardStartCall, ForwardStartPut
from smc.problem.products.geometric_asian import GeometricAsianCall, GeometricAsianPut
from smc.problem.products.lookback import LOOKBACKS, LookbackOption
from smc.problem.products.straddle import Straddle

__all__ = ["FORMULAS", "black", "has_formula", "price"]

Array = npt.NDArray[np.float64]

# Images of a double barrier on either side, beside the first: each is a corridor's width further off.
_IMAGES = 12
# The rounding of a double, and what all of it may be of the spot: what is less well known is none, NaN.
_ROUNDING, _MOST_ROUNDING = 2e-16, 1e-9
# The growth rate below which there is none, where one divides by it.
_LEAST_RATE = 1e-7


def price(problem: Problem, table: Array) -> Array | None:
    """Present values; None of a product that has no formula. Shapes: (n, fields) -> (n,). Units: currency."""
    product = problem.product
    if not has_formula(product):
        return None
    formula = next(of for kind, of in FORMULAS if type(product) is kind)
    c = problem.schema.row(*table.T)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.exp(-c.r * c.T) * formula(product, c) + 0.0)


def has_formula(product: Product) -> bool:
    """Whether there is a closed form; of what may be looked at on dates, only where it is looked at all the time."""
    known = any(type(product) is kind for kind, _ in FORMULAS)
    return known and (
        product.continuous or not isinstance(product, BarrierOption | LookbackOption | DoubleKnockOutCall)
    )


def black(forward: Any, strike: Any, deviation: Any, sign: float) -> Array:
    """Expected max(sign (S - K), 0) of a log-normal price, whose deviation may be 0. Shapes: (n,) each -> (n,)."""
    asset, cash = _chances(np.log(forward / strike), deviation, sign)
    return np.asarray(sign * (forward * asset - strike * cash))


def _chances(distance: Any, deviation: Any, sign: float) -> tuple[Array, Array]:
    """The chance that a log-normal price is beyond a strike, weighed by the price over its mean, and as it is.

    `distance` is the logarithm of forward over strike. Shapes: (n,) each -> two of (n,).
    """
    certain = sign * np.where(sign * distance > 0, np.inf, -np.inf)  # at the strike itself nothing is paid
    d1 = np.where(deviation > 0, distance / deviation + deviation / 2, certain)
    d2 = np.where(deviation > 0, distance / deviation - deviation / 2, certain)
    return ndtr(sign * d1), ndtr(sign * d2)


def _terms(c: Any) -> tuple[Array, Array]:
    """Forward, and deviation of the logarithm at expiry."""
    return c.X0 * np.exp((c.r - c.d) * c.T), c.v * np.sqrt(c.T)


# --- at expiry --------------------------------------------------------------------------------------------


def _sign(product: Any) -> float:
    return 1.0 if product.option == "call" else -1.0


def _cash(product: Any, c: Any) -> Array:
    forward, w = _terms(c)
    return np.asarray(getattr(product, "cash", 1.0) * _chances(np.log(forward / c.K), w, _sign(product))[1])


def _asset(product: Any, c: Any) -> Array:
    forward, w = _terms(c)
    return np.asarray(forward * _chances(np.log(forward / c.K), w, _sign(product))[0])


def _straddle(product: Any, c: Any) -> Array:
    forward, w = _terms(c)
    return black(forward, c.K, w, 1.0) + black(forward, c.K, w, -1.0)


def _forward_start(product: Any, c: Any) -> Array:
    forward, w = _terms(c)
    share = product.start / product.dates
    strike = c.m * c.X0 * np.exp((c.r - c.d) * c.T * share)
    return black(forward, strike, w * np.sqrt(1 - share), _sign(product))


# --- geometric averages -----------------------------------------------------------------------------------


def _geometric(product: Any, c: Any) -> tuple[Array, Array, Array]:
    """Mean of the average's logarithm, its variance, and its covariance with the logarithm of the last price.

    'time' is the integral itself, to which the dates are only an approximation.
    """
    variance, drift = c.v**2 * c.T, (c.r - c.d - c.v**2 / 2) * c.T
    if product.over == "time":
        mean, own, with_last = 0.5, 1.0 / 3.0, 0.5
    else:
        times = np.arange(1, product.dates + 1) / product.dates
        weight = product.each
        mean, with_last = weight * times.sum(), weight * times.sum()
        own = float(weight**2 * np.minimum(times[:, None], times).sum())
    return np.log(c.X0) + mean * drift, own * variance, with_last * variance


def _geometric_asian(product: Any, c: Any) -> Array:
    mean, variance, _ = _geometric(product, c)
    return black(np.exp(mean + variance / 2), c.K, np.sqrt(variance), _sign(product))


def _geometric_floating(product: Any, c: Any) -> Array:
    mean, variance, covariance = _geometric(product, c)
    forward, w = _terms(c)
    deviation = np.sqrt(np.maximum(variance + w**2 - 2 * covariance, 0.0))
    return black(forward, np.exp(mean + variance / 2), deviation, _sign(product))


# --- what is looked at all the time -----------------------------------------------------------------------


def _alive(product: Any, c: Any, payoff: str) -> Array:
    """Expected payoff where the barrier is not passed: of the 'option', or of 'one' unit of currency.

    By reflection: paths that pass are weighed images of paths from beyond the barrier.
    """
    way, (forward, w), sign = product.way, _terms(c), _sign(product)
    away, mean = np.log(c.H), (c.r - c.d) * c.T - w**2 / 2

    def part(shift: Any, weight: Any) -> tuple[Array, Array]:
        """Of a price that starts so far from the spot: what it pays on this side of the barrier, times exp(weight)."""
        low = np.full_like(c.T, -np.inf) if product.up else away
        high = away if product.up else np.full_like(c.T, np.inf)
        if payoff == "one":
            return _within(shift + mean, w, low, high, weight)[1]
        at = np.log(c.K / c.X0)
        low, high = (np.maximum(low, at), high) if sign > 0 else (low, np.minimum(high, at))
        return _option_within(c, sign, shift + mean, w, low, high, weight)

    (own, _), (images, rounding) = part(0.0, 0.0 * w), part(2 * away, 2 * mean / w**2 * away)
    found = np.where(rounding < _MOST_ROUNDING * c.X0, own - images, np.nan)
    still = way * np.log(forward / c.X0) < way * away
    certain = 1.0 if payoff == "one" else np.maximum(sign * (forward - c.K), 0.0)
    return np.asarray(np.where(w > 0, np.maximum(found, 0.0), still * certain))


def _option_within(
    c: Any, sign: float, mean: Any, w: Any, low: Any, high: Any, weight: Any
) -> tuple[Array, Array]:  # fmt: skip
    """What an option pays on X0 exp(X), of a normal X between two bounds, times exp(weight); and its rounding."""
    (asset, more), (cash, less) = _within(mean, w, low, high, weight)
    return np.asarray(sign * (c.X0 * asset - c.K * cash)), np.asarray(c.X0 * more + c.K * less)


def _within(
    mean: Any, w: Any, low: Any, high: Any, weight: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:  # fmt: skip
    """Expected exp(X), and the chance, of a normal X between two bounds, times exp(weight); each with its rounding.

    It is none where the bounds cross.
    """
    high = np.maximum(low, high)
    a, b = (low - mean) / w, (high - mean) / w
    return _between(a - w, b - w, weight + mean + w**2 / 2), _between(a, b, weight)


def _between(a: Any, b: Any, weight: Any) -> tuple[Array, Array]:
    """exp(weight) times the chance of a normal number between two others, to all digits in either tail.

    Beside it how much it may be off: the rounding of its exponents, which are large where an image weighs much.
    """
    tail = a > 0
    more, less = log_ndtr(np.where(tail, -a, b)), log_ndtr(np.where(tail, -b, a))
    most = np.exp(weight + more)
    size = 1 + np.abs(weight) + np.where(np.isfinite(more), np.abs(more), 0.0)
    return most - np.exp(weight + less), _ROUNDING * size * most


def _barrier(product: Any, c: Any) -> Array:
    forward, w = _terms(c)
    alive, rebate = _alive(product, c, "option"), product.rebate
    if not product.out:
        whole = black(forward, c.K, w, _sign(product))
        return np.asarray(np.maximum(whole - alive, 0.0) + rebate * (_alive(product, c, "one") if rebate else 0.0))
    return np.asarray(alive + (rebate * _at_passage(product, c) * np.exp(c.r * c.T) if rebate else 0.0))


def _at_passage(product: Any, c: Any) -> Array:
    """The value today of one unit of currency on the passage of a barrier, if that comes before expiry.

    It is NaN where rates are so far below 0 that the formula's root is not real.
    """
    w, away, way = c.v * np.sqrt(c.T), np.log(c.H), product.way
    drift = (c.r - c.d) / c.v**2 - 0.5
    power = np.sqrt(drift**2 + 2 * c.r / c.v**2)
    z = -away / w + power * w
    found = np.exp(away * (drift + power) + log_ndtr(way * (-away / w - power * w)))
    found = found + np.exp(away * (drift - power) + log_ndtr(way * z))
    # What is certain passes when growth has come so far.
    when = away / (c.r - c.d)
    certain = np.where((when > 0) & (when <= c.T), np.exp(-c.r * when), 0.0)
    return np.asarray(np.where(w > 0, found, certain))


def _lookback(product: Any, c: Any) -> Array:
    """Conze and Viswanathan's formula, for the highest or the lowest price."""
    (forward, w), way, extreme = _terms(c), product.way, c.M * c.X0
    level = extreme
    if not product.floating:
        level = np.maximum(extreme, c.K) if product.highest else np.minimum(extreme, c.K)
    rate = c.r - c.d
    growth = np.where(np.abs(rate) < _LEAST_RATE, _LEAST_RATE, rate) * c.T
    forward = c.X0 * np.exp(growth)
    d1 = np.log(forward / level) / w + w / 2
    image = c.X0 * np.exp(2 * growth / w**2 * np.log(level / c.X0) + log_ndtr(way * (d1 - 2 * growth / w)))
    again = w**2 / (2 * growth) * (forward * ndtr(way * d1) - image)
    beyond = way * (forward * ndtr(way * d1) - level * ndtr(way * (d1 - w)) + again)
    reached = np.maximum(way * (forward - level), 0.0)
    beyond = np.where(w > 0, beyond, reached)
    if product.floating:
        return np.asarray(way * (extreme - forward) + beyond)
    return np.asarray(np.maximum(way * (extreme - c.K), 0.0) + beyond)


def _corridor(product: Any, c: Any) -> Array:
    (_, w), sign = _terms(c), _sign(product)
    low, high, at = np.log(c.L), np.log(c.H), np.log(c.K / c.X0)
    mean, width = (c.r - c.d) * c.T - w**2 / 2, high - low
    bottom, top = (np.maximum(low, at), high) if sign > 0 else (low, np.minimum(high, at))
    total, rounding = np.zeros_like(c.T), np.zeros_like(c.T)
    for count in range(-_IMAGES, _IMAGES + 1):
        for shift, counts in ((2 * count * width, 1.0), (2 * high - 2 * count * width, -1.0)):
            found, more = _option_within(c, sign, mean + shift, w, bottom, top, mean / w**2 * shift)
            total, rounding = total + counts * found, rounding + more
    total = np.where(rounding < _MOST_ROUNDING * c.X0, total, np.nan)
    end = (c.r - c.d) * c.T
    certain = ((low < end) & (end < high)) * np.maximum(sign * (c.X0 * np.exp(end) - c.K), 0.0)
    return np.asarray(np.where(w > 0, np.maximum(total, 0.0), certain))


FORMULAS: tuple[tuple[type, Callable[[Any, Any], Array]], ...] = (
    *((kind, _cash) for kind in (DigitalPut, CashOrNothingCall, CashOrNothingPut)),
    *((kind, _asset) for kind in (AssetOrNothingCall, AssetOrNothingPut)),
    (Straddle, _straddle),
    *((kind, _forward_start) for kind in (ForwardStartCall, ForwardStartPut)),
    *((kind, _geometric_asian) for kind in (GeometricAsianPut, GeometricAsianCall)),
    *((kind, _geometric_floating) for kind in (GeometricAsianFloatingCall, GeometricAsianFloatingPut)),
    *((kind, _barrier) for kind in BARRIERS),
    *((kind, _lookback) for kind in LOOKBACKS),
    *((kind, _corridor) for kind in (DoubleKnockOutCall, DoubleKnockOutPut)),
)
"""Expected payoffs, not discounted, of products and contracts."""
