"""Log-normal prices, in scalar functions that a product may call: chances and expected payoffs within bounds."""

from __future__ import annotations

import math

from smc.problem.normal import upper_tail

__all__ = ["FAR", "chance_within", "option_within", "price_within"]

FAR = 100.0
"""A logarithm of a price that is never reached, where there is no bound."""


def chance_within(mean: float, deviation: float, low: float, high: float) -> float:
    """The probability that a normal number, deviation > 0, lies between the bounds; 0 if they cross."""
    return max(upper_tail((low - mean) / deviation) - upper_tail((high - mean) / deviation), 0.0)


def price_within(mean: float, deviation: float, low: float, high: float) -> float:
    """The expected price where its logarithm, normal with these moments, lies between the bounds, and 0 elsewhere."""
    shifted = mean + deviation * deviation
    return math.exp(mean + 0.5 * deviation * deviation) * chance_within(shifted, deviation, low, high)


def option_within(
    mean: float, deviation: float, strike: float, low: float, high: float, sign: float
) -> float:  # fmt: skip
    """Expected max(sign (S - strike), 0) where ln S, normal with these moments, lies between the bounds."""
    at = math.log(strike)
    low = max(low, at) if sign > 0.0 else low
    high = high if sign > 0.0 else min(high, at)
    asset, cash = price_within(mean, deviation, low, high), chance_within(mean, deviation, low, high)
    return max(sign * (asset - strike * cash), 0.0)
