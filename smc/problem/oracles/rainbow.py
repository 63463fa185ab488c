"""Options on the best or worst of two log-normal prices, on their difference, and on their sum.

Sources: Stulz, "Options on the minimum or the maximum of two risky assets" (Journal of Financial Economics, 1982);
the bivariate normal by Owen's T, "Tables for computing bivariate normal probabilities" (1956); a spread or a sum is an
integral over the second price of Black's formula on the first, Pearson, "An efficient approach for pricing spread
options" (1995).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr, owens_t

from smc.problem.oracles.closed_forms import black

__all__ = ["best_or_worst", "spread", "sum_of_two"]

Array = npt.NDArray[np.float64]

# Of the integral over the second price: how many deviations it reaches, the points among which kinks are looked for,
# and nodes on each panel. Panels are half as wide the nearer to a kink, down to the last share of a deviation.
_REACH, _LOOKED, _NODES, _HALVINGS = 9.5, 193, 12, 34
# Of a price that hardly moves, as one divides by its root; and of a level that the first price is compared with.
_LEAST_VARIANCE, _LEAST_LEVEL = 1e-14, 1e-12
_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(_NODES)
_AWAY = _REACH * 2.0 ** -np.arange(_HALVINGS)
_COARSE = np.linspace(-_REACH, _REACH, 39)


def best_or_worst(forwards: Array, covariances: Array, strike: Array, *, best: bool, sign: float) -> Array:
    """Expected max(sign (U - K), 0), U being the higher or the lower price. Shapes: (n, 2), (n, 2, 2), (n,) -> (n,)."""
    deviations = np.sqrt(np.maximum(np.stack([covariances[:, 0, 0], covariances[:, 1, 1]], axis=1), _LEAST_VARIANCE))
    between = covariances[:, 0, 1]
    apart = np.sqrt(np.maximum(deviations[:, 0] ** 2 + deviations[:, 1] ** 2 - 2 * between, _LEAST_VARIANCE))
    lower = np.zeros(len(forwards))
    for one, other in ((0, 1), (1, 0)):
        # With this price as the unit of account: that it is the lower one, and above the strike.
        f, w = forwards[:, one], deviations[:, one]
        above = np.log(f / strike) / w + w / 2
        under = np.log(forwards[:, other] / f) / apart - apart / 2
        lower += f * _both(above, under, (between - w**2) / (w * apart))
    each = [np.log(forwards[:, i] / strike) / deviations[:, i] - deviations[:, i] / 2 for i in (0, 1)]
    lower -= strike * _both(each[0], each[1], between / (deviations[:, 0] * deviations[:, 1]))
    # The lower price itself, by the chance of each to be it.
    half = np.log(forwards[:, 1] / forwards[:, 0]) / apart
    mean = forwards[:, 0] * ndtr(half - apart / 2) + forwards[:, 1] * ndtr(-half - apart / 2)
    call = lower
    if best:
        calls = [black(forwards[:, i], strike, deviations[:, i], 1.0) for i in (0, 1)]
        call, mean = calls[0] + calls[1] - lower, forwards.sum(axis=1) - mean
    return np.maximum(call if sign > 0 else call - mean + strike, 0.0)


def spread(forwards: Array, covariances: Array, strike: Array, *, sign: float) -> Array:
    """Expected max(sign (S_1 - S_2 - K), 0). Shapes: (n, 2), (n, 2, 2), (n,) -> (n,)."""
    return _combined(forwards, covariances, strike, -1.0, sign)


def sum_of_two(forwards: Array, covariances: Array, strike: Array, *, sign: float) -> Array:
    """Expected max(sign (S_1 + S_2 - K), 0). Shapes: (n, 2), (n, 2, 2), (n,) -> (n,)."""
    return _combined(forwards, covariances, strike, 1.0, sign)


def _combined(forwards: Array, covariances: Array, strike: Array, way: float, sign: float) -> Array:
    """Of S_1 + way S_2, contract by contract: panels are narrow where payoffs, given the second price, have a kink."""
    second = np.sqrt(np.maximum(covariances[:, 1, 1], _LEAST_VARIANCE))
    shared = covariances[:, 0, 1] / second
    own = np.sqrt(np.maximum(covariances[:, 0, 0] - shared**2, 0.0))
    found = np.empty(len(forwards))
    for row in range(len(found)):
        (one, other), w, s, deviation = forwards[row], second[row], shared[row], own[row]

        def given(z: Any) -> Any:
            return one * np.exp(s * z - s * s / 2)  # noqa: B023  called in this round alone

        def against(z: Any) -> Any:
            return strike[row] - way * other * np.exp(w * z - w * w / 2)  # noqa: B023

        z, weights = _panels([*_roots(lambda z: given(z) - against(z)), *_roots(against)])
        mean, level = given(z), against(z)
        # Where the level is below 0 a call is exercised whatever the first price is, and a put never.
        paid = black(mean, np.maximum(level, _LEAST_LEVEL), np.full_like(mean, deviation), sign)
        paid = np.where(level > _LEAST_LEVEL, paid, max(sign, 0.0) * (mean - level))
        found[row] = paid @ weights
    return found


def _roots(of: Callable[[Any], Any]) -> list[float]:
    """Where a function is 0 within reach. It has a few roots, that are far apart."""
    looked = np.linspace(-_REACH, _REACH, _LOOKED)
    values = of(looked)
    changes = np.flatnonzero(np.sign(values[:-1]) != np.sign(values[1:]))
    return [float(brentq(of, looked[i], looked[i + 1])) for i in changes]


def _panels(kinks: list[float]) -> tuple[Array, Array]:
    """Nodes, and weights of the normal density. Shapes: -> two of (m,)."""
    near = [edge for kink in kinks for edge in (kink, *(kink + _AWAY), *(kink - _AWAY))]
    edges = np.unique(np.clip(np.concatenate([_COARSE, near]), -_REACH, _REACH))
    half = np.diff(edges)[:, None] / 2
    z = ((edges[:-1, None] + half) + half * _ABSCISSAE).ravel()
    return z, (half * _WEIGHTS).ravel() * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _both(x: Any, y: Any, correlation: Any) -> Array:
    """The probability that two normal numbers are below x and y. Shapes: (n,) each -> (n,)."""
    x, y = (np.where(v == 0, 1e-300, v) for v in (x, y))
    root = np.sqrt(np.maximum((1 - correlation) * (1 + correlation), 1e-300))
    tails = owens_t(x, (y / x - correlation) / root) + owens_t(y, (x / y - correlation) / root)
    apart = np.where((x * y > 0) | ((x * y == 0) & (x + y >= 0)), 0.0, 0.5)
    return np.asarray(ndtr(x) / 2 + ndtr(y) / 2 - tails - apart)
