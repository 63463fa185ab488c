"""Rough Heston, lifted: the variance is a sum of factors that revert at different speeds and share one Brownian motion.

The variance is V_t = v0 + int K(t - s) (kappa (theta - V_s) ds + xi sqrt(V_s) dZ_s) with the kernel of rough
volatility, K(t) = t^(hurst - 1/2) / Gamma(hurst + 1/2), and dS = (r - d) S dt + sqrt(V) S dW, W and Z correlated by
rho. The kernel is replaced by a sum of exponentials w_i exp(-x_i t), one for each factor: the model is Markovian.

Sources: El Euch and Rosenbaum, "The characteristic function of rough Heston models" (Mathematical Finance, 2019); Abi
Jaber, "Lifting the Heston model" (Quantitative Finance, 2019); Bayer and Breneis, "Efficient option pricing in the
rough Heston model using weak simulation schemes" (Quantitative Finance, 2024), whose rule in L2 is near the one here.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from pydantic import Field as Setting
from scipy.optimize import minimize
from scipy.special import gamma, gammainc

from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.conditional import ConditionallyLogNormal
from smc.problem.processes.heston import Heston, quadratic_exponential

__all__ = ["LiftedRoughHeston", "exponentials"]

_LONGEST_STEP, _LEAST_STEPS = 1 / 32, 64
# The share of today's variance in the expected one below which it hardly matters to prices; it may be 0.
_ROUNDING = 0.1
# At expiry nothing moves, and the kernel's scale must only be finite.
_LEAST_EXPIRY = 1e-9
# The power of time by which the kernel's error is weighed.
_WEIGHED = 0.5
# Where the coefficients of the factors begin: two for each.
_FACTORS = 11
# What a mean of the variance is at least; and how near to infinity the price's expected value may come in one step
# where price and variance rise together, for which the variance's own variance is bounded.
_LEAST_MEAN, _SHARE_OF_EXPLOSION, _LEAST_LIFT = 1e-9, 0.9, 1e-9


@lru_cache(maxsize=64)
def exponentials(hurst: float, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Speeds and weights of the sum of exponentials that is nearest to the rough kernel on [0, 1].

    The square of the difference is weighed by the root of time, as L2 itself spends factors on times that no step
    resolves. On [0, T] speeds are divided by T, and weights multiplied by T^(hurst - 1/2). They are rounded, so that
    every machine has the same.
    """

    def weights(speeds: np.ndarray) -> tuple[np.ndarray, float]:
        order, sums = hurst + 0.5 + _WEIGHED, speeds[:, None] + speeds
        own = gamma(order) / gamma(hurst + 0.5) * speeds**-order * gammainc(order, speeds)
        both = gamma(1 + _WEIGHED) * gammainc(1 + _WEIGHED, sums) / sums ** (1 + _WEIGHED)
        found = np.linalg.lstsq(both, own, rcond=1e-14)[0]
        return found, -float(own @ found)

    def left(logs: np.ndarray) -> float:
        return weights(np.exp(logs))[1]

    start = math.log(0.3) + 2.0 * np.arange(count)
    best = minimize(left, start, method="Nelder-Mead", options={"maxiter": 8000, "xatol": 1e-6, "fatol": 1e-14})
    speeds = np.array([float(f"{speed:.5g}") for speed in np.sort(np.exp(best.x))])
    return tuple(speeds.tolist()), tuple(float(f"{weight:.9g}") for weight in weights(speeds)[0])


class LiftedRoughHeston(ConditionallyLogNormal):
    """Heston's fields, with `hurst` and the number of `factors` as settings.

    A step moves the factors by their drift, with the variance as it is, and then draws the variance at its end with the
    mean that follows and the variance of what the Brownian motion adds; the factors share what was added in proportion
    to their weights, averaged over the step, so that steps may be long against a fast factor. The martingale is
    corrected as in Heston's scheme: forwards are exact.
    """

    kind: ClassVar[str] = "lifted_rough_heston"
    continuous: ClassVar[bool] = True
    lipschitz: ClassVar[bool] = False  # a step may be drawn in the one way or in the other
    volatility: ClassVar[str | None] = "v0"
    fields: ClassVar[Any] = Heston.fields
    normals: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...] | None] = Heston.inputs

    hurst: RealNumber = Setting(default=0.1, gt=0.0, lt=0.5)
    factors: WholeNumber = Setting(default=5, ge=1, le=10)

    @property
    def title(self) -> str:
        """In full."""
        return f"rough Heston of {self.factors} factors (H = {self.hurst:g})"

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """At which the factors revert, times the time to expiry."""
        return exponentials(self.hurst, self.factors)[0]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Of the factors in the variance, times T^(1/2 - hurst)."""
        return exponentials(self.hurst, self.factors)[1]

    def longest_step(self, c: Any) -> float:
        """A thirty-second of a year, and a sixty-fourth of the time to expiry."""
        return min(_LONGEST_STEP, float(c.T) / _LEAST_STEPS) if c.T > 0.0 else _LONGEST_STEP

    def averaged(self, speed: float, share: float) -> float:
        """The mean of exp(-speed t) over a step, which is this share of the time to expiry."""
        return -math.expm1(-speed * share) / (speed * share)

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: v0, theta, the kernel's part of drift and variance; of the price; two for each factor."""
        share = dt / c.T if c.T > 0.0 else 1.0
        scale = max(c.T, _LEAST_EXPIRY) ** (self.hurst - 0.5)
        gain = scale * sum(self.weights[i] * self.averaged(self.speeds[i], share) for i in range(self.factors))
        # How much of what a step adds to the variance counts in the variance's integral over it.
        late = sum(
            self.weights[i] * (1.0 - self.averaged(self.speeds[i], share)) / self.speeds[i] for i in range(self.factors)
        )
        late = late * scale / (gain * share)
        lift = c.rho / (c.xi * gain) - 0.5 * dt * c.rho * c.rho * late
        return (
            c.v0,
            c.theta,
            -math.expm1(-gain * c.kappa * dt),
            0.5 * gain * gain * c.xi * c.xi * dt,
            (c.r - c.d) * dt,
            lift,
            0.5 * dt * (1.0 - c.rho * c.rho),
            c.X0,
            2.0 * late,
            _SHARE_OF_EXPLOSION / max(lift, _LEAST_LIFT),
            0.5 * dt,
            *tuple(math.exp(-self.speeds[i] * share) for i in range(self.factors)),
            *tuple(scale * self.weights[i] * self.averaged(self.speeds[i], share) / gain for i in range(self.factors)),
        )

    def start(self, c: Any) -> tuple[float, ...]:
        """The logarithm of the price over the spot, the variance, and the factors times their weights."""
        return (0.0, c.v0, *tuple(0.0 for i in range(self.factors)))

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The variance by the first normal, the price by the second."""
        moved = self.moved(state, normals[0], k)
        return (
            state[0] + k[4] + moved[0] - 0.5 * moved[1] + math.sqrt(moved[1]) * normals[1],
            *tuple(moved[2 + i] for i in range(self.factors + 1)),
        )

    def moved(self, state: tuple[float, ...], z: float, k: tuple[float, ...]) -> tuple[float, ...]:
        """What a step adds to the logarithm of the price's expected value over the forward, and to its own variance.

        After these two, the variance and the factors at the end of the step.
        """
        v = state[1]
        faded = tuple(k[_FACTORS + i] * state[2 + i] for i in range(self.factors))
        undriven = k[0] + sum(faded[i] for i in range(self.factors))
        mean = max(undriven + k[2] * (k[1] - v), _LEAST_MEAN)
        w, correction = quadratic_exponential(mean, min(k[3] * (v + mean), k[9] * mean), z, k[5])
        added = w - undriven
        return (
            correction + k[5] * w,
            k[6] * max(v + mean + k[8] * (w - mean), 0.0),
            w,
            *tuple(faded[i] + k[_FACTORS + self.factors + i] * added for i in range(self.factors)),
        )

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The price."""
        return k[7] * math.exp(state[0])

    def variation(self, before: tuple[float, ...], after: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The integral of the variance, by the trapezoidal rule."""
        return k[10] * (before[1] + after[1])

    # --- the price given the path of the variance ----------------------------------------------------

    def outer_coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Those of a step, with the forward's logarithm in the place of the spot."""
        k = self.coefficients(c, dt)
        return (*k[0:7], math.log(c.X0) + (c.r - c.d) * c.T, *k[8:])

    def outer_start(self, c: Any) -> tuple[float, ...]:
        """The logarithm of the price's expected value over the forward, the variance, the factors, its own variance."""
        return (0.0, c.v0, *tuple(0.0 for i in range(self.factors)), 0.0)

    def outer_step(
        self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """The variance alone."""
        moved = self.moved(state, normals[0], k)
        return (
            state[0] + moved[0],
            *tuple(moved[2 + i] for i in range(self.factors + 1)),
            state[2 + self.factors] + moved[1],
        )

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """Of the price; the control is its expected value over the forward."""
        variance = state[2 + self.factors]
        return k[7] + state[0] - 0.5 * variance, variance, math.exp(state[0]) - 1.0

    def along(self, state: tuple[float, ...], left: float, k: tuple[float, ...]) -> tuple[float, float]:
        """As above, some steps before expiry."""
        variance = state[2 + self.factors]
        return k[7] - left * k[4] + state[0] - 0.5 * variance, variance

    # --- what is known of prices ---------------------------------------------------------------------

    def growth(self, c: Any, t: Any) -> Any:
        """At the rate less the dividend yield."""
        return (c.r - c.d) * t

    def deviation(self, c: Any, t: Any) -> Any:
        """That of a variance which reverts by the rough kernel as its first terms say, which is near."""
        reverting = c.kappa * t ** (self.hurst + 0.5) / math.gamma(self.hurst + 2.5)
        return (t * (c.v0 + (c.theta - c.v0) * reverting / (1 + reverting))).sqrt()

    def features(self, c: Any) -> tuple[Any, ...]:
        """Skewness, how much the integral of the variance varies, and its term structure. No units."""
        order = self.hurst + 0.5
        expected = self.deviation(c, c.T).square()
        varied = c.xi * c.T**order / math.gamma(order + 2) * (c.T / expected).sqrt()
        return c.rho * varied, varied, (c.v0 * c.T / expected + _ROUNDING).log(), (c.kappa * c.T**order).log()
