"""Options on a basket of log-normal prices, by quadrature over all directions but one, which is integrated exactly.

Along the direction in which the basket moves most it rises everywhere, so that it is exercised on one side of a point
that Newton's method finds; there the integral is a sum of normal probabilities. The other directions, which matter the
less the more the assets go together, are left to Gauss and Hermite, the more nodes the more a direction moves.
Source: Choi, "Sum of all Black-Scholes-Merton models: an efficient pricing method for spread, basket, and Asian
options" (Journal of Futures Markets, 2018).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from smc.errors import NumericsError

__all__ = ["price"]

Array = npt.NDArray[np.float64]

# Nodes for each unit of a direction's deviation, which give a dozen digits unless assets all but cancel each other; of
# one direction at most, and of all where they are few; of more directions half as many, as time is short.
_PER_DEVIATION, _OF_ONE, _FEW, _NODES = 43.0, 96, 3, 1 << 17
# Added to each deviation, for those that are so small that hardly a node would be left to them.
_LEAST_SIZE = 0.25
# Along the main direction every price rises at least by this share of the steepest, in case one of them would fall.
_LEAST_SLOPE, _ROUNDING = 0.01, 1e-12
_NEWTON = 40
# How much another direction may move prices, in units of the main one, if nodes are to resolve where it is exercised.
_MOST_OF_OTHERS = 3.0


def price(forwards: Array, covariance: Array, strike: float, option: Literal["put", "call"]) -> float:
    """The expected payoff on the sum of log-normal prices, not discounted; NaN if assets all but cancel each other.

    Shapes: forwards (assets,), weights included; covariance (assets, assets) of the logarithms at expiry.
    Units: currency.
    """
    certain = float(forwards.sum())
    if not covariance.any():
        return max(certain - strike if option == "call" else strike - certain, 0.0)
    values, vectors = np.linalg.eigh(covariance)
    main, others = _directions(forwards, vectors * np.sqrt(np.maximum(values, 0.0)))
    if np.linalg.norm(others, axis=0).max() > _MOST_OF_OTHERS * np.linalg.norm(main):
        return math.nan
    points, weights = _product_rule(np.linalg.norm(others, axis=0))
    # Given the other directions, the prices that are expected along the main one.
    expected = forwards * np.exp(points @ others.T - 0.5 * np.square(others).sum(axis=1))
    x = _exercised_from(expected * np.exp(-0.5 * np.square(main)), main, strike)
    call = float(weights @ ((expected * ndtr(main - x[:, None])).sum(axis=1) - strike * ndtr(-x)))
    return max(call if option == "call" else call - certain + strike, 0.0)


def _directions(forwards: Array, root: Array) -> tuple[Array, Array]:
    """The covariance's root, turned: the direction along which the basket moves most, and the others by size.

    Shapes: (assets,), (assets, assets) -> (assets,), (assets, assets - 1). Raises: NumericsError if there is none.
    """
    along = root.T @ (forwards / forwards.sum())
    for _ in range(_NEWTON):
        size = float(np.linalg.norm(along))
        if not size > 0.0:
            break
        along = along / size
        main = root @ along
        if main.min() >= -_ROUNDING * main.max():
            break
        along = np.linalg.lstsq(root, np.maximum(main, _LEAST_SLOPE * main.max()), rcond=None)[0]
    else:
        size = 0.0
    if not size > 0.0:
        raise NumericsError("the assets of a basket go against each other so that no direction moves all of them up")
    basis, _ = np.linalg.qr(np.column_stack([along, np.eye(len(along))]))
    left = root @ basis[:, 1 : len(along)]
    turned, sizes, _ = np.linalg.svd(left, full_matrices=False)
    return main, turned * sizes


def _product_rule(sizes: Array) -> tuple[Array, Array]:
    """Nodes and weights of the normal distribution, the more nodes the larger a direction.

    Shapes: (directions,) -> (nodes, directions), (nodes,).
    """
    each, most = _PER_DEVIATION, _NODES if len(sizes) <= _FEW else _NODES // 2
    while np.prod(counts := np.minimum(1 + np.ceil(each * (sizes + _LEAST_SIZE)), _OF_ONE)) > most:
        each *= 0.95
    nodes, weights = np.zeros((1, 0)), np.ones(1)
    for count in counts.astype(int):
        points, own = np.polynomial.hermite_e.hermegauss(count)
        nodes = np.column_stack([np.repeat(nodes, count, axis=0), np.tile(points, len(nodes))])
        weights = np.repeat(weights, count) * np.tile(own / own.sum(), len(weights))
    return nodes, weights


def _exercised_from(prices: Array, slopes: Array, strike: float) -> Array:
    """Where the sum of prices x exp(slopes x) passes the strike, by Newton's method on its logarithm, which is convex.

    Shapes: (nodes, assets), (assets,) -> (nodes,).
    """
    x = np.zeros(len(prices))
    for _ in range(_NEWTON):
        grown = prices * np.exp(np.minimum(slopes * x[:, None], 500.0))
        total = grown.sum(axis=1)
        step = np.log(total / strike) * total / np.maximum(grown @ slopes, 1e-300)
        x = x - np.clip(step, -20.0, 20.0)
        if np.abs(step).max() < 1e-13 * (1 + np.abs(x).max()):
            break
    return x
