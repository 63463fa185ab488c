"""Heston's stochastic volatility, dS = (r - d) S dt + sqrt(V) S dW, dV = kappa (theta - V) dt + xi sqrt(V) dZ.

W and Z are correlated by rho. Where 2 kappa theta < xi^2 (the Feller condition fails) the variance touches 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from smc.problem.conditional import ConditionallyLogNormal
from smc.problem.normal import upper_tail
from smc.problem.processes.gbm import DIVIDEND, RATE, SPOT
from smc.problem.schema import Field

__all__ = ["Heston"]

_FIELDS = (
    SPOT,
    RATE,
    DIVIDEND,
    Field("v0", "variance today", "per year, so that 20 % volatility is 0.04", 0.01, 0.16, least=0.0, doubtful=4.0),
    Field("kappa", "speed of mean reversion", "per year", 0.3, 6.0, least=0.0, strict=True, doubtful=100.0),
    Field("theta", "long-run variance", "per year, as v0", 0.01, 0.16, least=0.0, doubtful=4.0),
    Field("xi", "volatility of variance", "per year", 0.1, 1.0, least=0.0, strict=True, doubtful=10.0),
    Field("rho", "correlation of price and variance", "between -1 and 1", -0.95, 0.5, least=-1.0, most=1.0),
)

# Below this squared coefficient of variation the next variance is a squared normal, above it an exponential with a
# mass at 0.
_SWITCH = 1.5
# The least that a mean of the variance, the argument of a logarithm and an integral of the variance are taken to be, so
# that nothing is divided by 0; and a volatility of variance below which its correlation does not count.
_LEAST_MEAN, _LEAST_FACTOR, _LEAST_INTEGRAL, _LEAST_XI = 1e-12, 1e-6, 1e-12, 2e-4

# Time steps in years, and in units of 1 / kappa, that keep the bias below a basis point of the spot.
_LONGEST_STEP, _SHARE_OF_REVERSION = 1 / 16, 1 / 4

# The share of today's variance in the expected one below which it hardly matters to prices; it may be 0.
_ROUNDING = 0.1

# Moments of the integrated variance are integrals over [0, 1] of sums of exponentials, which twelve nodes resolve.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def expected_integral(t: float, v0: float, kappa: float, drift: float) -> float:
    """The expected integral over [0, t] of a variance with dE V = (drift - kappa V) dt; kappa may be of either sign."""
    x = kappa * t
    if abs(x) < 1e-3:
        return t * (v0 * (1.0 - x / 2.0 + x * x / 6.0) + drift * t * (0.5 - x / 6.0 + x * x / 24.0))
    waning = -math.expm1(-x) / kappa
    return v0 * waning + drift * (t - waning) / kappa


def quadratic_exponential(mean: float, variance: float, z: float, lift: float) -> tuple[float, float]:
    """A number w that is not negative and has this mean and variance, by a normal z; and -ln E exp(lift w).

    It is a squared normal or, where w may be 0, an exponential number with a mass at 0. Both are computed and one is
    taken, so that no path branches.
    """
    mean = max(mean, _LEAST_MEAN)
    per_mean = 1.0 / mean
    psi = variance * per_mean * per_mean
    squared = psi < _SWITCH
    # A squared normal: mean q + 2 sqrt(mean q a) z + a z^2 has this mean and variance.
    q = math.sqrt(max(1.0 - 0.5 * psi, 0.0))
    a = 0.5 * variance * per_mean / (1.0 + q)
    middle = mean * q
    root = middle + z * (2.0 * math.sqrt(middle * a) + a * z)
    # An exponential: above w, if that is not 0, with probability exp(-w / (half mean)) / half.
    half = 0.5 * psi + 0.5
    drawn = half * mean * max(-math.log(half * upper_tail(z)), 0.0)
    w = max(root, 0.0) if squared else drawn
    # What makes the price a martingale: minus the logarithm of E exp(lift w), in the same two cases.
    x = lift * mean
    left = 1.0 - 2.0 * lift * a if squared else 1.0 - x * half
    left = max(left, _LEAST_FACTOR)
    inverse = 1.0 / (left if squared else max(left + x, _LEAST_FACTOR))
    logarithm = math.log(left if squared else left * inverse)
    return w, 0.5 * logarithm - x * q * inverse if squared else logarithm


class Heston(ConditionallyLogNormal):
    """A step is one of the quadratic-exponential scheme, its martingale corrected: forwards are exact.

    The variance at the end of a step has the right mean and variance. The bias falls with the step: 4 steps for each
    unit of kappa T, and 16 a year, keep it below 1e-4 of spot. What is looked at between steps needs three times as
    many: the variance there is taken for constant.

    Source: Andersen, "Simple and efficient simulation of the Heston stochastic volatility model" (Journal of
    Computational Finance, 2008), sections 3.2.4 and 4.2, with gamma_1 = gamma_2 = 1/2.
    """

    kind: ClassVar[str] = "heston"
    lipschitz: ClassVar[bool] = False  # a step may be drawn in the one way or in the other
    continuous: ClassVar[bool] = True
    volatility: ClassVar[str | None] = "v0"
    fields: ClassVar[tuple[Field, ...]] = _FIELDS
    normals: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...] | None] = ("r", "d", "kappa", "xi", "rho")

    @property
    def title(self) -> str:
        """As people write it."""
        return "Heston's model"

    def longest_step(self, c: Any) -> float:
        """A quarter of the time in which the variance reverts, and a sixteenth of a year."""
        return min(_SHARE_OF_REVERSION / float(c.kappa), _LONGEST_STEP)

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: of the variance's mean and variance, of the logarithm of the price; and the spot."""
        decay = math.exp(-c.kappa * dt)
        share = -math.expm1(-c.kappa * dt)
        per_variance = c.xi * c.xi * share / c.kappa
        rho, per_xi = self.leverage(c)
        slope = 0.5 * dt * (c.kappa * per_xi - 0.5)
        own = 0.5 * dt * (1.0 - rho * rho)
        return (
            c.theta * share,
            decay,
            per_variance * decay,
            0.5 * per_variance * c.theta * share,
            (c.r - c.d) * dt,
            slope + per_xi,  # of the variance at the end
            own,
            c.X0,
            0.5 * dt,
        )

    def leverage(self, c: Any) -> tuple[float, float]:
        """The correlation, and its share in the volatility of variance: a variance that is certain has neither."""
        if c.xi > _LEAST_XI:
            return c.rho, c.rho / c.xi
        return 0.0, 0.0

    def start(self, c: Any) -> tuple[float, ...]:
        """The logarithm of the price over the spot, and the variance."""
        return 0.0, c.v0

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The variance by the first normal, the price by the second."""
        v = state[1]
        w, correction = self.variance(v, normals[0], k)
        spread = math.sqrt(k[6] * (v + w))
        return state[0] + k[4] + correction - 0.5 * k[6] * v + k[5] * w + spread * normals[1], w

    def variance(self, v: float, z: float, k: tuple[float, ...]) -> tuple[float, float]:
        """The variance at the end of a step, and what makes the price a martingale."""
        return quadratic_exponential(k[0] + v * k[1], v * k[2] + k[3], z, k[5] + 0.5 * k[6])

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The price."""
        return k[7] * math.exp(state[0])

    def variation(self, before: tuple[float, ...], after: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The integral of the variance, by the trapezoidal rule."""
        return k[8] * (before[1] + after[1])

    # --- the price given the path of the variance ----------------------------------------------------

    def outer_coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step, as above; the forward's logarithm, and what controls are compared with and divided by.

        Weighted by the price's expected value given the variance, the variance reverts at kappa - rho xi.
        """
        expected = expected_integral(c.T, c.v0, c.kappa, c.kappa * c.theta)
        weighted = expected_integral(c.T, c.v0, c.kappa - self.leverage(c)[0] * c.xi, c.kappa * c.theta)
        forward = math.log(c.X0) + (c.r - c.d) * c.T
        return (
            *Heston.coefficients(self, c, dt),
            forward,
            0.5 * dt / max(expected, _LEAST_INTEGRAL),
            weighted / max(expected, _LEAST_INTEGRAL),
        )

    def outer_start(self, c: Any) -> tuple[float, ...]:
        """The mean of the logarithm of the price over the forward, the variance, and the sum of variances."""
        return 0.0, c.v0, 0.0

    def outer_step(
        self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """The variance alone."""
        v = state[1]
        w, correction = self.variance(v, normals[0], k)
        return state[0] + correction - 0.5 * k[6] * v + k[5] * w, w, state[2] + (v + w)

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """Of the price; controls are its expected value over the forward, the variance's integral, their product."""
        variance = k[6] * state[2]
        ratio, integral = math.exp(state[0] + 0.5 * variance), k[10] * state[2]
        return k[9] + state[0], variance, ratio - 1.0, integral - 1.0, ratio * integral - k[11]

    def along(self, state: tuple[float, ...], left: float, k: tuple[float, ...]) -> tuple[float, float]:
        """As above, some steps before expiry."""
        return k[9] - left * k[4] + state[0], k[6] * state[2]

    # --- what is known of prices ---------------------------------------------------------------------

    def growth(self, c: Any, t: Any) -> Any:
        """At the rate less the dividend yield."""
        return (c.r - c.d) * t

    def deviation(self, c: Any, t: Any) -> Any:
        """The root of the expected integral of the variance."""
        return (c.theta * t + (c.v0 - c.theta) * self._waning(c, t)).sqrt()

    def features(self, c: Any) -> tuple[Any, ...]:
        """Skewness, how much the integral of the variance varies, its term structure, and the speed of reversion.

        They come from the first two moments of the integrated variance I and of the martingale M = int sqrt(V) dZ:
        Cov(M, I), which is xi rho times the integral of E V_s (1 - exp(-kappa (T - s))) / kappa, over E[I]^1.5, and the
        standard deviation of I over E[I]. No units.
        """
        expected = self.deviation(c, c.T).square()
        skew, varied = 0 * c.T, 0 * c.T
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
            variance = c.theta + (c.v0 - c.theta) * (-c.kappa * node * c.T).exp()
            later = self._waning(c, (1 - node) * c.T)
            skew = skew + weight * variance * later
            varied = varied + weight * variance * later * later
        skew = c.rho * c.xi * c.T * skew / expected**1.5
        varied = c.xi * (c.T * varied).sqrt() / expected
        return skew, varied, (c.v0 * c.T / expected + _ROUNDING).log(), (c.kappa * c.T).log()

    def _waning(self, c: Any, t: Any) -> Any:
        """Integral of exp(-kappa s) from 0 to t."""
        return -(-c.kappa * t).expm1() / c.kappa
