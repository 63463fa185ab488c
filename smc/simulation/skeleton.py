"""The CUDA C++ around a problem's own functions: random numbers and the loop over time steps, one path in a thread.

Nothing but payoffs is written to memory. Counters, uniforms and Sobol points are those of `smc.simulation.normals`, so
CPU and GPU simulate the same paths up to the rounding of the elementary functions. Each launch reads contracts and
stream index from device memory: a CUDA graph that holds it may be replayed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from smc.models.numerical import Precision
from smc.simulation.cuda import Kernel

__all__ = ["MOST_ROWS", "NORMALS_SOURCE", "PATHS_SOURCE", "sobol_normals"]

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

PATHS_SOURCE = r"""
extern "C" __device__ void prepare(const double* contract, int steps, real* s, real* a, real* k, real* q);
extern "C" __device__ void step_once(real* s, const real* z, const real* k);
extern "C" __device__ void look(real* a, const real* s, real date, const real* k, const real* q);
extern "C" __device__ void between(
    real* a, const real* before, const real* s, const real* z, real share, const real* k, const real* q);
extern "C" __device__ void pays(const real* a, const real* s, const real* e, const real* k, const real* q, real* out);

struct Path {
    real s[STATE], a[SEEN], k[PROCESS], q[PRODUCT];
    real date;
    int until;                              // steps to the next date
    const int stride;
    int taken;
    const real per_step;
    __device__ Path(const double* contract, int steps, int stride)
        : date(0), until(stride), stride(stride), taken(0), per_step((real)1 / steps) {
        prepare(contract, steps, s, a, k, q);
    }
    __device__ void step(const real* z) {
        real before[STATE];
        #pragma unroll
        for (int i = 0; i < STATE; ++i) before[i] = s[i];
        step_once(s, z, k);
        if (BETWEEN) between(a, before, s, z, (taken++ + (real)0.5) * per_step, k, q);
        if (DATES) {
            if (EVERY_STEP || --until == 0) {
                until = stride;
                date += 1;
                look(a, s, date, k, q);
            }
        }
    }
    __device__ void store(const real* e, real* __restrict__ out, int paths) const {
        real gives[OUTPUTS];                // what a path gives: its payoff, and more of an outer path
        pays(a, s, e, k, q, gives);
        #pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) out[(u64)i * paths] = gives[i];
    }
};

// TABLES is 1, or 2 for pairs of contracts on the same normals.
#if TABLES == 1
#define CONTRACTS const double* __restrict__ contracts
#define OUT real* __restrict__ out
#define START Path path(contracts + (u64)FIELDS * blockIdx.y, steps, stride);
#define STEP(z) path.step(z)
#define STORE(e) path.store(e, out + (u64)blockIdx.y * OUTPUTS * paths + at, paths)
#else
#define CONTRACTS const double* __restrict__ contracts, const double* __restrict__ beside
#define OUT real* __restrict__ out, real* __restrict__ out_beside
#define START Path path(contracts + (u64)FIELDS * blockIdx.y, steps, stride); \
                    Path other(beside + (u64)FIELDS * blockIdx.y, steps, stride);
#define STEP(z) (path.step(z), other.step(z))
#define STORE(e) path.store(e, out + (u64)blockIdx.y * OUTPUTS * paths + at, paths); \
                 other.store(e, out_beside + (u64)blockIdx.y * OUTPUTS * paths + at, paths)
#endif

extern "C" __global__ __launch_bounds__(THREADS) void pseudorandom(
    CONTRACTS, const u64* __restrict__ first,
    const u64 offset, const u64 seed, const int paths, const int steps, const int stride, OUT)
{
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (u32)paths) return;
    START
    const u64 stream = *first + offset + blockIdx.y;
    const u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    real z[BLOCKS * PER_BLOCK];             // of GROUP steps, which take whole blocks of random words
    int block = 0, left = steps;
    for (; left >= GROUP; left -= GROUP) {
        #pragma unroll
        for (int b = 0; b < BLOCKS; ++b, ++block) {
            u32 c0 = at, c1 = block, c2 = (u32)stream, c3 = (u32)(stream >> 32);
            philox4x32_10(c0, c1, c2, c3, k0, k1);
            normals(c0, c1, c2, c3, z + b * PER_BLOCK);
        }
        #pragma unroll
        for (int i = 0; i < GROUP; ++i) STEP(z + i * NORMALS);
    }
    if (left > 0) {
        #pragma unroll
        for (int b = 0; b < BLOCKS; ++b, ++block) {
            u32 c0 = at, c1 = block, c2 = (u32)stream, c3 = (u32)(stream >> 32);
            philox4x32_10(c0, c1, c2, c3, k0, k1);
            normals(c0, c1, c2, c3, z + b * PER_BLOCK);
        }
        #pragma unroll
        for (int i = 0; i < GROUP - 1; ++i)
            if (i < left) STEP(z + i * NORMALS);
    }
    real e[EXTRAS + 1];                     // normals of expiry, which follow those of the steps
    #pragma unroll
    for (int i = 0; i < EXTRAS; ++i) {
        const u32 number = (u32)NORMALS * steps + i;
        u32 c0 = at, c1 = number / PER_BLOCK, c2 = (u32)stream, c3 = (u32)(stream >> 32);
        philox4x32_10(c0, c1, c2, c3, k0, k1);
        normals(c0, c1, c2, c3, z);
        e[i] = z[0];
        #pragma unroll
        for (int j = 1; j < PER_BLOCK; ++j)
            if (number % PER_BLOCK == j) e[i] = z[j];
    }
    STORE(e);
}

extern "C" __global__ __launch_bounds__(THREADS) void walk(
    CONTRACTS, const real* __restrict__ increments,  // (n, steps, NORMALS, paths)
    const real* __restrict__ at_expiry,     // (n, EXTRAS, paths), so many numbers apart from row to row
    const u64 apart,
    const int paths, const int steps, const int stride, OUT)
{
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (u32)paths) return;
    START
    const real* from = increments + (u64)blockIdx.y * steps * NORMALS * paths + at;
    real z[NORMALS];
    for (int i = 0; i < steps; ++i) {
        #pragma unroll
        for (int j = 0; j < NORMALS; ++j) z[j] = from[((u64)i * NORMALS + j) * paths];
        STEP(z);
    }
    real e[EXTRAS + 1];
    #pragma unroll
    for (int i = 0; i < EXTRAS; ++i) e[i] = at_expiry[(u64)blockIdx.y * apart + (u64)i * paths + at];
    STORE(e);
}
"""
"""The paths of a problem, whose functions and sizes are linked and defined in front of it."""

_SOBOL_SOURCE = (
    NORMALS_SOURCE
    + r"""
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
"""
)

MOST_ROWS = 65535
"""Contracts of one launch: grid dimensions y and z hold no more blocks."""


def sobol_normals(
    points: Tensor, first: Tensor, offset: int, count: int, *, seed: int, threads: int, precision: Precision
) -> Tensor:
    """Normals of scrambled Sobol points. Shapes: points (dimensions, paths) -> (count, dimensions, paths)."""
    dimensions, paths = points.shape
    out = torch.empty((count, dimensions, paths), dtype=precision.torch, device=points.device)
    arguments = (points, first, np.uint64(offset), np.uint64(seed), np.int32(paths), np.int32(dimensions), out)
    _sobol_kernel(precision)((-(-paths // threads), dimensions, count), threads, arguments)
    return out


@lru_cache(maxsize=2)
def _sobol_kernel(precision: Precision) -> Kernel:
    return Kernel(_SOBOL_SOURCE, "sobol_points", DOUBLE=int(precision is Precision.float64))
