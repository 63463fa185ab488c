"""Standard normals addressed by (seed, contract, path, step): the same for every batch and device.

Two families, both pure functions of their address, so that a stream never depends on what was drawn before it. Here is
what is NumPy's: Philox and Box-Muller for whatever is drawn beside paths, Sobol points, and the bridge.
`smc.simulation.lanes` has both families for Numba, `smc.simulation.skeleton` for CUDA.

Sources: Philox4x32-10, Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). Box and Muller (1958). Sobol (1967). Nested uniform scrambling, Owen (1995), by hashing:
Burley, "Practical hash-based Owen scrambling" (JCGT 2020), with Vegdahl's constants (2021).
Brownian bridge: Moskowitz and Caflisch (1996).
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

from smc.models.numerical import Precision

__all__ = ["box_muller", "bridge_increments", "bridge_plan", "expiry_last", "philox4x32", "sobol_points"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(seed: int, counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for each 128-bit counter, ten rounds, keyed by a 64-bit seed.

    Shapes: four broadcastable uint64 arrays holding 32-bit words -> four uint64 arrays of 32-bit words.
    """
    mask, shift = np.uint64(_MASK), np.uint64(32)
    m0, m1 = (np.uint64(m) for m in _MULTIPLIERS)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    shape = np.broadcast_shapes(*(np.shape(c) for c in counter))
    c0, c1, c2, c3 = (np.broadcast_to(np.asarray(c, dtype=np.uint64), shape).copy() for c in counter)
    # In place: a fresh array for every operation would cost more than the operation.
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(10):
        np.multiply(c0, m0, out=p0)
        np.multiply(c2, m1, out=p1)
        for product, high, low, key in ((p1, c0, c1, k0), (p0, c2, c3, k1)):
            np.right_shift(product, shift, out=high)
            high ^= low
            high ^= np.uint64(key)
            np.bitwise_and(product, mask, out=low)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def box_muller(words: tuple[Any, Any, Any, Any], precision: Precision) -> list[Any]:
    """Normals from one Philox block: four in float32, two in float64 (53-bit uniforms).

    Uniforms are (i + 1/2) / 2^bits, never 0 or 1: the largest float32 normal is 6.77.
    """
    w0, w1, w2, w3 = words
    if precision is Precision.float32:
        pairs = [(_unit32(w0), _unit32(w1)), (_unit32(w2), _unit32(w3))]
    else:
        pairs = [(_unit53(w0, w1), _unit53(w2, w3))]
    two_pi, minus_two = precision.numpy.type(2 * np.pi), precision.numpy.type(-2)
    normals = []
    for u, angle in pairs:
        radius = np.sqrt(minus_two * np.log(u))
        normals += [radius * np.cos(two_pi * angle), radius * np.sin(two_pi * angle)]
    return normals


@lru_cache(maxsize=8)
def bridge_plan(steps: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """How a Brownian path is filled in after its end: the middle of the widest gap, each time with one more normal.

    Shapes: -> (steps - 1, 3) numbers of the points left, right and middle; (steps - 1, 3) weights of the path at the
    left and at the right, and of the normal.
    """
    places, weights, gaps = [], [], deque([(0, steps)])
    while gaps:
        left, right = gaps.popleft()
        if right - left < 2:
            continue
        middle = (left + right) // 2
        share = (middle - left) / (right - left)
        places.append((left, right, middle))
        weights.append((1 - share, share, np.sqrt((middle - left) * (right - middle) / (right - left))))
        gaps += [(left, middle), (middle, right)]
    return np.array(places, dtype=np.int64).reshape(-1, 3), np.array(weights, dtype=np.float64).reshape(-1, 3)


@lru_cache(maxsize=8)
def bridge_increments(steps: int) -> npt.NDArray[np.float64]:
    """Matrix that turns `steps` independent normals into increments of a Brownian path, coarse first.

    Column 0 moves the end point; the others are those of `bridge_plan`. The matrix is orthogonal: increments are unit
    normals again, to be scaled by sqrt(dt). Shapes: -> (steps, steps); increments = matrix @ normals.
    """
    path = np.zeros((steps + 1, steps))
    path[steps, 0] = np.sqrt(steps)
    for column, ((left, right, middle), (a, b, c)) in enumerate(zip(*bridge_plan(steps), strict=True), start=1):
        path[middle] = a * path[left] + b * path[right]
        path[middle, column] += c
    return np.diff(path, axis=0)


@lru_cache(maxsize=4)
def sobol_points(dimensions: int, paths: int) -> npt.NDArray[np.uint32]:
    """The first Sobol points, as bit-reversed 32-bit fractions. Shapes: -> (dimensions, paths)."""
    engine = qmc.Sobol(d=dimensions, scramble=False, bits=32)
    block = 1 << max(paths - 1, 1).bit_length()
    points = (engine.random(block)[:paths] * 2.0**32).astype(np.uint32)
    return np.ascontiguousarray(_reverse_bits(points).T)


def expiry_last(points: npt.NDArray[np.uint32], extras: int) -> npt.NDArray[np.uint32]:
    """Coordinates in the order of a path's normals, whose last ones, drawn at expiry, matter most: they get the first.

    Shapes: (dimensions, paths) -> the same.
    """
    return np.ascontiguousarray(np.roll(points, -extras, axis=0)) if extras else points


def _reverse_bits(x: Any) -> Any:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        s, m = np.uint32(shift), np.uint32(mask)
        x = ((x >> s) & m) | ((x & m) << s)
    return (x >> np.uint32(16)) | (x << np.uint32(16))


def _unit32(word: Any) -> Any:
    return (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)


def _unit53(high: Any, low: Any) -> Any:
    bits = (high >> np.uint64(5)) * np.uint64(1 << 26) + (low >> np.uint64(6))
    return (bits.astype(np.float64) + np.float64(0.5)) * np.float64(2.0**-53)
