"""Normals of scrambled Sobol points in plain NumPy, to compare with what is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtri

from smc.models.numerical import Precision
from smc.simulation.normals import philox4x32, sobol_points

_MASK = 0xFFFFFFFF


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
    z = ndtri(p.astype(np.float64)).astype(dtype)
    return np.where(upper, -z, z)
