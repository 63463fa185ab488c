"""Elementary functions in single precision that a compiler can apply to a whole vector of paths at once.

They are polynomials without a call, a table or a branch, with errors of one or two units in the last place. `math.exp`
and the like in a process or a product mean these on a CPU, in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import float32, int32, njit
from numba.extending import intrinsic

__all__ = ["FAST", "exp", "inlined", "log", "normal_quantile", "sine_and_cosine"]

FAST = {"fastmath": True, "nogil": True, "error_model": "numpy", "forceinline": True}

Function = TypeVar("Function", bound=Callable[..., Any])


def inlined(function: Function) -> Function:
    """A scalar function that becomes part of whatever loop calls it."""
    made: Function = njit(**FAST)(function)
    return made


# Coefficients: least squares at Chebyshev nodes, errors below those of single precision.
_EXP = (1.0, 1.00000004, 0.50000001, 0.16666415, 0.04166622, 0.00837514, 0.00139486)
_SIN = (6.28318531, -41.34170212, 81.60522621, -76.70428132, 42.00980573, -14.3941354)
_MIDDLE = (
    2.12331348,
    0.348802042,
    -0.00590772125,
    -0.0017716538,
    0.000308789168,
    -7.01413652e-06,
    -4.89792526e-06,
    6.58215623e-07,
    3.29311571e-08,
    -1.23599875e-08,
)
_TAIL = (
    4.68574945,
    1.42442721,
    0.0048315307,
    -0.00306912398,
    0.0016557506,
    -0.00100507983,
    0.000660695528,
    -0.000402143157,
    0.000114283688,
    4.40346189e-05,
    -2.77374148e-05,
)
_COS = (1.0, -19.73920855, 64.93934655, -85.4535682, 60.14395234, -24.98183617)


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float32 as an int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return int32(float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(typingctx: Any, x: Any) -> Any:
    """The float32 with these bits, an int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(int32), codegen


@inlined
def exp(x: float) -> float:
    """e to the x, for x between -87 and 88; beyond, its value there."""
    x = min(max(x, float32(-87.0)), float32(88.0))
    n = math.floor(x * float32(1.44269504) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)
    y = float32(_EXP[6])
    y = y * r + float32(_EXP[5])
    y = y * r + float32(_EXP[4])
    y = y * r + float32(_EXP[3])
    y = y * r + float32(_EXP[2])
    y = y * r + float32(_EXP[1])
    y = y * r + float32(_EXP[0])
    return y * _from_bits(int32((int32(n) + int32(127)) << int32(23)))


@inlined
def log(x: float) -> float:
    """The natural logarithm of a positive number that is not denormal."""
    # x = 2^k m with m in [0.7, 1.41); the polynomial is that of Cephes' logf.
    bits = _bits(x)
    k = int32(int32(bits - int32(0x3F3504F3)) >> int32(23))
    m = _from_bits(int32(bits - int32(k << int32(23)))) - float32(1.0)
    z = m * m
    y = float32(7.0376836292e-2)
    y = y * m + float32(-1.1514610310e-1)
    y = y * m + float32(1.1676998740e-1)
    y = y * m + float32(-1.2420140846e-1)
    y = y * m + float32(1.4249322787e-1)
    y = y * m + float32(-1.6668057665e-1)
    y = y * m + float32(2.0000714765e-1)
    y = y * m + float32(-2.4999993993e-1)
    y = y * m + float32(3.3333331174e-1)
    return m + (y * m * z - float32(0.5) * z) + float32(k) * float32(0.69314718056)


@inlined
def sine_and_cosine(turns: float) -> tuple[float, float]:
    """Sine and cosine of an angle between 0 and 1 turn. float32."""
    # From half a turn to the nearest of three multiples of a half, on which both are polynomials.
    t = turns - float32(0.5)
    k = math.floor(t * float32(2.0) + float32(0.5))
    r = t - k * float32(0.5)
    q = r * r
    s = float32(_SIN[5])
    s = s * q + float32(_SIN[4])
    s = s * q + float32(_SIN[3])
    s = s * q + float32(_SIN[2])
    s = s * q + float32(_SIN[1])
    s = s * q + float32(_SIN[0])
    c = float32(_COS[5])
    c = c * q + float32(_COS[4])
    c = c * q + float32(_COS[3])
    c = c * q + float32(_COS[2])
    c = c * q + float32(_COS[1])
    c = c * q + float32(_COS[0])
    sign = float32(1.0) - float32(2.0) * k * k  # k is -1, 0 or 1; half a turn was taken off
    return -sign * s * r, -sign * c


@inlined
def normal_quantile(p: float) -> float:
    """The standard normal's quantile for 2^-33 <= p <= 1/2.

    Source: the form is that of Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011): a polynomial in
    w = -log(4 p (1 - p)) for the middle and one in its root for the tail, both computed, so that no path branches.
    """
    w = max(-log(float32(4.0) * p * (float32(1.0) - p)), float32(0.0))
    a = w - float32(2.5)
    c = float32(_MIDDLE[9])
    c = c * a + float32(_MIDDLE[8])
    c = c * a + float32(_MIDDLE[7])
    c = c * a + float32(_MIDDLE[6])
    c = c * a + float32(_MIDDLE[5])
    c = c * a + float32(_MIDDLE[4])
    c = c * a + float32(_MIDDLE[3])
    c = c * a + float32(_MIDDLE[2])
    c = c * a + float32(_MIDDLE[1])
    c = c * a + float32(_MIDDLE[0])
    t = math.sqrt(w) - float32(3.478)
    g = float32(_TAIL[10])
    g = g * t + float32(_TAIL[9])
    g = g * t + float32(_TAIL[8])
    g = g * t + float32(_TAIL[7])
    g = g * t + float32(_TAIL[6])
    g = g * t + float32(_TAIL[5])
    g = g * t + float32(_TAIL[4])
    g = g * t + float32(_TAIL[3])
    g = g * t + float32(_TAIL[2])
    g = g * t + float32(_TAIL[1])
    g = g * t + float32(_TAIL[0])
    return (c if w < float32(5.0) else g) * (float32(2.0) * p - float32(1.0))
