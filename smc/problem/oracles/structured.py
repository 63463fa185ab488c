"""Notes, cliquets and early exercise under geometric Brownian motion: recursions from date to date.

Each function takes a product and one contract and gives the expected payoff, not discounted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr

from smc.problem.oracles.quadrature import REACH, certain, normal_density, panels, reached, step_of, within

__all__ = ["autocallable", "bermudan", "cliquet"]

Array = npt.NDArray[np.float64]

# Of cliquets: terms of a cosine series, and nodes that resolve the last of them.
_TERMS = 512
# How far from its mean a sum is looked for, in deviations.
_FAR = 12.0
_NODES = 768
# The chance of a return between floor and cap below which there is none.
_LEAST_MASS = 1e-30


# --- autocallable notes -----------------------------------------------------------------------------------


def autocallable(product: Any, c: Any) -> float:
    """What a note is worth after each date is linear in the coupons that it has not paid.

    Values are carried back on two intervals, below the level of coupons and from there to that of redemption, on each
    of which they are smooth.
    """
    if (known := certain(product, c)) is not None:
        return known
    n, (drift, s) = product.dates, step_of(c, product.dates)
    call, coupon_at, low = (math.log(level * c.K / c.X0) for level in (c.call_level, c.coupon_level, c.protection))
    coupon, discount = c.coupon, math.exp(-c.r * c.T / n)
    least, most = reached(c, n)
    middle, top = min(max(coupon_at, least), call, most), min(call, most)
    parts = [panels(min(least, middle - s), middle, s)]
    if middle < top:
        parts.append(panels(middle, top, s))
    nodes, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    unpaid_there = nodes < coupon_at

    def carried(x: Array, value: Array | None, unpaid: Array | None) -> tuple[Array, Array]:
        """The value at x one date before, and what each coupon adds that has not been paid."""
        paid = coupon * ndtr((x + drift - coupon_at) / s)
        now, missed = paid + ndtr((x + drift - call) / s), paid.copy()
        if value is None or unpaid is None:  # expiry
            asset, chance = within(x, drift, s, -math.inf, min(low, call))
            alive = ndtr((call - x - drift) / s)
            now = now + alive - chance + asset * c.X0 / c.K
        else:
            step = normal_density(nodes[None, :] - x[:, None] - drift, s) * weights
            now = now + step @ (value + np.where(unpaid_there, unpaid, 0.0))
            missed = missed + step @ np.where(unpaid_there, unpaid, 0.0)
        return discount * now, discount * missed if product.memory else 0 * missed

    value, unpaid = None, None
    for _ in range(n - 1):
        value, unpaid = carried(nodes, value, unpaid)
    return float(product.nominal * carried(np.zeros(1), value, unpaid)[0][0] * math.exp(c.r * c.T))


# --- early exercise ---------------------------------------------------------------------------------------


def bermudan(product: Any, c: Any) -> float:
    """Exercised below a boundary, of a put, or above it, of a call; on each date it is found by its root.

    Beyond the boundary the payoff is integrated in closed form, before it the value of waiting by quadrature. It is NaN
    where rate and dividend yield are both below 0, or one is and the other 0, so that there may be two boundaries.
    """
    if min(c.r, c.d) < 0 and max(c.r, c.d) <= 0:
        return math.nan
    n, sign = product.dates, (1.0 if product.option == "call" else -1.0)
    if c.T <= 0 or c.v <= 0:
        times = np.arange(1, n + 1) / n * c.T
        paid = np.exp(-c.r * times) * np.maximum(sign * (c.X0 * np.exp((c.r - c.d) * times) - c.K), 0.0)
        return float(paid.max() * math.exp(c.r * c.T))
    (drift, s), discount = step_of(c, n), math.exp(-c.r * c.T / n)
    least, most = reached(c, n)
    at = math.log(c.K / c.X0)
    boundary, nodes, weighted = at, np.zeros(0), np.zeros(0)

    def waiting(x: Array) -> Array:
        """What is worth waiting for at x, a date before that of the boundary."""
        low, high = (boundary, math.inf) if sign > 0 else (-math.inf, boundary)
        asset, chance = within(x, drift, s, low, high)
        later = normal_density(nodes[None, :] - x[:, None] - drift, s) @ weighted
        return np.asarray(discount * (sign * (c.X0 * asset - c.K * chance) + later))

    for _ in range(n - 1):

        def gain(x: float) -> float:
            return float(sign * (c.X0 * math.exp(x) - c.K) - waiting(np.array([x]))[0])

        far = at + sign * (max(most, -least) + abs(at))
        now = at  # where to wait is worth nothing that a number could tell
        if gain(at) < 0:
            now = brentq(gain, at, far, xtol=1e-14) if gain(far) > 0 else sign * math.inf
        low, high = min(least, at - s), max(most, at + s)
        low, high = (low, min(now, high)) if sign > 0 else (max(now, low), high)
        new, weights = panels(low, high, s)
        # Both at once: what is waited for is still that of the later date.
        boundary, nodes, weighted = now, new, weights * waiting(new)
    return float(max(waiting(np.zeros(1))[0], 0.0) * math.exp(c.r * c.T))


# --- cliquets ---------------------------------------------------------------------------------------------


def cliquet(product: Any, c: Any) -> float:
    """By how many returns are at the floor, and how many at the cap: the sum of the others has a density.

    Its cosine series is known from the transform of one return.
    Source: Fang and Oosterlee, "A novel pricing method for European options based on Fourier-cosine series expansions"
    (2008).
    """
    if (known := certain(product, c)) is not None:
        return known
    n, (drift, s) = product.dates, step_of(c, product.dates)
    low, high = math.log1p(max(c.floor, -1 + 1e-12)), math.log1p(c.cap)
    at_floor, at_cap = float(ndtr((low - drift) / s)), float(ndtr((drift - high) / s))
    # One return between its bounds, by quadrature over its normal.
    left, right = max((low - drift) / s, -REACH), min((high - drift) / s, REACH)
    if left < right:
        abscissae, of_each = _gauss_legendre()
        z = (left + right) / 2 + (right - left) / 2 * abscissae
        weights = (right - left) / 2 * of_each * normal_density(z, 1.0)
        returns = np.expm1(drift + s * z)
    else:
        weights, returns = np.zeros(1), np.zeros(1)
    expected = 0.0
    for between in range(n + 1):
        series = _sum_of(returns, weights, between, c.floor, c.cap)
        for floors in range(n - between + 1):
            caps = n - between - floors
            ways = math.comb(n, between) * math.comb(n - between, floors)
            chance = ways * at_floor**floors * at_cap**caps
            if chance > 0:
                expected += chance * series(c.least - floors * c.floor - caps * c.cap)
    return float(product.nominal * (c.least + expected))


@cache
def _gauss_legendre() -> tuple[Array, Array]:
    """Nodes and weights on [-1, 1]; they take a while, and only cliquets need so many. Shapes: -> two of (_NODES,)."""
    return np.polynomial.legendre.leggauss(_NODES)


def _sum_of(returns: Array, weights: Array, count: int, floor: float, cap: float) -> Callable[[float], float]:
    """Of so many returns between their bounds: the chance of that, times by how much their sum exceeds a level."""
    if count == 0:
        return lambda level: max(-level, 0.0)
    mass, mean = float(weights.sum()), float(weights @ returns)
    if mass <= _LEAST_MASS:
        return lambda level: 0.0
    if count == 1:
        return lambda level: float(weights @ np.maximum(returns - level, 0.0)) if level > floor else mean - mass * level
    # The sum lies between so many floors and caps, and hardly ever far from its mean.
    each, spread = mean / mass, math.sqrt(max(float(weights @ returns**2) / mass - (mean / mass) ** 2, 0.0) * count)
    start = max(count * floor, count * each - _FAR * spread)
    width = min(count * cap, count * each + _FAR * spread) - start
    u = np.arange(_TERMS) * math.pi / width
    one = np.exp(1j * u[:, None] * (returns - start / count)) @ weights
    terms = 2.0 / width * np.real(one**count)
    terms[0] /= 2

    def exceeds(level: float) -> float:
        if level <= start:
            return float(count * mean * mass ** (count - 1) - level * mass**count)
        if level >= start + width:
            return 0.0
        x = level - start
        # Of max(y - x, 0) over [0, width], by the cosines.
        with np.errstate(divide="ignore", invalid="ignore"):
            of_cosine = (np.cos(math.pi * np.arange(_TERMS)) - np.cos(u * x)) / u**2
        of_cosine[0] = (width - x) ** 2 / 2
        return float(max(terms @ of_cosine, 0.0))

    return exceeds
