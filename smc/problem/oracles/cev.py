"""Constant elasticity of variance in closed form, by the non-central chi-square distribution.

Source: Schroder, "Computing the constant elasticity of variance option pricing formula" (Journal of Finance, 1989).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import ncx2

__all__ = ["price"]

Array = npt.NDArray[np.float64]

# The distribution is summed to a dozen digits up to this non-centrality; nearer to log-normal prices, the price is
# linear in what the elasticity lacks to 1, within 1e-10 of the spot.
_MOST = 1e7


def price(c: Any, option: Literal["put", "call"], spot: str = "X0") -> Array:
    """Discounted prices. Shapes: columns of (n,) -> (n,). Units: currency."""
    s, growth = np.asarray(getattr(c, spot)), (c.r - c.d) * c.T
    discount, forward = np.exp(-c.r * c.T), s * np.exp(growth)
    call = np.maximum(forward - c.K, 0.0) * discount
    w = c.v * np.sqrt(c.T)
    random = np.flatnonzero(w > 0)
    if len(random):
        part = type(c)(*(np.asarray(column)[random] for column in c))
        lacking, least = 1 - part.beta, 1 / np.sqrt(_MOST) / w[random]
        near = lacking < least
        known = _call(part, np.maximum(lacking, least), s[random])
        black = _black(forward[random], part.K, w[random]) * discount[random]
        call[random] = np.where(near, black + lacking / least * (known - black), known)
    put = call - discount * (forward - c.K)
    return np.asarray(np.maximum(call if option == "call" else put, 0.0))


def _call(c: Any, lacking: Array, s: Array) -> Array:
    """Of an elasticity of 1 less `lacking`, which is above 0."""
    power, drift = 2 * lacking, c.r - c.d
    x = power * drift * c.T
    stretch = np.where(np.abs(x) > 1e-12, np.expm1(x) / np.where(x == 0, 1.0, x), 1.0)
    unit = 2 / (c.v**2 * power**2 * c.T * stretch)
    of_spot, of_strike = 2 * unit * np.exp(x), 2 * unit * (c.K / s) ** power
    above = ncx2.sf(of_strike, 2 + 2 / power, of_spot)
    exercised = ncx2.cdf(of_spot, 2 / power, of_strike)
    return np.asarray(s * np.exp(-c.d * c.T) * above - c.K * np.exp(-c.r * c.T) * exercised)


def _black(forward: Array, strike: Array, w: Array) -> Array:
    d1 = np.log(forward / strike) / w + w / 2
    return np.asarray(forward * ndtr(d1) - strike * ndtr(d1 - w))
