"""The path kernels: random numbers and time steps of one path in one thread's registers.

Nothing but terminal prices is written to memory. Counters, uniforms and Sobol points are those of
`smc.simulation.normals`, so CPU and GPU simulate the same paths up to the rounding of the elementary functions.
Each launch reads contracts and stream index from device memory: a CUDA graph that holds it may be replayed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from smc.models.numerical import Precision
from smc.simulation.cuda import Kernel

__all__ = [
    "MOST_ROWS",
    "NORMALS_SOURCE",
    "PATHS_SOURCE",
    "path_kernel",
    "simulate_pseudorandom",
    "simulate_sobol",
    "sobol_normals",
    "walk",
]

NORMALS_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ void philox4x32_10(u32& c0, u32& c1, u32& c2, u32& c3, u32 k0, u32 k1) {
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;  c1 = l1;
        c2 = h0 ^ c3 ^ k1;  c3 = l0;
        k0 += 0x9E3779B9u;  k1 += 0xBB67AE85u;
    }
}

#if DOUBLE
typedef double real;
#define PER_BLOCK 2
__device__ __forceinline__ double unit(u32 high, u32 low) {
    return ((double)(((u64)(high >> 5) << 26) + (low >> 6)) + 0.5) * 0x1p-53;
}
__device__ __forceinline__ void normals(u32 c0, u32 c1, u32 c2, u32 c3, real* z) {
    double s, c;
    const double radius = sqrt(-2.0 * log(unit(c0, c1)));
    sincospi(2.0 * unit(c2, c3), &s, &c);
    z[0] = radius * c;  z[1] = radius * s;
}
#else
typedef float real;
#define PER_BLOCK 4
__device__ __forceinline__ void pair(u32 a, u32 b, real* z) {
    // One instruction each: u is no denormal, so the forms that flush them need no guard. Next to u = 1 the
    // fast logarithm may round to just above zero; the absolute value is free.
    float log2u, radius, s, c;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2u) : "f"(fmaf((float)a, 0x1p-32f, 0x1p-33f)));
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(fabsf(1.38629436111989062f * log2u)));
    // The fast sine and cosine are accurate within (-pi, pi): turn the angle by half a circle.
    const float angle = fmaf((float)b, 6.28318530717958648f * 0x1p-32f, -3.14159265358979324f);
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
    z[0] = -radius * c;  z[1] = -radius * s;
}
__device__ __forceinline__ void normals(u32 c0, u32 c1, u32 c2, u32 c3, real* z) {
    pair(c0, c1, z);  pair(c2, c3, z + 2);
}
#endif
"""
"""Random words and normals, in the precision that DOUBLE says."""

PATHS_SOURCE = (
    NORMALS_SOURCE
    + r"""
struct Dynamics {
    real X0, volatility, growth, drift;  // of one step, but for the drift of the whole log price
    __device__ Dynamics(const double* p, int steps) {
        const double T = p[2], carry = p[3] - p[4], v = p[5], dt = T / steps;
        X0 = (real)p[0];
        volatility = (real)(v * sqrt(dt));
        growth = (real)(1.0 + carry * dt);
        drift = (real)((carry - 0.5 * v * v) * T);
    }
    // From the sum of all the normals of a path, and by one Euler step: a step may cross zero, a price may not.
    __device__ real after(real sum) const { return X0 * exp(fma(volatility, sum, drift)); }
    __device__ real euler(real price, real z) const { return fabs(price * fma(volatility, z, growth)); }
};

extern "C" __global__ __launch_bounds__(1024) void pseudorandom(
    const double* __restrict__ contracts,   // (n, 6): X0, K, T, r, d, v
    const u64* __restrict__ first,          // stream index of contract 0
    const u64 offset, const u64 seed, const int paths, const int steps,
    real* __restrict__ out)                 // (n, paths)
{
    const u32 path = blockIdx.x * blockDim.x + threadIdx.x;
    if (path >= (u32)paths) return;
    const Dynamics gbm(contracts + 6ull * blockIdx.y, steps);
    const u64 stream = *first + offset + blockIdx.y;
    const u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    real state = LOG_RETURN ? (real)0 : gbm.X0;
    real z[PER_BLOCK];
    int block = 0;
    for (int left = steps; left > 0; left -= PER_BLOCK, ++block) {
        u32 c0 = path, c1 = block, c2 = (u32)stream, c3 = (u32)(stream >> 32);
        philox4x32_10(c0, c1, c2, c3, k0, k1);
        normals(c0, c1, c2, c3, z);
        if (left < PER_BLOCK) break;
        #pragma unroll
        for (int i = 0; i < PER_BLOCK; ++i) state = LOG_RETURN ? state + z[i] : gbm.euler(state, z[i]);
    }
    #pragma unroll
    for (int i = 0; i < PER_BLOCK - 1; ++i)
        if (i < steps % PER_BLOCK) state = LOG_RETURN ? state + z[i] : gbm.euler(state, z[i]);
    out[(u64)blockIdx.y * paths + path] = LOG_RETURN ? gbm.after(state) : state;
}

// Normal quantile of one scrambled Sobol coordinate. `point` is bit-reversed, as the hash wants it.
__device__ real sobol_normal(u32 point, u32 dimension, u64 stream, u64 seed) {
    u32 key = dimension, c1 = 0xFFFFFFFFu, c2 = (u32)stream, c3 = (u32)(stream >> 32);
    philox4x32_10(key, c1, c2, c3, (u32)seed, (u32)(seed >> 32));
    u32 x = point;
    x ^= x * 0x3D20ADEAu;
    x = (x + key) * ((key >> 16) | 1u);
    x ^= x * 0x05526C56u;
    x ^= x * 0x53A22864u;
    x = __brev(x);
    // Fold at the median: both tails keep their relative precision, in float32 too.
    const bool upper = x >> 31;
    const real p = ((real)(upper ? ~x : x) + (real)0.5) * (real)0x1p-32;
#if DOUBLE
    const real z = normcdfinv(p);
#else
    const real z = normcdfinvf(p);
#endif
    return upper ? -z : z;
}

extern "C" __global__ __launch_bounds__(1024) void sobol_end(
    const double* __restrict__ contracts, const u64* __restrict__ first,
    const u64 offset, const u64 seed, const int paths, const int steps, real* __restrict__ out)
{
    const u32 path = blockIdx.x * blockDim.x + threadIdx.x;
    if (path >= (u32)paths) return;
    const Dynamics gbm(contracts + 6ull * blockIdx.y, steps);
    // The first Sobol coordinate of point i is the bit-reversed Gray code of i.
    const real z = sobol_normal(path ^ (path >> 1), 0, *first + offset + blockIdx.y, seed);
    out[(u64)blockIdx.y * paths + path] = gbm.after(z * sqrt((real)steps));
}

extern "C" __global__ __launch_bounds__(1024) void sobol_points(
    const u32* __restrict__ points,         // (dimensions, paths), bit-reversed
    const u64* __restrict__ first, const u64 offset, const u64 seed, const int paths, const int dimensions,
    real* __restrict__ out)                 // (n, dimensions, paths)
{
    const u32 path = blockIdx.x * blockDim.x + threadIdx.x, dimension = blockIdx.y;
    if (path >= (u32)paths) return;
    const u32 point = points[(u64)dimension * paths + path];
    out[((u64)blockIdx.z * dimensions + dimension) * paths + path] =
        sobol_normal(point, dimension, *first + offset + blockIdx.z, seed);
}

extern "C" __global__ __launch_bounds__(1024) void walk(
    const double* __restrict__ contracts, const real* __restrict__ increments,  // (n, steps, paths)
    const int paths, const int steps, real* __restrict__ out)
{
    const u32 path = blockIdx.x * blockDim.x + threadIdx.x;
    if (path >= (u32)paths) return;
    const Dynamics gbm(contracts + 6ull * blockIdx.y, steps);
    const real* z = increments + (u64)blockIdx.y * steps * paths + path;
    real price = gbm.X0;
    for (int step = 0; step < steps; ++step) price = gbm.euler(price, z[(u64)step * paths]);
    out[(u64)blockIdx.y * paths + path] = price;
}
"""
)

MOST_ROWS = 65535
"""Contracts of one launch: grid dimensions y and z hold no more blocks."""


def simulate_pseudorandom(
    contracts: Tensor, first: Tensor, *, seed: int, paths: int, steps: int, threads: int, log_return: bool,
    precision: Precision,
) -> Tensor:  # fmt: skip
    """Terminal prices of every path of every contract, by Philox.

    Shapes: contracts (n, 6) float64 and first () int64, both on the device -> (n, paths).
    """
    kernel = path_kernel("pseudorandom", log_return, precision)
    return _by_rows(kernel, contracts, first, seed, paths, steps, threads, precision)


def simulate_sobol(
    contracts: Tensor, first: Tensor, *, seed: int, paths: int, steps: int, threads: int, precision: Precision
) -> Tensor:
    """Terminal prices by scrambled Sobol points, log scheme: only a bridge's end point matters to it."""
    kernel = path_kernel("sobol_end", True, precision)
    return _by_rows(kernel, contracts, first, seed, paths, steps, threads, precision)


def sobol_normals(
    points: Tensor, first: Tensor, offset: int, count: int, *, seed: int, threads: int, precision: Precision
) -> Tensor:
    """Normals of scrambled Sobol points. Shapes: points (dimensions, paths) -> (count, dimensions, paths)."""
    dimensions, paths = points.shape
    out = torch.empty((count, dimensions, paths), dtype=precision.torch, device=points.device)
    arguments = (points, first, np.uint64(offset), np.uint64(seed), np.int32(paths), np.int32(dimensions), out)
    path_kernel("sobol_points", False, precision)((-(-paths // threads), dimensions, count), threads, arguments)
    return out


def walk(contracts: Tensor, increments: Tensor, *, threads: int, precision: Precision) -> Tensor:
    """Euler walks over given normals. Shapes: contracts (n, 6), increments (n, steps, paths) -> (n, paths)."""
    n, steps, paths = increments.shape
    out = torch.empty((n, paths), dtype=precision.torch, device=contracts.device)
    arguments = (contracts, increments, np.int32(paths), np.int32(steps), out)
    path_kernel("walk", False, precision)((-(-paths // threads), n), threads, arguments)
    return out


def _by_rows(
    kernel: Kernel, contracts: Tensor, first: Tensor, seed: int, paths: int, steps: int, threads: int,
    precision: Precision,
) -> Tensor:  # fmt: skip
    out = torch.empty((len(contracts), paths), dtype=precision.torch, device=contracts.device)
    for start in range(0, len(contracts), MOST_ROWS):
        part = contracts[start : start + MOST_ROWS]
        sizes = (np.uint64(start), np.uint64(seed), np.int32(paths), np.int32(steps))
        kernel((-(-paths // threads), len(part)), threads, (part, first, *sizes, out[start:]))
    return out


@lru_cache(maxsize=16)
def path_kernel(name: str, log_return: bool, precision: Precision) -> Kernel:
    """The kernel `name` of `PATHS_SOURCE`, for one scheme and precision."""
    return Kernel(PATHS_SOURCE, name, LOG_RETURN=int(log_return), DOUBLE=int(precision is Precision.float64))
