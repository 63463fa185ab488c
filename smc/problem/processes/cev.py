"""Constant elasticity of variance, dS = (r - d) S dt + sigma S^beta dW, absorbed at 0.

`v` is the volatility at today's price, sigma X0^(beta - 1), so that a domain does not depend on the currency. At beta
= 1 it is geometric Brownian motion, at beta = 1/2 Cox's square-root diffusion, at beta = 0 Bachelier's model, absorbed.
Source: Cox, "Notes on option pricing I: constant elasticity of variance diffusions" (1975).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from smc.problem.normal import upper_tail
from smc.problem.process import Process
from smc.problem.processes.gbm import DIVIDEND, RATE, SPOT
from smc.problem.schema import Field

__all__ = ["ConstantElasticity"]

_FIELDS = (
    SPOT,
    RATE,
    DIVIDEND,
    Field(
        "v", "volatility at today's price", "per square root of a year, so that 20 % is 0.2", 0.05, 0.6,
        least=0.0, doubtful=5.0, certain=True,
    ),
    Field("beta", "elasticity of the diffusion", "between 0 and 1", 0.0, 1.0, least=0.0, most=1.0),
)  # fmt: skip

# Squared coefficients of variation of a step: below the first a price has the skewness of the model, above the second
# it may be absorbed.
_NEAR, _FAR = 0.05, 1.5
# Of a price that hardly survives a step: the factor that makes its variance right in Bachelier's model, for which it is
# known; and what an elasticity lacks to 1 at least, where one divides by it.
_OF_SURVIVORS, _LEAST_LACKING = 0.785, 1e-3
# The share of today's price below which a price is taken to be absorbed.
_ABSORBED = 1e-5
# The share from which a contract starts whose price was absorbed: it is so again at once.
_LEAST_SHARE = 1e-3
# The longest step in years, and the most variance of the logarithm of the price that a step may have.
_LONGEST_STEP, _MOST_VARIANCE = 1 / 8, 0.0225


class ConstantElasticity(Process):
    """A step has the right mean, and the variance and skewness of the model to the second order in time.

    The price over today's price is a quadratic function of a normal, whose three coefficients match three moments. Near
    0, where a quadratic would be negative, it is the square of a normal or, where the price may be absorbed, 0 or an
    exponential number, as in Andersen's scheme for a variance. Forwards are exact. What the price does between steps is
    not known: near 0 its logarithm is nothing like a Brownian bridge.
    """

    kind: ClassVar[str] = "cev"
    lipschitz: ClassVar[bool] = False  # a step may be drawn in the one way or in the other
    fields: ClassVar[tuple[Field, ...]] = _FIELDS
    inputs: ClassVar[tuple[str, ...] | None] = ("r", "d", "beta")

    @property
    def title(self) -> str:
        """In full."""
        return "constant elasticity of variance"

    def longest_step(self, c: Any) -> float:
        """An eighth of a year, and a standard deviation of 0.15."""
        variance = float(c.v) * float(c.v)
        return min(_LONGEST_STEP, _MOST_VARIANCE / variance) if variance > 0.0 else _LONGEST_STEP

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: growth, the variance at today's price, twice the elasticity less 2, elasticity; and the spot."""
        drift, power = c.r - c.d, 2.0 * c.beta - 2.0
        # The variance that a price without drift has in the time that the drift stretches.
        rate = power * drift * dt
        stretched = dt * (math.expm1(rate) / rate if abs(rate) > 1e-9 else 1.0 + 0.5 * rate)
        # Near 0 the variance is another function of time: a price that survives is as large as one step makes it.
        exponent = 0.5 / max(1.0 - c.beta, _LEAST_LACKING)
        factor = c.beta if c.beta >= 0.5 else _OF_SURVIVORS
        return (
            math.exp(drift * dt), c.v * c.v * stretched, power, c.beta, c.X0, factor / exponent, exponent, 1.0 / factor,
            0.5 * c.beta * (2.0 * c.beta - 1.0),
        )  # fmt: skip

    def start(self, c: Any) -> tuple[float, ...]:
        """The price over today's."""
        return (1.0,)

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """One normal. Far from 0 the three coefficients are polynomials, and nothing else is computed."""
        s, z = max(state[0], _ABSORBED), normals[0]
        local = k[1] * math.exp(k[2] * math.log(s))
        if local < _NEAR:
            psi = local * (1.0 + k[8] * local)
            curve = 0.5 * k[3] * psi
            moved = 1.0 + z * math.sqrt(psi - 2.0 * curve * curve) + curve * (z * z - 1.0)
            return (k[0] * s * max(moved, 0.0),)
        return (k[0] * s * self.near_absorption(local, z, k) if state[0] > _ABSORBED else 0.0,)

    def near_absorption(self, local: float, z: float, k: tuple[float, ...]) -> float:
        """What a price is multiplied by where a step may well end at 0."""
        psi = (math.exp(k[6] * math.log(1.0 + k[5] * local)) - 1.0) * k[7]
        q = math.sqrt(max(1.0 - 0.5 * psi, 0.0))
        curve = 0.5 * psi * max(k[3], 1.0 / (1.0 + q))
        slope = math.sqrt(max(psi - 2.0 * curve * curve, 0.0))
        quadratic = 1.0 + z * slope + curve * (z * z - 1.0)
        half = 0.5 * psi + 0.5
        drawn = half * max(-math.log(half * upper_tail(z)), 0.0)
        return max(quadratic, 0.0) if psi < _FAR else drawn

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The price."""
        return k[4] * state[0]

    def restarted(self, c: Any, prices: Any) -> Any:
        """From another spot, at which the volatility is another."""
        share = (prices[:, 0] / c.X0).clamp(min=_LEAST_SHARE)
        return {"X0": c.X0 * share, "v": c.v * share ** (c.beta - 1)}

    def growth(self, c: Any, t: Any) -> Any:
        """At the rate less the dividend yield."""
        return (c.r - c.d) * t

    def deviation(self, c: Any, t: Any) -> Any:
        """That of geometric Brownian motion with today's volatility, which is near."""
        return c.v * t.sqrt()

    def features(self, c: Any) -> tuple[Any, ...]:
        """The skewness that the elasticity takes off. No units."""
        return ((c.beta - 1) * self.deviation(c, c.T),)
