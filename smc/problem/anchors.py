"""Smooth guesses of prices, which products take off what the network has to learn. None of them has to be exact.

What is learnt is the difference from the guess, so that an anchor decides how hard a problem is to learn, and nothing
else. Each is a function of forwards and deviations, so that one formula serves every process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["barrier_option", "barrier_survival", "black", "matched_average", "matched_sum", "smooth_digital", "smooth_intrinsic"]

# Of the Bachelier at-the-money shape: softplus(1.7 x) / 1.7 follows E max(x + Z, 0) within 0.02.
_SHARPNESS = 1.7
# A barrier that is looked at now and then is one that is always looked at, this many deviations of a step further out.
_BETWEEN_DATES = 0.5826
# The logarithm beyond which the weight of an image is cut: what it weighs is nothing there.
_MOST_WEIGHT = 300.0


def smooth_intrinsic(distance: Tensor, deviation: Tensor) -> Tensor:
    """About E max(Z - x, 0) for a standard normal Z, x being the distance in deviations. Shapes: (n,) each -> (n,)."""
    return functional.softplus(-_SHARPNESS * distance / deviation) / _SHARPNESS


def smooth_digital(distance: Tensor) -> Tensor:
    """About the probability that a standard normal is below the distance, within 0.01. Shapes: (n,) -> (n,)."""
    return torch.sigmoid(_SHARPNESS * distance)


def black(forward: Tensor, strike: Tensor, deviation: Tensor, sign: float) -> Tensor:
    """Expected max(sign (S - K), 0) of a log-normal price. Shapes: (n,) each -> (n,).

    Source: Black, "The pricing of commodity contracts" (1976).
    """
    d1 = torch.log(forward / strike) / deviation + deviation / 2
    ndtr = torch.special.ndtr
    return sign * (forward * ndtr(sign * d1) - strike * ndtr(sign * (d1 - deviation)))


def matched_average(forwards: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of an average of prices, and the deviation of the log-normal variable that has its first two moments.

    Shapes: forwards and variances of logarithms on dates, (n, dates) -> two of (n,).
    Source: Levy, "Pricing European average rate currency options" (1992).
    """
    dates = forwards.shape[1]
    later = forwards.flip(1).cumsum(dim=1).flip(1) - forwards
    second = (forwards * torch.exp(variances) * (forwards + 2 * later)).sum(dim=1) / dates**2
    mean = forwards.mean(dim=1)
    return mean, torch.sqrt(torch.log(second / mean.square()))


def matched_sum(forwards: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a sum of log-normal variables, and the deviation of the one that has its first two moments.

    Shapes: forwards (n, terms), covariances of logarithms (n, terms, terms) -> two of (n,). Source: Levy, as above.
    """
    mean = forwards.sum(dim=1)
    excess = (forwards[:, :, None] * forwards[:, None, :] * torch.expm1(covariances)).sum(dim=(1, 2))
    return mean, torch.sqrt(torch.log1p(excess / mean.square()))


def barrier_option(
    spot: Tensor,
    strike: Tensor,
    ratio: Tensor | None,
    growth: Tensor,
    deviation: Tensor,
    dates: int | None,
    *,
    up: bool,
    sign: float,
) -> Tensor:
    """About the expected payoff of a call (sign 1) or put (-1) that dies at the barrier `ratio` x spot.

    The barrier is looked at on `dates` dates, or all the time if None; without a ratio there is none.
    Shapes: (n,) each -> (n,). Sources: Reiner and Rubinstein, "Breaking down the barriers" (1991); Broadie, Glasserman
    and Kou, "A continuity correction for discrete barrier options" (1997).
    """
    forward = spot * torch.exp(growth)
    if ratio is None:
        return black(forward, strike, deviation, sign)
    w, away = deviation, _barrier(ratio, deviation, dates, up=up)
    barrier = spot * torch.exp(away)

    def alive_at_expiry(forward: Tensor) -> Tensor:
        """Where the price at expiry is on the right side of both."""
        (low, high) = (strike, None) if sign > 0 else (None, strike)
        if up:
            high = barrier if high is None else torch.minimum(high, barrier)
        else:
            low = barrier if low is None else torch.maximum(low, barrier)
        if low is not None and high is not None:
            low = torch.minimum(low, high)
        asset, cash = _above(forward, low, w), _above(forward, low, w, of_price=False)
        asset, cash = asset - _above(forward, high, w, last=True), cash - _above(forward, high, w, False, last=True)
        return sign * (forward * asset - strike * cash)

    images = alive_at_expiry(forward * torch.exp(2 * away))
    return (alive_at_expiry(forward) - _weight(growth, w, away) * images).clamp(min=0)


def barrier_survival(ratio: Tensor, growth: Tensor, deviation: Tensor, dates: int | None, *, up: bool) -> Tensor:
    """About the probability that the price does not pass the barrier. Shapes: (n,) each -> (n,)."""
    away, w = _barrier(ratio, deviation, dates, up=up), deviation
    mean = growth - w.square() / 2
    ndtr, way = torch.special.ndtr, 1 if up else -1
    beyond = ndtr(way * (-away - mean) / w)
    return (ndtr(way * (away - mean) / w) - _weight(growth, w, away) * beyond).clamp(0, 1)


def _barrier(ratio: Tensor, deviation: Tensor, dates: int | None, *, up: bool) -> Tensor:
    """The logarithm of the barrier over the spot, a little further out if it is looked at on dates."""
    away = torch.log(ratio)
    return away if dates is None else away + (1 if up else -1) * _BETWEEN_DATES * deviation / dates**0.5


def _weight(growth: Tensor, deviation: Tensor, away: Tensor) -> Tensor:
    """What a path's image beyond the barrier counts."""
    return torch.exp(((2 * growth / deviation.square() - 1) * away).clamp(max=_MOST_WEIGHT))


def _above(
    forward: Tensor, bound: Tensor | None, deviation: Tensor, of_price: bool = True, *, last: bool = False
) -> Tensor:
    """The chance that a price is above a bound, weighed by the price or not; of no bound all, or for the last none."""
    if bound is None:
        return torch.zeros_like(forward) if last else torch.ones_like(forward)
    d1 = torch.log(forward / bound) / deviation + deviation / 2
    return torch.special.ndtr(d1 if of_price else d1 - deviation)
