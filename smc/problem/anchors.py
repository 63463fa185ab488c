"""Smooth guesses of prices, which products take off what the network has to learn. None of them has to be exact.

What is learnt is the difference from the guess, so that an anchor decides how hard a problem is to learn, and nothing
else. Each is a function of forwards and deviations, so that one formula serves every process.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "NoteTerms",
    "bachelier",
    "barrier_option",
    "barrier_survival",
    "bivariate_normal",
    "black",
    "clipped_return",
    "double_barrier_option",
    "exchange",
    "expected_beyond",
    "extreme_of",
    "geometric_average",
    "matched_average",
    "matched_sum",
    "note_on_dates",
    "smooth_digital",
    "smooth_intrinsic",
    "smooth_maximum",
]

# Of the Bachelier at-the-money shape: softplus(1.7 x) / 1.7 follows E max(x + Z, 0) within 0.02.
_SHARPNESS = 1.7
# A barrier that is looked at now and then is one that is always looked at, this many deviations of a step further out.
_BETWEEN_DATES = 0.5826
# The logarithm beyond which the weight of an image is cut: what it weighs is nothing there.
_MOST_WEIGHT = 300.0
# Below this a variance is none, of what one would divide by its root.
_LEAST_VARIANCE = 1e-12
# The growth below which there is none, in deviations.
_LEAST_GROWTH = 1e-5
# The probability that one divides by at least, and the correlation of two dates at most.
_LEAST_CHANCE, _MOST_CORRELATION = 1e-9, 0.999
# Of the integral over the correlation of two normal numbers, on [0, 1].
_NODES, _WEIGHTS = (part.tolist() for part in np.polynomial.legendre.leggauss(10))
_NODES, _WEIGHTS = [(x + 1) / 2 for x in _NODES], [w / 2 for w in _WEIGHTS]


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


def matched_average(forwards: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of an average of prices, and the deviation of the log-normal variable that has its first two moments.

    Shapes: forwards and variances of logarithms on dates, (n, dates), weights (dates,) -> two of (n,).
    Source: Levy, "Pricing European average rate currency options" (1992).
    """
    parts = forwards * weights
    later = parts.flip(1).cumsum(dim=1).flip(1) - parts
    second = (parts * torch.exp(variances) * (parts + 2 * later)).sum(dim=1)
    mean = parts.sum(dim=1)
    return mean, torch.sqrt(torch.log(second / mean.square()))


def geometric_average(forwards: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a geometric average of log-normal prices, and the deviation of its logarithm. Shapes: as above.

    Source: Kemna and Vorst, "A pricing method for options based on average asset values" (1990).
    """
    weighted = variances * weights
    later = weights.flip(0).cumsum(dim=0).flip(0) - weights
    variance = (weighted * (weights + 2 * later)).sum(dim=1)
    mean = (forwards.log() @ weights) - weighted.sum(dim=1) / 2
    return torch.exp(mean + variance / 2), variance.sqrt()


def exchange(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The expected max(A - B, 0) of log-normal numbers by their means and deviations, and the deviation of ln A / B.

    Shapes: (n,) each -> two of (n,).
    Source: Margrabe, "The value of an option to exchange one asset for another" (1978).
    """
    variance = one[1].square() + other[1].square() - 2 * covariance
    deviation = variance.clamp(min=_LEAST_VARIANCE).sqrt()
    return black(one[0], other[0], deviation, 1.0), deviation


def matched_sum(forwards: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a sum of log-normal variables, and the deviation of the one that has its first two moments.

    Shapes: forwards (n, terms), covariances of logarithms (n, terms, terms) -> two of (n,). Source: Levy, as above.
    """
    mean = forwards.sum(dim=1)
    excess = (forwards[:, :, None] * forwards[:, None, :] * torch.expm1(covariances)).sum(dim=(1, 2))
    return mean, torch.sqrt(torch.log1p(excess / mean.square()))


def extreme_of(forwards: Tensor, covariances: Tensor, *, highest: bool) -> tuple[Tensor, Tensor]:
    """Mean of the highest or lowest of log-normal prices, and the deviation of its logarithm, as if that were normal.

    Shapes: (n, assets), covariances of logarithms (n, assets, assets) -> two of (n,).
    Source: Clark, "The greatest of a finite set of random variables" (1961), one asset after the other.
    """
    way, variances = (1.0 if highest else -1.0), torch.diagonal(covariances, dim1=1, dim2=2)
    means = way * (forwards.log() - variances / 2)
    mean, variance, with_others = means[:, 0], variances[:, 0], covariances[:, 0]
    for asset in range(1, forwards.shape[1]):
        apart = (variance + variances[:, asset] - 2 * with_others[:, asset]).clamp(min=_LEAST_VARIANCE).sqrt()
        distance = (mean - means[:, asset]) / apart
        first = torch.special.ndtr(distance)
        density = torch.exp(-distance.square() / 2) / (2 * torch.pi) ** 0.5
        greatest = mean * first + means[:, asset] * (1 - first) + apart * density
        squared = (
            (mean.square() + variance) * first
            + (means[:, asset].square() + variances[:, asset]) * (1 - first)
            + (mean + means[:, asset]) * apart * density
        )
        with_others = with_others * first[:, None] + covariances[:, asset] * (1 - first)[:, None]
        mean, variance = greatest, (squared - greatest.square()).clamp(min=_LEAST_VARIANCE)
    return torch.exp(way * mean + variance / 2), variance.sqrt()


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


def expected_beyond(
    spot: Tensor, level: Tensor, growth: Tensor, deviation: Tensor, dates: int | None, *, highest: bool
) -> Tensor:
    """About what the highest price exceeds a level above the spot by, or the lowest price falls short of one below it.

    Prices are looked at on `dates` dates, or all the time if None. Shapes: (n,) each -> (n,).
    Sources: Conze and Viswanathan, "Path dependent options: the case of lookback options" (1991); Broadie, Glasserman
    and Kou, "Connecting discrete and continuous path-dependent options" (1999).
    """
    way, w = (1.0 if highest else -1.0), deviation
    shift = 0.0 * w if dates is None else way * _BETWEEN_DATES * w / dates**0.5
    level = level * shift.exp()
    # Without growth the last term is one of 0 by 0; it is nearly the same where there is next to none.
    growth = torch.where(growth.abs() < _LEAST_GROWTH * w, _LEAST_GROWTH * w, growth)
    ndtr, forward = torch.special.ndtr, spot * growth.exp()
    d1 = torch.log(forward / level) / w + w / 2
    power = torch.exp((2 * growth / w.square() * torch.log(level / spot)).clamp(max=_MOST_WEIGHT))
    again = w.square() / (2 * growth) * (forward * ndtr(way * d1) - spot * power * ndtr(way * (d1 - 2 * growth / w)))
    plain = forward * ndtr(way * d1) - level * ndtr(way * (d1 - w))
    return (way * (plain + again) * (-shift).exp()).clamp(min=0)


def bachelier(distance: Tensor, deviation: Tensor) -> Tensor:
    """Expected max(X, 0) of a normal number with this mean and deviation. Shapes: (n,) each -> (n,).

    Source: Bachelier, "Théorie de la spéculation" (1900).
    """
    d = distance / deviation
    density = torch.exp(-d.square() / 2) / (2 * torch.pi) ** 0.5
    return distance * torch.special.ndtr(d) + deviation * density


def clipped_return(growth: Tensor, deviation: Tensor, floor: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(R - 1, floor), cap) of a log-normal ratio R. Shapes: (n, dates) -> two of the same.

    `growth` is the mean of R, `deviation` that of its logarithm.
    """
    ndtr, mean = torch.special.ndtr, growth.log() - deviation.square() / 2
    # A floor of -1 is never reached: its logarithm is cut.
    low, high = ((1 + floor).clamp(min=1e-9).log() - mean) / deviation, ((1 + cap).log() - mean) / deviation
    zeroth = ndtr(high) - ndtr(low)
    first = growth * (ndtr(high - deviation) - ndtr(low - deviation))
    second = growth.square() * deviation.square().exp() * (ndtr(high - 2 * deviation) - ndtr(low - 2 * deviation))
    below, above = ndtr(low), ndtr(-high)
    expected = floor * below + cap * above + first - zeroth
    squared = floor.square() * below + cap.square() * above + second - 2 * first + zeroth
    return expected, (squared - expected.square()).clamp(min=1e-14)


def double_barrier_option(
    spot: Tensor,
    strike: Tensor,
    low: Tensor,
    high: Tensor,
    growth: Tensor,
    deviation: Tensor,
    dates: int | None,
    *,
    sign: float,
) -> Tensor:
    """About the expected payoff of a call (sign 1) or put (-1) that dies at either barrier, each a ratio to the spot.

    Shapes: (n,) each -> (n,).
    Source: images, Ikeda and Kunitomo, "Pricing options with curved boundaries" (1992), two on either side.
    """
    w = deviation
    below, above = _barrier(low, w, dates, up=False), _barrier(high, w, dates, up=True)
    width, forward = above - below, spot * growth.exp()
    at = torch.log(strike / spot)
    bottom, top = (torch.maximum(at, below), above) if sign > 0 else (below, torch.minimum(at, above))
    bottom = torch.minimum(bottom, top)

    def part(shift: Tensor) -> Tensor:
        """Of the price that starts so far from the spot, in logarithms: what it pays between bottom and top."""
        moved = forward * shift.exp()
        d_low, d_high = ((shift + growth - x) / w + w / 2 for x in (bottom, top))
        ndtr = torch.special.ndtr
        asset, cash = ndtr(d_low) - ndtr(d_high), ndtr(d_low - w) - ndtr(d_high - w)
        return sign * (moved * asset - strike * cash)

    drift = growth / w.square() - 0.5
    total = torch.zeros_like(spot)
    for count in (-2, -1, 0, 1, 2):
        shift = 2 * count * width
        total = total + torch.exp((drift * shift).clamp(max=_MOST_WEIGHT)) * part(shift)
        image = 2 * above - shift
        total = total - torch.exp((drift * image).clamp(max=_MOST_WEIGHT)) * part(image)
    return total.clamp(min=0)


class NoteTerms(NamedTuple):
    """What an autocallable note pays. Shapes: (n,) each, in currency, coupons as shares; discounts (n, dates)."""

    call: Tensor
    coupon_level: Tensor
    protection: Tensor
    initial: Tensor
    coupon: Tensor
    discounts: Tensor
    memory: bool


def note_on_dates(forwards: Tensor, variances: Tensor, terms: NoteTerms) -> Tensor:
    """About what an autocallable note is worth, of a nominal of 1, if each date depends on the one before it alone.

    Shapes: forwards and variances of logarithms on dates, (n, dates) -> (n,).
    """
    deviations, ndtr = variances.sqrt(), torch.special.ndtr

    def below(level: Tensor) -> Tensor:
        """How far levels are above the median prices, in deviations. Shapes: (n,) -> (n, dates)."""
        return (torch.log(level[:, None] / forwards) + variances / 2) / deviations

    call, coupon = below(terms.call), below(torch.minimum(terms.coupon_level, terms.call))
    correlations = (variances[:, :-1] / variances[:, 1:]).sqrt()
    after_no_call = ndtr(call[:, :-1]).clamp(min=_LEAST_CHANCE)
    stays = bivariate_normal(call[:, :-1], call[:, 1:], correlations) / after_no_call
    misses = bivariate_normal(call[:, :-1], coupon[:, 1:], correlations) / after_no_call
    missed = ndtr(coupon[:, :-1]).clamp(min=_LEAST_CHANCE)
    misses_again = bivariate_normal(coupon[:, :-1], coupon[:, 1:], correlations) / missed
    alive, unpaid, value = torch.ones_like(terms.call), torch.zeros_like(terms.call), torch.zeros_like(terms.call)
    for date in range(forwards.shape[1]):
        first = date == 0
        stay, miss = (ndtr(call[:, 0]), ndtr(coupon[:, 0])) if first else (stays[:, date - 1], misses[:, date - 1])
        still_unpaid = unpaid if first or not terms.memory else unpaid * misses_again[:, date - 1]
        paid = alive * (1 - miss) + (unpaid - still_unpaid if terms.memory else 0)
        unpaid = still_unpaid + alive * miss
        value = value + terms.discounts[:, date] * (terms.coupon * paid + alive * (1 - stay))
        alive = alive * stay
    # What is lost at expiry, where the note was not called on the date in the middle.
    low, last = below(terms.protection)[:, -1], deviations[:, -1]
    low = torch.minimum(low, call[:, -1])
    middle = (forwards.shape[1] - 1) // 2
    apart = (variances[:, middle] / variances[:, -1]).sqrt().clamp(max=_MOST_CORRELATION)
    kept = bivariate_normal(call[:, middle], low, apart) / ndtr(low).clamp(min=_LEAST_CHANCE)
    lost = ndtr(low) - forwards[:, -1] / terms.initial * ndtr(low - last)
    return value + terms.discounts[:, -1] * (alive - lost * kept)


def bivariate_normal(x: Tensor, y: Tensor, correlation: Tensor) -> Tensor:
    """The probability that two normal numbers are below x and y, to a few digits for correlations up to 0.97.

    Shapes: the same for all. Source: Drezner and Wesolowsky, "On the computation of the bivariate normal integral"
    (1990): the probability of independent ones, and its derivative by the correlation integrated.
    """
    total, angle = torch.special.ndtr(x) * torch.special.ndtr(y), torch.asin(correlation)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        sine = torch.sin(angle * node)
        exponent = (x.square() + y.square() - 2 * x * y * sine) / (2 * (1 - sine.square()))
        total = total + weight * angle / (2 * torch.pi) * torch.exp(-exponent)
    return total.clamp(0, 1)


def smooth_maximum(one: Tensor, other: Tensor, width: float) -> Tensor:
    """The larger of two, its kink rounded over this width. Shapes: (n,) each -> (n,)."""
    return one + functional.softplus((other - one) / width) * width
