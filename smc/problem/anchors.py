"""Smooth guesses of prices, which products take off what the network has to learn. None of them has to be exact.

What is learnt is the difference from the guess, so that an anchor decides how hard a problem is to learn, and nothing
else. Each is a function of forwards and deviations, so that one formula serves every process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["barrier_call", "black", "matched_average", "matched_sum", "smooth_digital", "smooth_intrinsic"]

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


def barrier_call(
    spot: Tensor, strike: Tensor, ratio: Tensor, growth: Tensor, deviation: Tensor, dates: int, *, up: bool
) -> Tensor:
    """About the expected payoff of a call that dies at the barrier `ratio` x spot, looked at on `dates` dates.

    Shapes: (n,) each -> (n,). Sources: Reiner and Rubinstein, "Breaking down the barriers" (1991); Broadie, Glasserman
    and Kou, "A continuity correction for discrete barrier options" (1997).
    """
    w = deviation
    away = torch.log(ratio) + (1 if up else -1) * _BETWEEN_DATES * w / dates**0.5
    barrier = spot * torch.exp(away)
    low = torch.minimum(strike, barrier) if up else torch.maximum(strike, barrier)
    ndtr = torch.special.ndtr

    def alive_at_expiry(forward: Tensor) -> Tensor:
        d1 = torch.log(forward / low) / w + w / 2
        asset, cash = ndtr(d1), ndtr(d1 - w)
        if up:
            e1 = torch.log(forward / barrier) / w + w / 2
            asset, cash = asset - ndtr(e1), cash - ndtr(e1 - w)
        return forward * asset - strike * cash

    forward = spot * torch.exp(growth)
    weight = torch.exp(((2 * growth / w.square() - 1) * away).clamp(max=_MOST_WEIGHT))
    return (alive_at_expiry(forward) - weight * alive_at_expiry(forward * torch.exp(2 * away))).clamp(min=0)
