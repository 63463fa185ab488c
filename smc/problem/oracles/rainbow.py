"""Options on the best or worst of two log-normal prices, and on their difference.

Sources: Stulz, "Options on the minimum or the maximum of two risky assets" (Journal of Financial Economics, 1982);
the bivariate normal by Owen's T, "Tables for computing bivariate normal probabilities" (1956); a spread is an integral
over the second price of Black's formula on the first, Pearson, "An efficient approach for pricing spread options"
(1995).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, owens_t

from smc.problem.oracles.closed_forms import black

__all__ = ["best_or_worst", "spread"]

Array = npt.NDArray[np.float64]

# Of the integral over the second price, which is smooth: nodes, and how many deviations they reach.
_NODES, _REACH = 192, 9.5
# Of a price that hardly moves, as one divides by its root.
_LEAST_VARIANCE = 1e-14
_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(_NODES)


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
    """Expected max(sign (S_1 - S_2 - K), 0), K at least 0. Shapes: (n, 2), (n, 2, 2), (n,) -> (n,)."""
    z, weights = _REACH * _ABSCISSAE, _REACH * _WEIGHTS * np.exp(-0.5 * (_REACH * _ABSCISSAE) ** 2)
    weights = weights / weights.sum()
    second = np.sqrt(np.maximum(covariances[:, 1, 1], _LEAST_VARIANCE))
    shared = covariances[:, 0, 1] / second
    own = np.sqrt(np.maximum(covariances[:, 0, 0] - shared**2, 0.0))
    against = forwards[:, 1:] * np.exp(second[:, None] * z - second[:, None] ** 2 / 2) + strike[:, None]
    given = forwards[:, :1] * np.exp(shared[:, None] * z - shared[:, None] ** 2 / 2)
    return np.asarray(black(given, against, np.broadcast_to(own[:, None], given.shape), sign) @ weights)


def _both(x: Any, y: Any, correlation: Any) -> Array:
    """The probability that two normal numbers are below x and y. Shapes: (n,) each -> (n,)."""
    x, y = (np.where(v == 0, 1e-300, v) for v in (x, y))
    root = np.sqrt(np.maximum((1 - correlation) * (1 + correlation), 1e-300))
    tails = owens_t(x, (y / x - correlation) / root) + owens_t(y, (x / y - correlation) / root)
    apart = np.where((x * y > 0) | ((x * y == 0) & (x + y >= 0)), 0.0, 0.5)
    return np.asarray(ndtr(x) / 2 + ndtr(y) / 2 - tails - apart)
