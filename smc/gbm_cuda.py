"""The fused path kernel: Philox, Box-Muller and the time steps of one path in one thread's registers.

Nothing but terminal prices is written to memory. Counters and uniforms are those of `smc.normals`, so
CPU and GPU simulate the same paths up to the rounding of the elementary functions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from smc.models.numerical import Precision

__all__ = ["simulate_terminal"]

_SOURCE = r"""
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
    const float u = fmaf((float)a, 0x1p-32f, 0x1p-33f);
    // The fast logarithm may round to just above zero next to u = 1.
    const float radius = sqrtf(fmaxf(-2.0f * __logf(u), 0.0f));
    // The fast sine and cosine are accurate within (-pi, pi): turn the angle by half a circle.
    float s, c;
    __sincosf(fmaf((float)b, 6.28318530717958648f * 0x1p-32f, -3.14159265358979324f), &s, &c);
    z[0] = -radius * c;  z[1] = -radius * s;
}
__device__ __forceinline__ void normals(u32 c0, u32 c1, u32 c2, u32 c3, real* z) {
    pair(c0, c1, z);  pair(c2, c3, z + 2);
}
#endif

extern "C" __global__ void terminal_prices(
    const double* __restrict__ contracts,   // (n, 6): X0, K, T, r, d, v
    const u64* __restrict__ first,          // stream index of contract 0, read on the device
    const u64 seed, const int paths, const int steps,
    real* __restrict__ out)                 // (n, paths)
{
    const int path = blockIdx.x * blockDim.x + threadIdx.x;
    if (path >= paths) return;
    const double* p = contracts + 6ull * blockIdx.y;
    const double X0 = p[0], T = p[2], carry = p[3] - p[4], v = p[5];
    const double dt = T / steps;
    const u64 stream = *first + blockIdx.y;
    const u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    const real volatility = (real)(v * sqrt(dt));
#if LOG_RETURN
    real sum = 0;
#else
    const real growth = (real)(1.0 + carry * dt);
    real price = (real)X0;
#endif
    for (int first_step = 0, block = 0; first_step < steps; first_step += PER_BLOCK, ++block) {
        u32 c0 = path, c1 = block, c2 = (u32)stream, c3 = (u32)(stream >> 32);
        philox4x32_10(c0, c1, c2, c3, k0, k1);
        real z[PER_BLOCK];
        normals(c0, c1, c2, c3, z);
        #pragma unroll
        for (int i = 0; i < PER_BLOCK; ++i) {
            if (first_step + i < steps) {
#if LOG_RETURN
                sum += z[i];
#else
                price = fabs(price * fma(volatility, z[i], growth));
#endif
            }
        }
    }
#if LOG_RETURN
    const real drift = (real)((carry - 0.5 * v * v) * T);
    out[(u64)blockIdx.y * paths + path] = (real)X0 * exp(fma(volatility, sum, drift));
#else
    out[(u64)blockIdx.y * paths + path] = price;
#endif
}
"""


def simulate_terminal(
    contracts: Any,
    first: Any,
    *,
    seed: int,
    paths: int,
    steps: int,
    threads: int,
    log_return: bool,
    precision: Precision,
) -> Any:
    """Terminal prices of every path of every contract, in one launch on CuPy's current stream.

    Shapes: contracts (n, 6) float64 and first () uint64, both on the device -> (n, paths).
    """
    import cupy

    out = cupy.empty((contracts.shape[0], paths), dtype=precision.numpy)
    kernel = _kernel(log_return, precision is Precision.float64)
    # Grid dimension y holds at most 65,535 blocks.
    for start in range(0, contracts.shape[0], 65535):
        part = contracts[start : start + 65535]
        offset = first if start == 0 else first + cupy.uint64(start)
        kernel(
            (-(-paths // threads), part.shape[0]),
            (threads,),
            (part, offset, cupy.uint64(seed), cupy.int32(paths), cupy.int32(steps), out[start:]),
        )
    return out


@lru_cache(maxsize=4)
def _kernel(log_return: bool, double: bool) -> Any:
    import cupy

    return cupy.RawKernel(
        _SOURCE,
        "terminal_prices",
        options=("--std=c++17", f"-DLOG_RETURN={int(log_return)}", f"-DDOUBLE={int(double)}"),
    )
