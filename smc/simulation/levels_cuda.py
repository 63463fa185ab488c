"""Payoffs, or prices below a ceiling, to quantile levels in one launch, one block of threads to a contract.

The levels need every price to its slice of probability, which is less than a general sort: prices at or
above the ceiling pay nothing and are only counted; the others go to one of thousands of buckets by a
monotone map of their bits (near the logarithm, so that log-normal prices spread well), and are ranked
among the few others of their bucket. Two passes of counting sort, then one of counting neighbours.

The order of atomic operations shows nowhere in the result: equal prices are interchangeable, and sums are
taken in the order of ranks. Prices of any distribution come out right; one that crowds into a few buckets, elsewhere
than at its ends, takes time that is quadratic in the crowd.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from smc.models.numerical import Precision
from smc.simulation.cuda import Kernel

__all__ = ["MOST_PATHS", "payoff_levels", "payoff_levels_and_slopes", "shortfall_levels"]

MOST_PATHS = 1 << 20
"""Paths of a contract up to which ranking beats a sort."""

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
#if DOUBLE
typedef double real;
typedef u64 bits;
__device__ __forceinline__ bits bits_of(real x) { return (bits)__double_as_longlong(x); }
__device__ __forceinline__ real real_of(bits b) { return __longlong_as_double((long long)b); }
#else
typedef float real;
typedef u32 bits;
__device__ __forceinline__ bits bits_of(real x) { return __float_as_uint(x); }
__device__ __forceinline__ real real_of(bits b) { return __uint_as_float(b); }
#endif

// What is sorted is not negative, so that it is ordered as its bits are; a NaN comes last.
// Prices below the ceiling are sorted, near their logarithm; or payoffs above zero, near the logarithm of payoff and
// mean payoff together: their own would give most of its buckets to the few that are nearly nothing.
// A payoff may have a slope beside it, which goes where it goes; equal payoffs then stand in the order of their slopes.
#if SLOPES
struct item {
    real x, slope;
};
__device__ __forceinline__ item item_at(const real* x, const real* slope, int i) { return {x[i], slope[i]}; }
__device__ __forceinline__ real value(const item& a) { return a.x; }
__device__ __forceinline__ bool counts(const item& a, real K) { return !(a.x <= 0) || !(a.slope == 0); }
__device__ __forceinline__ bool idle(const item& a) { return a.slope == 0; }
__device__ __forceinline__ bool before(const item& a, const item& b) {
    const bits p = bits_of(a.x), q = bits_of(b.x);
    return p < q || (p == q && a.slope < b.slope);
}
__device__ __forceinline__ void store(const item& a, real* x, real* slope, u32 i) { x[i] = a.x; slope[i] = a.slope; }
#else
typedef real item;
__device__ __forceinline__ item item_at(const real* x, const real*, int i) { return x[i]; }
__device__ __forceinline__ real value(const item& a) { return a; }
__device__ __forceinline__ bool counts(const item& a, real K) { return PAYOFFS ? !(a <= 0) : !(a >= K); }
__device__ __forceinline__ bool idle(const item&) { return true; }
__device__ __forceinline__ bool before(const item& a, const item& b) { return bits_of(a) < bits_of(b); }
__device__ __forceinline__ void store(const item& a, real* x, real*, u32 i) { x[i] = a; }
#endif
struct Buckets {
    bits lowest;
    float per_bit;
    u32 last;
    real shift;
    __device__ u32 of(real x) const {
        // Each step rounds monotonically.
        const float at = (float)(bits_of(PAYOFFS ? x + shift : x) - lowest) * per_bit;
        return min((u32)at, last);
    }
};

__device__ bits warp_min(bits x) {
    for (int d = 16; d; d >>= 1) x = min(x, __shfl_xor_sync(~0u, x, d));
    return x;
}
__device__ bits warp_max(bits x) {
    for (int d = 16; d; d >>= 1) x = max(x, __shfl_xor_sync(~0u, x, d));
    return x;
}
template <typename Number> __device__ Number warp_sum(Number x) {
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}
__device__ u32 warp_prefix(u32 x) {                       // inclusive
    for (int d = 1; d < 32; d <<= 1) {
        const u32 y = __shfl_up_sync(~0u, x, d);
        if ((threadIdx.x & 31) >= d) x += y;
    }
    return x;
}

extern "C" __global__ __launch_bounds__(1024, DOUBLE ? 1 : 2) void levels_of(
    real* prices,                            // (n, paths), or payoffs; overwritten where `scratch` is given
    const real* __restrict__ ceiling,        // (n,), of prices: what is below it pays the difference
    const real* __restrict__ scale,          // (n,), of the payoff
    item* scratch,                           // (n, paths), or null: shared memory holds it
    real* tangents,                          // (n, paths), slopes of payoffs, as the payoffs; or null
    const int paths, const int size, const int buckets,
    real* __restrict__ levels,               // (n, size), ascending
    const real* __restrict__ motion,         // (n, 3): of the scale; a and b, where ln S moves by a + b ln(S / K);
                                             // of payoffs (n,), of the scale
    const int normalized,                    // whether by a + b (ln(S / K) - its mean under weights S)
    real* __restrict__ slopes)               // (n, size), how the levels move; or null
{
    extern __shared__ unsigned char memory[];
    __shared__ bits least[32], greatest[32];
    __shared__ u32 totals[32];
    __shared__ u32 inside, crown;
    __shared__ double masses[32], moments[32];
    u32* const counter = (u32*)memory;
    const int t = threadIdx.x, T = blockDim.x, lane = t & 31, warp = t >> 5, warps = T >> 5;
    const u64 row = (u64)blockIdx.x * paths;
    real* const price = prices + row;
    real* const tangent = tangents + row;
    item* const bucketed = scratch ? scratch + row : (item*)(memory + sizeof(u32) * buckets);
    real* const sorted = scratch ? price : (real*)(bucketed + paths);
    real* const moved_with = scratch ? tangent : sorted + paths;
    const real K = PAYOFFS ? (real)0 : ceiling[blockIdx.x];

    // Range and number of the paths that pay.
    bits low = ~(bits)0, high = 0;
    u32 count = 0;
    double mass = 0, moment = 0;
    for (int i = t; i < paths; i += T) {
        const item own = item_at(price, tangent, i);
        const real s = value(own);
        if (normalized && s > 0) {
            mass += s;
            moment += s * log(s / K);
        }
        if (PAYOFFS && counts(own, K)) mass += s;
        if (counts(own, K)) {
            low = min(low, bits_of(s));
            high = max(high, bits_of(s));
            ++count;
        }
    }
    for (int b = t; b < buckets; b += T) counter[b] = 0;
    if (t == 0) crown = 0;
    low = warp_min(low);  high = warp_max(high);  count = warp_sum(count);
    mass = warp_sum(mass);  moment = warp_sum(moment);
    if (lane == 0) {
        least[warp] = low;  greatest[warp] = high;  totals[warp] = count;
        masses[warp] = mass;  moments[warp] = moment;
    }
    __syncthreads();
    if (warp == 0) {
        low = warp_min(lane < warps ? least[lane] : ~(bits)0);
        high = warp_max(lane < warps ? greatest[lane] : (bits)0);
        count = warp_sum(lane < warps ? totals[lane] : 0);
        mass = warp_sum(lane < warps ? masses[lane] : 0.0);
        moment = warp_sum(lane < warps ? moments[lane] : 0.0);
        if (lane == 0) {
            least[0] = low;  greatest[0] = high;  inside = count;
            moments[0] = PAYOFFS ? mass / max(count, 1u) : mass > 0 ? moment / mass : 0;
        }
    }
    __syncthreads();
    const u32 paying = inside;
    const bool same = !paying || (!SLOPES && greatest[0] == least[0]);
    // Of a payoff that is capped many are the greatest: those are only counted, as those of nothing are.
    const bits most = greatest[0];
#define CROWNED(a) (PAYOFFS && bits_of(value(a)) == most && idle(a))
    const real shift = (real)moments[0];
    const bits lowest = PAYOFFS && !same ? bits_of(real_of(least[0]) + shift) : least[0];
    const bits highest = PAYOFFS && !same ? bits_of(real_of(greatest[0]) + shift) : greatest[0];
    const bits span = same ? 0 : highest - lowest;
    const Buckets bucket{lowest, buckets / ((float)span + 1.0f), (u32)buckets - 1, shift};

    // How many in each bucket, where each bucket begins, and everyone into theirs.
    u32 crowned = 0;
    for (int i = t; i < paths; i += T) {
        const item own = item_at(price, tangent, i);
        if (!counts(own, K)) continue;
        if (CROWNED(own)) ++crowned;
        else atomicAdd(&counter[same ? 0 : bucket.of(value(own))], 1u);
    }
    crowned = warp_sum(crowned);
    if (lane == 0 && crowned) atomicAdd(&crown, crowned);
    __syncthreads();
    const u32 ranked = paying - crown;
    const int each = buckets / T;
    u32 mine = 0;
    for (int j = 0; j < each; ++j) mine += counter[t * each + j];
    const u32 prefix = warp_prefix(mine);
    if (lane == 31) totals[warp] = prefix;
    __syncthreads();
    if (warp == 0) {
        const u32 total = lane < warps ? totals[lane] : 0;
        totals[lane] = warp_prefix(total) - total;
    }
    __syncthreads();
    u32 begin = totals[warp] + prefix - mine;
    for (int j = 0; j < each; ++j) {
        const u32 held = counter[t * each + j];
        counter[t * each + j] = begin;
        begin += held;
    }
    __syncthreads();
    for (int i = t; i < paths; i += T) {
        const item own = item_at(price, tangent, i);
        if (counts(own, K) && !CROWNED(own)) {
            bucketed[atomicAdd(&counter[same ? 0 : bucket.of(value(own))], 1u)] = own;
        }
    }
    __syncthreads();

    // Each counter is now its bucket's end. A price's rank: those before its bucket, and the smaller ones in it.
    for (u32 i = t; i < ranked; i += T) {
        const item own = bucketed[i];
        u32 rank = i;
        if (!same) {
            const u32 b = bucket.of(value(own)), end = counter[b];
            u32 j = b ? counter[b - 1] : 0;
            rank = j;
            for (; j < end; ++j) {
                const item other = bucketed[j];
                rank += before(other, own) || (j < i && !before(own, other));
            }
        }
        store(own, sorted, moved_with, rank);
    }
    __syncthreads();

    // Level l averages slice l of the ascending payoffs, or slice size - 1 - l of the ascending prices: a few lanes to
    // a slice. Payoffs of nothing come first.
    const u32 nothing = paths - paying;
    const int slice = paths / size;
    int lanes = 1;
    while (lanes < 32 && lanes * 2 <= slice) lanes *= 2;
    const int groups = T / lanes, part = t % lanes;
    const double gain = (double)scale[blockIdx.x] / slice;
    const real* const move = motion + (SLOPES ? 1 : 3) * blockIdx.x;
    const real greatest_payoff = real_of(most);
    const real centre = moments[0];
    for (int base = 0; base < size; base += groups) {
        const int c = base + t / lanes;
        double sum = 0, moved = 0;  // a slice may hold many thousands
        if (PAYOFFS && c < size) {
            const u32 stop = (u32)(c + 1) * slice;
            for (u32 j = max((u32)c * slice, nothing) + part; j < stop; j += lanes) {
                const u32 rank = j - nothing;
                sum += rank < ranked ? sorted[rank] : greatest_payoff;
                if (SLOPES && rank < ranked) moved += moved_with[rank];
            }
        } else if (c < size) {
            const u32 stop = min((u32)(c + 1) * slice, paying);
            for (u32 j = (u32)c * slice + part; j < stop; j += lanes) {
                const real s = sorted[j];
                sum += K - s;
                if (slopes && s > 0) moved += s * (move[1] + move[2] * (log(s / K) - centre));
            }
        }
        for (int d = lanes >> 1; d; d >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, d);
            moved += __shfl_xor_sync(~0u, moved, d);
        }
        if (c < size && part == 0) {
            const u64 at = (u64)blockIdx.x * size + (PAYOFFS ? c : size - 1 - c);
            levels[at] = (real)(sum * gain);
            if (slopes) slopes[at] = (real)(sum * move[0] / slice + (SLOPES ? moved : -moved) * gain);
        }
    }
}
"""

# Shared memory that the kernel takes beside its counters and prices.
_STATIC = 2048


def payoff_levels(payoffs: Tensor, scale: Tensor, size: int) -> Tensor:
    """Quantile levels of scale x payoff. `payoffs` may be overwritten.

    Shapes: payoffs (n, M), none negative, and scale (n,), of one precision on one GPU -> (n, size) ascending, for M a
    multiple of `size` and at most `MOST_PATHS`.
    """
    return _levels(payoffs, payoffs.new_empty(0), scale, size, None, of_payoffs=True)[0]


def payoff_levels_and_slopes(payoffs: Tensor, slopes: Tensor, scale: Tensor, d_scale: Tensor, size: int) -> Tensor:
    """Quantile levels of scale x payoff, and how they move as each payoff does by its slope and the scale by `d_scale`.

    What pays nothing does not fall, and what pays the most there is does not rise. Payoffs and slopes may be
    overwritten. Shapes: payoffs and slopes (n, M), scale and d_scale (n,), else as
    `payoff_levels` -> (2, n, size).
    """
    return _levels(payoffs, payoffs.new_empty(0), scale, size, d_scale, of_payoffs=True, slopes=slopes)


def shortfall_levels(
    prices: Tensor,
    ceiling: Tensor,
    scale: Tensor,
    size: int,
    motion: Tensor | None = None,
    *,
    normalized: bool = False,
) -> Tensor:
    """Quantile levels of scale x max(ceiling - price, 0). `prices` may be overwritten.

    With `motion`, also how they move as the scale moves by motion[:, 0] and the logarithm of each price S by
    motion[:, 1] + motion[:, 2] x ln(S / ceiling); `normalized` takes from that logarithm its mean under weights S.
    Shapes: prices (n, M), none negative, ceiling and scale (n,), motion (n, 3), all of one precision on one GPU
    -> (1, n, size) ascending, with motion (2, n, size), for M a multiple of `size` and at most `MOST_PATHS`.
    """
    return _levels(prices, ceiling, scale, size, motion, normalized=normalized)


def _levels(
    prices: Tensor,
    ceiling: Tensor,
    scale: Tensor,
    size: int,
    motion: Tensor | None,
    *,
    normalized: bool = False,
    of_payoffs: bool = False,
    slopes: Tensor | None = None,
) -> Tensor:
    n, paths = prices.shape
    levels = prices.new_empty((1 if motion is None else 2, n, size))
    if n == 0:
        return levels
    properties = torch.cuda.get_device_properties(prices.device)
    room = properties.shared_memory_per_block_optin - _STATIC  # type: ignore[attr-defined]  # missing in torch's stubs
    # About two prices to a bucket, as far as there is room for their counters.
    threads = max(64, min(1024, 1 << (paths // 8).bit_length()))
    most = min(16384, 1 << (room // 4).bit_length() - 1)
    buckets = max(threads, min(most, 1 << (paths // 2).bit_length() - 1))
    each = 1 if slopes is None else 2
    held = 2 * paths * prices.element_size() * each
    fits = held + 4 * buckets <= room
    none = prices.new_empty(0)
    scratch = none if fits else prices.new_empty((n, paths, each))
    given, moved = (none, none) if motion is None else (motion.contiguous(), levels[1])
    sizes = (np.int32(paths), np.int32(size), np.int32(buckets))
    tangents = none if slopes is None else slopes.contiguous()
    ceiling, scale = ceiling.contiguous(), scale.contiguous()
    arguments = (prices, ceiling, scale, scratch, tangents, *sizes, levels[0], given, np.int32(normalized), moved)
    kernel = _kernel(prices.dtype, of_payoffs, slopes is not None)
    kernel((n,), threads, arguments, shared=4 * buckets + (held if fits else 0))
    return levels


# There are eight of them, and none is ever let go of: a captured graph may hold it.
@cache
def _kernel(dtype: torch.dtype, of_payoffs: bool, with_slopes: bool) -> Kernel:
    double = int(dtype is Precision.float64.torch)
    return Kernel(_SOURCE, "levels_of", DOUBLE=double, PAYOFFS=int(of_payoffs), SLOPES=int(with_slopes))
