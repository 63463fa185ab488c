"""Bates's model: Heston's stochastic volatility, and log-normal jumps of the price.

A price jumps `intensity` times a year on average; each jump adds to its logarithm a normal number, whose mean is
`jump_mean` and whose deviation is `jump_deviation`. Without jumps it is Heston's model; without volatility of variance,
so that the variance is certain, it is Merton's.
Source: Bates, "Jumps and stochastic volatility: exchange rate processes implicit in Deutsche mark options" (Review of
Financial Studies, 1996).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from smc.problem.normal import lower_tail, quantile_of_tail
from smc.problem.processes.heston import Heston
from smc.problem.schema import Field

__all__ = ["Bates"]

_FIELDS = (
    Field("intensity", "intensity of jumps", "per year", 0.0, 1.0, least=0.0, doubtful=20.0),
    Field("jump_mean", "mean jump", "of the logarithm of the price", -0.2, 0.1, least=-3.0, most=3.0),
    Field("jump_deviation", "deviation of a jump", "of the logarithm of the price", 0.02, 0.25, least=0.0, most=2.0),
)

# Jumps of one step that are told apart: at a fifth of a jump a step on average, more come once in 400,000 steps.
_MOST_JUMPS, _JUMPS_OF_STEP = 4, 0.2
# Jumps of a path that are told apart; where more than so many are expected, their number is nearly normal.
_MOST_OF_PATH, _MANY = 32, 12.0
# What hardly counts of a kurtosis.
_LEAST_KURTOSIS = 1e-4
# Where the coefficients of jumps begin: behind those of Heston's step, and of Heston's outer step.
_STEP, _PATH = 9, 12


def _tails(m: float) -> tuple[float, float, float, float]:
    """The probabilities that a Poisson number of mean m is above 0, 1, 2 and 3; m is a few at most."""
    one = math.exp(-m) * m
    two = one * m / 2.0
    three = two * m / 3.0
    more = 1.0 + m / 17.0 * (1.0 + m / 18.0)
    more = 1.0 + m / 13.0 * (1.0 + m / 14.0 * (1.0 + m / 15.0 * (1.0 + m / 16.0 * more)))
    more = 1.0 + m / 9.0 * (1.0 + m / 10.0 * (1.0 + m / 11.0 * (1.0 + m / 12.0 * more)))
    more = 1.0 + m / 5.0 * (1.0 + m / 6.0 * (1.0 + m / 7.0 * (1.0 + m / 8.0 * more)))
    above = three * m / 4.0 * more
    return one + two + three + above, two + three + above, three + above, above


class Bates(Heston):
    """Heston's step, and jumps: how many is read off a normal, and their sum is normal and joins the price's own.

    The price is divided by what jumps multiply it by on average, so that forwards are exact. Given the variance and the
    number of jumps the price is log-normal. Where a path has twelve jumps or more on average, their number is drawn
    from a distribution with Poisson's first three moments when prices are taken from that law.
    """

    kind: ClassVar[str] = "bates"
    continuous: ClassVar[bool] = False
    fields: ClassVar[tuple[Field, ...]] = (
        *(replace(field, strict=False) if field.name == "xi" else field for field in Heston.fields),
        *_FIELDS,
    )
    normals: ClassVar[int] = 3
    finals: ClassVar[int] = 1
    still: ClassVar[tuple[str, ...]] = ("intensity", "T")  # the number of jumps moves with both
    inputs: ClassVar[tuple[str, ...] | None] = (*(Heston.inputs or ()), "intensity", "jump_mean", "jump_deviation")

    @property
    def title(self) -> str:
        """As people write it."""
        return "Bates's model"

    def longest_step(self, c: Any) -> float:
        """As long as Heston's, and a fifth of a jump on average."""
        longest = super().longest_step(c)
        return min(longest, _JUMPS_OF_STEP / float(c.intensity)) if c.intensity > 0.0 else longest

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Heston's; mean and variance of a jump, and the normals above which a step has one jump, two, ..."""
        heston = super().coefficients(c, dt)
        expected, factor = c.intensity * dt, self.factor(c)
        tails = _tails(expected)
        # Of `factor` to the power of the number of jumps that are told apart.
        mean = 1.0 + (factor - 1.0) * (tails[0] + factor * (tails[1] + factor * (tails[2] + factor * tails[3])))
        above = tuple(quantile_of_tail(tails[i]) for i in range(_MOST_JUMPS))
        drift = heston[4] - math.log(mean)
        return (*heston[0:4], drift, *heston[5:9], c.jump_mean, c.jump_deviation * c.jump_deviation, *above)

    def factor(self, c: Any) -> float:
        """What a jump multiplies the price by on average."""
        return math.exp(c.jump_mean + 0.5 * c.jump_deviation * c.jump_deviation)

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The variance by the first normal, the price by the second, the number of jumps by the third."""
        v = state[1]
        w, correction = self.variance(v, normals[0], k)
        count = sum((1.0 if normals[2] > k[_STEP + 2 + i] else 0.0) for i in range(_MOST_JUMPS))
        spread = math.sqrt(k[6] * (v + w) + count * k[_STEP + 1])
        moved = k[4] + correction - 0.5 * k[6] * v + k[5] * w + count * k[_STEP]
        return state[0] + moved + spread * normals[1], w

    # --- the price given the path of the variance and the number of jumps ------------------------------

    def outer_coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Heston's, and those of jumps.

        They are the expected number, the chance of none, the inverse of the number's deviation, mean and variance of
        one jump, and what is taken off the logarithm of the price for all of them.
        """
        expected = c.intensity * c.T
        per_deviation = 1.0 / math.sqrt(expected) if expected > 0.0 else 0.0
        taken_off = expected * (self.factor(c) - 1.0)
        jumps = (
            expected,
            math.exp(-expected),
            per_deviation,
            c.jump_mean,
            c.jump_deviation * c.jump_deviation,
            taken_off,
        )
        return (*super().outer_coefficients(c, dt), *jumps)

    def count(self, normal: float, k: tuple[float, ...]) -> float:
        """The number of jumps of a path."""
        expected, chance = k[_PATH], k[_PATH + 1]
        below, u, count, number = chance, lower_tail(normal), 0.0, 0.0
        for _ in range(_MOST_OF_PATH):
            count = count + (1.0 if u > below else 0.0)
            number = number + 1.0
            chance = chance * (expected / number)
            below = below + chance
        # Cornish and Fisher's expansion.
        about = max(expected + math.sqrt(expected) * normal + (normal * normal - 1.0) / 6.0, 0.0)
        return count if expected < _MANY else about

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """Of the price; controls are Heston's three, and the number of jumps."""
        count = self.count(finals[0], k)
        moved = state[0] + count * k[_PATH + 3] - k[_PATH + 5]
        variance = k[6] * state[2] + count * k[_PATH + 4]
        ratio, integral = math.exp(moved + 0.5 * variance), k[10] * state[2]
        jumps = (count - k[_PATH]) * k[_PATH + 2]
        return k[9] + moved, variance, ratio - 1.0, integral - 1.0, ratio * integral - k[11], jumps

    # --- what is known of prices ---------------------------------------------------------------------

    def deviation(self, c: Any, t: Any) -> Any:
        """The root of the expected quadratic variation."""
        return (
            super().deviation(c, t).square()
            + c.intensity * t * (c.jump_mean * c.jump_mean + c.jump_deviation * c.jump_deviation)
        ).sqrt()

    def features(self, c: Any) -> tuple[Any, ...]:
        """Heston's, and what jumps add to skewness and kurtosis. No units."""
        variance, total = c.jump_deviation * c.jump_deviation, self.deviation(c, c.T)
        third = c.jump_mean * (c.jump_mean * c.jump_mean + 3 * variance)
        fourth = c.jump_mean**4 + 6 * c.jump_mean * c.jump_mean * variance + 3 * variance * variance
        skewness, kurtosis = c.intensity * c.T * third / total**3, c.intensity * c.T * fourth / total**4
        # Without jumps the root would have no derivative.
        return (*super().features(c), skewness, (kurtosis + _LEAST_KURTOSIS).sqrt())
