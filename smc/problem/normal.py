"""The standard normal distribution, in scalar functions that a process or a product may call."""

from __future__ import annotations

import math

__all__ = ["lower_tail", "quantile_of_half", "quantile_of_tail", "upper_tail"]


def upper_tail(z: float) -> float:
    """The probability that a standard normal is above z, its relative error 1.2e-7.

    Source: erfc by Chebyshev fitting, Press et al., "Numerical Recipes" (1992), section 6.2.
    """
    x = abs(z) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * x)
    y = t * 0.17087277 - 0.82215223
    y = y * t + 1.48851587
    y = y * t - 1.13520398
    y = y * t + 0.27886807
    y = y * t - 0.18628806
    y = y * t + 0.09678418
    y = y * t + 0.37409196
    y = y * t + 1.00002368
    y = y * t - 1.26551223
    far = 0.5 * t * math.exp(y - x * x)
    return far if z > 0.0 else 1.0 - far


def lower_tail(z: float) -> float:
    """The probability that a standard normal is below z, as precise as `upper_tail`."""
    return upper_tail(-z)


def quantile_of_tail(p: float) -> float:
    """The number that a standard normal is above with probability p; beyond what can be told apart, 40 or -40."""
    if p >= 1.0:
        return -40.0
    if p <= 0.0:
        return 40.0
    return -quantile_of_half(p) if p <= 0.5 else quantile_of_half(1.0 - p)


def quantile_of_half(p: float) -> float:
    """The standard normal's quantile for 0 < p <= 1/2, in double precision.

    Source: Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988), PPND16.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        n = 2.5090809287301226727e3 * r + 33430.575583588128105
        n = n * r + 67265.770927008700853
        n = n * r + 45921.953931549871457
        n = n * r + 13731.693765509461125
        n = n * r + 1971.5909503065514427
        n = n * r + 133.14166789178437745
        n = n * r + 3.387132872796366608
        d = 5.226495278852545925e3 * r + 28729.085735721942674
        d = d * r + 39307.89580009271061
        d = d * r + 21213.794301586595867
        d = d * r + 5394.1960214247511077
        d = d * r + 687.1870074920579083
        d = d * r + 42.313330701600911252
        d = d * r + 1.0
        return q * n / d
    r = math.sqrt(-math.log(p))
    if r <= 5.0:
        r -= 1.6
        n = 7.74545014278341407640e-4 * r + 0.0227238449892691845833
        n = n * r + 0.24178072517745061177
        n = n * r + 1.27045825245236838258
        n = n * r + 3.64784832476320460504
        n = n * r + 5.7694972214606914055
        n = n * r + 4.6303378461565452959
        n = n * r + 1.42343711074968357734
        d = 1.05075007164441684324e-9 * r + 5.475938084995344946e-4
        d = d * r + 0.0151986665636164571966
        d = d * r + 0.14810397642748007459
        d = d * r + 0.68976733498510000455
        d = d * r + 1.6763848301838038494
        d = d * r + 2.05319162663775882187
        d = d * r + 1.0
    else:
        r -= 5.0
        n = 2.01033439929228813265e-7 * r + 2.71155556874348757815e-5
        n = n * r + 0.0012426609473880784386
        n = n * r + 0.026532189526576123093
        n = n * r + 0.29656057182850489123
        n = n * r + 1.7848265399172913358
        n = n * r + 5.4637849111641143699
        n = n * r + 6.6579046435011037772
        d = 2.04426310338993978564e-15 * r + 1.4215117583164458887e-7
        d = d * r + 1.8463183175100546818e-5
        d = d * r + 7.868691311456132591e-4
        d = d * r + 0.0148753612908506148525
        d = d * r + 0.13692988092273580531
        d = d * r + 0.59983220655588793769
        d = d * r + 1.0
    return -n / d
