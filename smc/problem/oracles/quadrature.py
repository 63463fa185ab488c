"""Integrals against a Gaussian from date to date, on panels of a step's own width."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from smc.problem.product import Product

__all__ = ["REACH", "Unresolved", "certain", "normal_density", "panels", "reached", "step_of", "within"]

Array = npt.NDArray[np.float64]

# Nodes in a panel, whose width is that of so many standard deviations of a step; and how far out panels reach.
_NODES, _WIDTH = 10, 2.0
REACH = 9.0
"""How far out a normal number is looked for, in deviations."""
_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(_NODES)
# More nodes than that take a matrix of a quarter of a gigabyte for a step.
_MOST_NODES = 6000


class Unresolved(ArithmeticError):
    """A step's deviation is so small beside the distances of the contract that too many nodes would be needed."""


def panels(low: float, high: float, deviation: float) -> tuple[Array, Array]:
    """Nodes and weights on [low, high], in panels of so many deviations. Shapes: -> two of (m,). Raises: Unresolved."""
    count = max(1, math.ceil((high - low) / (_WIDTH * deviation)))
    if count * _NODES > _MOST_NODES:
        raise Unresolved
    edges = np.linspace(low, high, count + 1)
    half = np.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half) + half * _ABSCISSAE
    return nodes.ravel(), (half * _WEIGHTS).ravel()


def normal_density(z: Array, deviation: float) -> Array:
    """Of a normal number with the mean 0. Shapes: (...) -> the same."""
    return np.exp(-0.5 * np.square(z / deviation)) / (deviation * math.sqrt(2 * math.pi))


def reached(c: Any, dates: int) -> tuple[float, float]:
    """Between which logarithms of the price over the spot all that counts is on all dates."""
    (drift, _), spread = step_of(c, dates), REACH * c.v * math.sqrt(c.T)
    return min(0.0, drift * dates) - spread, max(0.0, drift * dates) + spread


def step_of(c: Any, dates: int) -> tuple[float, float]:
    """Drift and deviation of the logarithm of the price from date to date."""
    dt = c.T / dates
    return (c.r - c.d - 0.5 * c.v * c.v) * dt, c.v * math.sqrt(dt)


def certain(product: Product, c: Any) -> float | None:
    """What a price that is certain pays, not discounted; None of one that is not."""
    if c.T > 0 and c.v > 0:
        return None
    q = product.coefficients(c)
    seen, price = product.begin(q), c.X0
    for date in range(1, product.dates + 1):
        price = c.X0 * math.exp((c.r - c.d) * c.T * date / product.dates)
        seen = product.observe(seen, price, float(date), q)
    return product.payoff(seen, price, q) * math.exp(c.r * c.T)


def within(x: Array, drift: float, s: float, low: float, high: float) -> tuple[Array, Array]:
    """Expected exp(y) and the chance of y in a corridor, y being x one step later. Shapes: (m,) -> two of (m,)."""
    low, high = min(low, high), high
    a, b = (low - x - drift) / s, (high - x - drift) / s
    return np.exp(x + drift + s * s / 2) * (ndtr(b - s) - ndtr(a - s)), ndtr(b) - ndtr(a)
