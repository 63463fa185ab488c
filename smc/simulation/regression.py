"""Prices from expected payoffs given outer paths, regressed on controls of known mean.

The coefficients come from the same paths, by least squares, so that the price has a bias of the order of one part in
the number of paths times what the controls leave; `tests/test_problem/test_conditional.py` bounds it.
Source: Glasserman, "Monte Carlo Methods in Financial Engineering" (2003), section 4.1.2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from smc.models.numerical import Precision
from smc.simulation.cuda import Kernel

__all__ = ["regressed_prices"]

# A control is left out that the ones before it explain but for this share of its variance; and one that, without what
# they explain, deviates by no more than this: the error of its mean, which steps make, would be divided by that.
_EXPLAINED, _LEAST_DEVIATION = 1e-6, 0.01
_THREADS = 256


def regressed_prices(outputs: Tensor) -> Tensor:
    """What `simulate_priced` gives, to prices. A row's price does not depend on the other rows.

    Shapes: (n, 2 + controls, paths) -> (n,) float64, on the same device. Units: those of the payoffs.
    """
    n, count, paths = outputs.shape
    prices = torch.empty(n, dtype=torch.float64, device=outputs.device)
    if outputs.device.type == "cpu":
        _regressed(outputs.numpy(), prices.numpy())
    elif n:
        _kernel(outputs.dtype, count - 2)((n,), _THREADS, (outputs, np.int32(paths), prices))
    return prices


@njit(fastmath=True, nogil=True, error_model="numpy", cache=True)  # type: ignore[untyped-decorator]
def _regressed(outputs: Any, prices: Any) -> None:
    rows, count, paths = outputs.shape
    controls = count - 2
    means = np.empty(controls + 1)
    # Row and column 0 are the expected payoff's.
    moments = np.empty((controls + 1, controls + 1))
    for row in range(rows):
        for i in range(controls + 1):
            total = 0.0
            for path in range(paths):
                total += outputs[row, 1 + i, path]
            means[i] = total / paths
        for i in range(1, controls + 1):
            for j in range(i + 1):
                total = 0.0
                a, b = means[i], means[j]
                for path in range(paths):
                    total += (outputs[row, 1 + i, path] - a) * (outputs[row, 1 + j, path] - b)
                moments[i, j] = total
                moments[j, i] = total
        own = np.diag(moments).copy()
        price = means[0]
        # Each control in turn explains its part of what is left, and is taken off those after it.
        for i in range(1, controls + 1):
            left = moments[i, i]
            if not left > max(_EXPLAINED * own[i], paths * _LEAST_DEVIATION**2):
                continue
            price -= moments[i, 0] / left * means[i]
            for j in range(i + 1, controls + 1):
                share = moments[j, i] / left
                means[j] -= share * means[i]
                moments[j, 0] -= share * moments[i, 0]
                for m in range(i + 1, controls + 1):
                    moments[j, m] -= share * moments[i, m]
        prices[row] = price


_SOURCE = r"""
#if DOUBLE
typedef double real;
#else
typedef float real;
#endif
#define PARTS (CONTROLS + 1)                 // the expected payoff, and the controls

__device__ double sum_of_block(double x, double* shared) {
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < warps; ++i) total += shared[i];
    return total;
}

extern "C" __global__ void regressed(
    const real* __restrict__ outputs,        // (n, 1 + PARTS, paths)
    const int paths, double* __restrict__ prices)
{
    __shared__ double shared[32];
    const real* const row = outputs + (unsigned long long)blockIdx.x * (1 + PARTS) * paths + paths;
    double mean[PARTS], moment[PARTS][PARTS], own[PARTS];
    #pragma unroll
    for (int i = 0; i < PARTS; ++i) mean[i] = 0;
    for (int path = threadIdx.x; path < paths; path += blockDim.x) {
        #pragma unroll
        for (int i = 0; i < PARTS; ++i) mean[i] += row[(unsigned long long)i * paths + path];
    }
    #pragma unroll
    for (int i = 0; i < PARTS; ++i) mean[i] = sum_of_block(mean[i], shared) / paths;
    #pragma unroll
    for (int i = 0; i < PARTS; ++i)
        #pragma unroll
        for (int j = 0; j < PARTS; ++j) moment[i][j] = 0;
    for (int path = threadIdx.x; path < paths; path += blockDim.x) {
        double x[PARTS];
        #pragma unroll
        for (int i = 0; i < PARTS; ++i) x[i] = row[(unsigned long long)i * paths + path] - mean[i];
        #pragma unroll
        for (int i = 1; i < PARTS; ++i)
            #pragma unroll
            for (int j = 0; j <= i; ++j) moment[i][j] += x[i] * x[j];
    }
    #pragma unroll
    for (int i = 1; i < PARTS; ++i)
        #pragma unroll
        for (int j = 0; j <= i; ++j) moment[i][j] = moment[j][i] = sum_of_block(moment[i][j], shared);
    if (threadIdx.x) return;
    #pragma unroll
    for (int i = 1; i < PARTS; ++i) own[i] = moment[i][i];
    double price = mean[0];
    #pragma unroll
    for (int i = 1; i < PARTS; ++i) {
        const double left = moment[i][i];
        if (!(left > EXPLAINED * own[i] && left > paths * (double)LEAST_DEVIATION * LEAST_DEVIATION)) continue;
        price -= moment[i][0] / left * mean[i];
        #pragma unroll
        for (int j = i + 1; j < PARTS; ++j) {
            const double share = moment[j][i] / left;
            mean[j] -= share * mean[i];
            moment[j][0] -= share * moment[i][0];
            #pragma unroll
            for (int m = i + 1; m < PARTS; ++m) moment[j][m] -= share * moment[i][m];
        }
    }
    prices[blockIdx.x] = price;
}
"""


@cache
def _kernel(dtype: torch.dtype, controls: int) -> Kernel:
    double = int(dtype is Precision.float64.torch)
    return Kernel(
        _SOURCE, "regressed", DOUBLE=double, CONTROLS=controls, EXPLAINED=_EXPLAINED, LEAST_DEVIATION=_LEAST_DEVIATION
    )
