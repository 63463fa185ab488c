"""Normals for a block of paths of one contract: the numbers of `smc.simulation.normals`, for Numba."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from numba import float32, float64, njit, uint32, uint64

from smc.problem.normal import quantile_of_half
from smc.simulation.elementary import inlined, log, normal_quantile, sine_and_cosine

__all__ = [
    "bridge_float32",
    "bridge_float64",
    "pseudorandom_float32",
    "pseudorandom_float64",
    "sobol_float32",
    "sobol_float64",
]

_LOW = 0xFFFFFFFF

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    made: Function = njit(fastmath=True, nogil=True, error_model="numpy", cache=True)(function)
    return made


@inlined
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds on four words, each 32 bits in a uint32."""
    for _ in range(10):
        p0 = uint64(0xD2511F53) * uint64(c0)
        p1 = uint64(0xCD9E8D57) * uint64(c2)
        c0 = uint32(p1 >> uint64(32)) ^ c1 ^ k0
        c1 = uint32(p1)
        c2 = uint32(p0 >> uint64(32)) ^ c3 ^ k1
        c3 = uint32(p0)
        k0 = uint32(k0 + uint32(0x9E3779B9))
        k1 = uint32(k1 + uint32(0xBB67AE85))
    return c0, c1, c2, c3


@inlined
def _unit32(word: Any) -> Any:
    return (float32(word) + float32(0.5)) * float32(2.0**-32)


@inlined
def _unit53(high: Any, low: Any) -> Any:
    bits = uint64(high >> uint32(5)) * uint64(1 << 26) + uint64(low >> uint32(6))
    return (float64(bits) + 0.5) * 2.0**-53


@_compiled
def pseudorandom_float32(seed: Any, stream: Any, begin: Any, width: Any, z: Any) -> None:
    """Fill z[i, lane] with normal number i of path begin + lane: four to a Philox block, in the order of the steps."""
    k0, k1 = uint32(uint64(seed) & uint64(_LOW)), uint32(uint64(seed) >> uint64(32))
    c2, c3 = uint32(uint64(stream) & uint64(_LOW)), uint32(uint64(stream) >> uint64(32))
    count = z.shape[0]
    for block in range((count + 3) // 4):
        left = count - 4 * block
        a, b = z[4 * block], z[min(4 * block + 1, count - 1)]
        c, d = z[min(4 * block + 2, count - 1)], z[min(4 * block + 3, count - 1)]
        for lane in range(width):
            w0, w1, w2, w3 = _philox(uint32(begin + lane), uint32(block), c2, c3, k0, k1)
            r0 = math.sqrt(float32(-2.0) * log(_unit32(w0)))
            s0, t0 = sine_and_cosine(_unit32(w1))
            a[lane] = r0 * t0
            if left > 1:
                b[lane] = r0 * s0
            if left > 2:
                r1 = math.sqrt(float32(-2.0) * log(_unit32(w2)))
                s1, t1 = sine_and_cosine(_unit32(w3))
                c[lane] = r1 * t1
                if left > 3:
                    d[lane] = r1 * s1


@_compiled
def pseudorandom_float64(seed: Any, stream: Any, begin: Any, width: Any, z: Any) -> None:
    """As `pseudorandom_float32`, two to a Philox block."""
    k0, k1 = uint32(uint64(seed) & uint64(_LOW)), uint32(uint64(seed) >> uint64(32))
    c2, c3 = uint32(uint64(stream) & uint64(_LOW)), uint32(uint64(stream) >> uint64(32))
    count = z.shape[0]
    for block in range((count + 1) // 2):
        for lane in range(width):
            w0, w1, w2, w3 = _philox(uint32(begin + lane), uint32(block), c2, c3, k0, k1)
            radius = math.sqrt(-2.0 * math.log(_unit53(w0, w1)))
            angle = 2.0 * math.pi * _unit53(w2, w3)
            z[2 * block, lane] = radius * math.cos(angle)
            if 2 * block + 1 < count:
                z[2 * block + 1, lane] = radius * math.sin(angle)


@inlined
def _scrambled(x: Any, key: Any) -> Any:
    """Burley's hash of a bit-reversed point, turned round again."""
    x = uint32(x ^ uint32(x * uint32(0x3D20ADEA)))
    x = uint32(uint32(x + key) * uint32((key >> uint32(16)) | uint32(1)))
    x = uint32(x ^ uint32(x * uint32(0x05526C56)))
    x = uint32(x ^ uint32(x * uint32(0x53A22864)))
    x = uint32(((x >> uint32(1)) & uint32(0x55555555)) | ((x & uint32(0x55555555)) << uint32(1)))
    x = uint32(((x >> uint32(2)) & uint32(0x33333333)) | ((x & uint32(0x33333333)) << uint32(2)))
    x = uint32(((x >> uint32(4)) & uint32(0x0F0F0F0F)) | ((x & uint32(0x0F0F0F0F)) << uint32(4)))
    x = uint32(((x >> uint32(8)) & uint32(0x00FF00FF)) | ((x & uint32(0x00FF00FF)) << uint32(8)))
    return uint32((x >> uint32(16)) | (x << uint32(16)))


@_compiled
def sobol_float32(points: Any, seed: Any, stream: Any, begin: Any, width: Any, z: Any) -> None:
    """Fill z[i, lane] with the normal of coordinate i of Sobol point begin + lane, scrambled for this contract."""
    k0, k1 = uint32(uint64(seed) & uint64(_LOW)), uint32(uint64(seed) >> uint64(32))
    c2, c3 = uint32(uint64(stream) & uint64(_LOW)), uint32(uint64(stream) >> uint64(32))
    for i in range(points.shape[0]):
        key = _philox(uint32(i), uint32(_LOW), c2, c3, k0, k1)[0]
        for lane in range(width):
            x = _scrambled(points[i, begin + lane], key)
            upper = x >> uint32(31)
            folded = uint32(x ^ uint32(uint32(0) - upper))
            p = (float32(folded) + float32(0.5)) * float32(2.0**-32)
            value = normal_quantile(p)
            z[i, lane] = -value if upper else value


def _bridge_of(real: Any) -> Callable[..., None]:
    @_compiled
    def bridge(z: Any, normals: Any, steps: Any, plan: Any, weights: Any, width: Any, path: Any) -> None:
        for factor in range(normals):
            root = real(math.sqrt(steps))
            for lane in range(width):
                path[0, lane] = real(0.0)
                path[steps, lane] = root * z[factor, lane]
            for number in range(plan.shape[0]):
                left, right, middle = plan[number, 0], plan[number, 1], plan[number, 2]
                a, b, c = weights[number, 0], weights[number, 1], weights[number, 2]
                column = normals * (number + 1) + factor
                for lane in range(width):
                    path[middle, lane] = a * path[left, lane] + b * path[right, lane] + c * z[column, lane]
            for step in range(steps):
                for lane in range(width):
                    z[normals * step + factor, lane] = path[step + 1, lane] - path[step, lane]

    return bridge


bridge_float32 = _bridge_of(float32)
"""Turn normals into a Brownian path's increments, coarse first. Shapes: z (normals x steps, lanes), in place."""
bridge_float64 = _bridge_of(float64)


_quantile64 = inlined(quantile_of_half)


@_compiled
def sobol_float64(points: Any, seed: Any, stream: Any, begin: Any, width: Any, z: Any) -> None:
    """As `sobol_float32`."""
    k0, k1 = uint32(uint64(seed) & uint64(_LOW)), uint32(uint64(seed) >> uint64(32))
    c2, c3 = uint32(uint64(stream) & uint64(_LOW)), uint32(uint64(stream) >> uint64(32))
    for i in range(points.shape[0]):
        key = _philox(uint32(i), uint32(_LOW), c2, c3, k0, k1)[0]
        for lane in range(width):
            x = _scrambled(points[i, begin + lane], key)
            upper = x >> uint32(31)
            folded = uint32(x ^ uint32(uint32(0) - upper))
            value = _quantile64((float64(folded) + 0.5) * 2.0**-32)
            z[i, lane] = -value if upper else value
