"""Paths of any problem on a CPU: one module of generated Python a problem, compiled by Numba.

A block of paths is stepped at once, each scalar function applied to all of its lanes, so that the compiler makes vector
instructions of them. Normals are addressed as in `smc.simulation.normals`, by seed, contract, path and number, and a
row does not depend on the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch

from smc.models.numerical import Precision
from smc.problem.conditional import Estimator, estimator_of
from smc.problem.problem import Problem
from smc.simulation.normals import bridge_plan, expiry_last, sobol_points
from smc.simulation.sizes import PathSizes, Sampling, sizes_of, time_grid
from smc.simulation.walk import compiled_walk

__all__ = ["simulate", "simulate_pairs", "simulate_priced"]

Array = npt.NDArray[np.float64]

# Bytes of normals that a block of lanes holds at a time: they stay in a core's second cache.
_NORMALS = 1 << 17
_MOST_LANES, _LEAST_LANES = 512, 16


def simulate(problem: Problem, table: Array, first: int, **sizes: Unpack[PathSizes]) -> npt.NDArray[Any]:
    """Discounted payoffs, row 0 being stream `first`.

    Shapes: (n, fields) float64 -> (n, paths). Units: currency.
    Raises: ConfigError for a number of steps that does not fit the product's dates, or a scalar method that cannot be
    compiled.
    """
    return _simulated(problem, [table], first, **sizes)[0][:, 0]


def simulate_pairs(
    problem: Problem, table: Array, moved: Array, first: int, **sizes: Unpack[PathSizes]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As `simulate`, and what a second contract for each row pays on the same paths' random numbers.

    Shapes: two of (n, fields) float64 -> two of (n, paths). Units: currency.
    """
    payoffs, beside = _simulated(problem, [table, moved], first, **sizes)
    return payoffs[:, 0], beside[:, 0]


def simulate_priced(
    problem: Problem, tables: Sequence[Array], first: int, **sizes: Unpack[PathSizes]
) -> list[npt.NDArray[Any]]:
    """What paths of a problem that is conditional give: payoffs, expected payoffs, and controls.

    Shapes: one or two of (n, fields) float64 -> as many of (n, 2 + controls, paths).
    """
    return _simulated(problem, tables, first, estimator=estimator_of(problem), **sizes)


def _simulated(
    problem: Problem,
    tables: Sequence[Array],
    first: int,
    *,
    seed: int,
    paths: int,
    steps: int,
    precision: Precision,
    sampling: Sampling,
    rows_at_once: int = 1,
    estimator: Estimator = "payoff",
) -> list[npt.NDArray[Any]]:
    sizes = sizes_of(problem, estimator)
    steps, stride = time_grid(problem, steps, sampling, sizes)
    walk = compiled_walk(problem, precision, pairs=len(tables) == 2, estimator=estimator)
    width = sizes.normals * steps + sizes.extras
    lanes_at_once = _NORMALS // (width * precision.numpy.itemsize) // 16 * 16
    lanes_at_once = max(_LEAST_LANES, min(_MOST_LANES, lanes_at_once))
    points = np.zeros((0, 0), dtype=np.uint32)
    plan, weights = np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3), dtype=precision.numpy)
    if sampling == "sobol":
        points = expiry_last(sobol_points(width, paths), sizes.extras)
        plan, weights = bridge_plan(steps)
        weights = weights.astype(precision.numpy)
    tables = [np.ascontiguousarray(table) for table in tables]
    count = len(tables[0])
    outs = [np.empty((count, sizes.outputs, paths), dtype=precision.numpy) for _ in tables]
    seed_, first_ = np.uint64(seed), np.uint64(first)

    def fill(start: int) -> None:
        rows = slice(start, start + rows_at_once)
        given = (first_ + np.uint64(start), seed_, steps, stride, lanes_at_once, points, plan, weights)
        walk(*(table[rows] for table in tables), *given, *(out[rows] for out in outs))

    starts = range(0, count, rows_at_once)
    if len(starts) <= 1:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, starts))
    return outs
