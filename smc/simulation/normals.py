"""Standard normals addressed by (seed, contract, path, step): the same for every batch and device.

Two families, both pure functions of their address, so that a stream never depends on what was drawn
before it. These are NumPy's; `smc.simulation.skeleton` draws the same numbers in its kernels.

Sources: Philox4x32-10, Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). Box and Muller (1958). Sobol (1967). Nested uniform scrambling, Owen (1995), by hashing:
Burley, "Practical hash-based Owen scrambling" (JCGT 2020), with Vegdahl's constants (2021).
Brownian bridge: Moskowitz and Caflisch (1996). Normal quantile: Wichura, AS 241 (1988).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import qmc

from smc.models.numerical import Precision

__all__ = ["box_muller", "bridge_increments", "philox4x32", "sobol_normals", "sobol_points"]

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


def sobol_normals(seed: int, contracts: Any, paths: int, dimensions: int, precision: Precision) -> Any:
    """Normals of `paths` Sobol points, scrambled independently for each contract and dimension.

    Shapes: contracts (n,) uint64 stream indices -> (n, dimensions, paths).
    """
    points = sobol_points(dimensions, paths)
    low, high = contracts & np.uint64(_MASK), contracts >> np.uint64(32)
    dims = np.arange(dimensions, dtype=np.uint64)
    # Word 1 all ones: no pseudo-random path has this counter, whose word 1 is a block of steps.
    keys = philox4x32(seed, (dims[None, :], _MASK, low[:, None], high[:, None]))[0].astype(np.uint32)
    x = _owen_hash(points[None, :, :], keys[:, :, None])
    return _folded_quantile(_reverse_bits(x), precision)


def bridge_increments(steps: int) -> npt.NDArray[np.float64]:
    """Matrix that turns `steps` independent normals into increments of a Brownian path, coarse first.

    Column 0 moves the end point; each later column refines the middle of the widest gap left. The
    matrix is orthogonal: increments are unit normals again, to be scaled by sqrt(dt).
    Shapes: -> (steps, steps); increments = matrix @ normals.
    """
    return _bridge(steps)


@lru_cache(maxsize=8)
def _bridge(steps: int) -> npt.NDArray[np.float64]:
    path = np.zeros((steps + 1, steps))
    path[steps, 0] = np.sqrt(steps)
    column = 1
    gaps = [(0, steps)]
    while gaps:
        left, right = gaps.pop(0)
        if right - left < 2:
            continue
        middle = (left + right) // 2
        share = (middle - left) / (right - left)
        path[middle] = (1 - share) * path[left] + share * path[right]
        path[middle, column] += np.sqrt((middle - left) * (right - middle) / (right - left))
        column += 1
        gaps += [(left, middle), (middle, right)]
    return np.diff(path, axis=0)


@lru_cache(maxsize=4)
def sobol_points(dimensions: int, paths: int) -> npt.NDArray[np.uint32]:
    """The first Sobol points, as bit-reversed 32-bit fractions. Shapes: -> (dimensions, paths)."""
    engine = qmc.Sobol(d=dimensions, scramble=False, bits=32)
    block = 1 << max(paths - 1, 1).bit_length()
    points = (engine.random(block)[:paths] * 2.0**32).astype(np.uint32)
    return np.ascontiguousarray(_reverse_bits(points).T)


def _owen_hash(x: Any, key: Any) -> Any:
    x = x ^ (x * np.uint32(0x3D20ADEA))
    x = (x + key) * ((key >> np.uint32(16)) | np.uint32(1))
    x ^= x * np.uint32(0x05526C56)
    x ^= x * np.uint32(0x53A22864)
    return x


def _reverse_bits(x: Any) -> Any:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        s, m = np.uint32(shift), np.uint32(mask)
        x = ((x >> s) & m) | ((x & m) << s)
    return (x >> np.uint32(16)) | (x << np.uint32(16))


def _folded_quantile(x: Any, precision: Precision) -> Any:
    # Fold at the median: p = min(u, 1 - u) keeps its relative precision in both tails, in float32 too.
    upper = (x >> np.uint32(31)).astype(bool)
    folded = np.where(upper, ~x, x)
    dtype = precision.numpy
    p = (folded.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-32)
    z = _lower_quantile32(p) if precision is Precision.float32 else ndtri(p)
    return np.where(upper, -z, z)


def _lower_quantile32(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normal quantile for 0 < p <= 1/2, relative error about 1e-7 (PPND7 of AS 241).

    scipy's costs 14 ns a number against 3 here, and torch's erfinv rounds differently at the ends of
    its vector loop, which would make a label depend on the batch it was simulated in.
    """
    q = p - np.float32(0.5)
    r = np.float32(0.180625) - q * q
    z = q * _ratio(
        r,
        (3.3871327179e0, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1),
        (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1),
    )
    tail = np.flatnonzero(p < np.float32(0.075))
    if tail.size:
        r = np.sqrt(-np.log(p.reshape(-1)[tail]))
        near = _ratio(
            r - np.float32(1.6),
            (1.4234372777e0, 2.7568153900e0, 1.3067284816e0, 1.7023821103e-1),
            (1.0, 7.3700164250e-1, 1.2021132975e-1),
        )
        far = _ratio(
            r - np.float32(5.0),
            (6.6579051150e0, 3.0812263860e0, 4.2868294337e-1, 1.7337203997e-2),
            (1.0, 2.4197894225e-1, 1.2258202635e-2),
        )
        z.reshape(-1)[tail] = -np.where(r <= 5, near, far)
    return np.asarray(z, dtype=np.float32)


def _ratio(
    r: npt.NDArray[np.float32], numerator: tuple[float, ...], denominator: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    def horner(coefficients: tuple[float, ...]) -> npt.NDArray[np.float32]:
        value = np.full_like(r, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value *= r
            value += np.float32(c)
        return value

    return horner(numerator) / horner(denominator)


def _unit32(word: Any) -> Any:
    return (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)


def _unit53(high: Any, low: Any) -> Any:
    bits = (high >> np.uint64(5)) * np.uint64(1 << 26) + (low >> np.uint64(6))
    return (bits.astype(np.float64) + np.float64(0.5)) * np.float64(2.0**-53)
