"""Black-Scholes in closed form: the oracle that everything simulated or learnt is measured against.

Every function takes contracts in any form that `contract_array` accepts and returns float64 arrays.
T = 0 and v = 0 are the deterministic limits, where the payoff is known today.

Source: Black and Scholes (1973), Merton (1973) for the dividend yield; the notation is Hull's
(Options, Futures and Other Derivatives, ch. 17 and 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from smc.errors import ConfigError
from smc.problem.contracts import ContractsLike, contract_array

__all__ = [
    "Greeks",
    "OptionKind",
    "OptionKinds",
    "cvar",
    "greeks",
    "implied_volatility",
    "payoff_bin_averages",
    "payoff_quantile",
    "price",
]

OptionKind = Literal["put", "call"]
OptionKinds = OptionKind | Sequence[OptionKind] | npt.NDArray[Any]
"""One word for all contracts of a call, or one for each."""
Array = npt.NDArray[np.float64]


class Greeks(NamedTuple):
    """Sensitivities, each of shape (n,).

    Units: delta per unit of spot; gamma per unit of spot squared; vega per 1.00 of volatility;
    theta per year of calendar time; rho per 1.00 of interest rate.
    """

    delta: Array
    gamma: Array
    vega: Array
    theta: Array
    rho: Array


class _Terms(NamedTuple):
    X0: Array
    K: Array
    T: Array
    r: Array
    d: Array
    v: Array
    w: Array  # v sqrt(T): total volatility
    forward: Array
    discount: Array
    d1: Array
    d2: Array


def price(contracts: ContractsLike, kind: OptionKind = "put") -> Array:
    """Present value. Shapes: n contracts -> (n,)."""
    t = _terms(contracts)
    sign = _sign(kind)
    value = sign * t.discount * (t.forward * ndtr(sign * t.d1) - t.K * ndtr(sign * t.d2))
    return np.asarray(value + 0.0)  # what is worth nothing is 0, not -0


def greeks(contracts: ContractsLike, kind: OptionKind = "put") -> Greeks:
    """Delta, gamma, vega, theta and rho. Shapes: n contracts -> five of (n,)."""
    t = _terms(contracts)
    sign = _sign(kind)
    dividend = np.exp(-t.d * t.T)
    # At w = 0 the density vanishes except exactly at the kink, where no derivative exists: 0 there.
    density = np.where(t.w > 0, np.exp(-0.5 * np.square(t.d1)) / np.sqrt(2 * np.pi), 0.0)
    root_t = np.sqrt(t.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        gamma = np.where(t.w > 0, dividend * density / (t.X0 * t.w), 0.0)
        decay = np.where(t.T > 0, t.X0 * dividend * density * t.v / (2 * root_t), 0.0)
    spot_leg = t.X0 * dividend * ndtr(sign * t.d1)
    strike_leg = t.K * t.discount * ndtr(sign * t.d2)
    return Greeks(
        delta=sign * dividend * ndtr(sign * t.d1),
        gamma=gamma,
        vega=t.X0 * dividend * density * root_t,
        theta=-decay + sign * (t.d * spot_leg - t.r * strike_leg),
        rho=sign * t.T * strike_leg,
    )


def implied_volatility(contracts: ContractsLike, prices: npt.ArrayLike, kind: OptionKind = "put") -> Array:
    """The volatility at which a contract has this price, by bisection; the contract's own is not read.

    Shapes: n contracts, (n,) -> (n,); NaN where no volatility below 1000 % gives the price, or T = 0.
    """
    table, wanted = contract_array(contracts).copy(), np.asarray(prices, dtype=np.float64)

    def at(v: Array) -> Array:
        table[:, 5] = v
        return price(table, kind)

    low, high = np.zeros(len(table)), np.full(len(table), 10.0)
    attained = (at(low) < wanted) & (wanted <= at(high))
    for _ in range(60):
        middle = (low + high) / 2
        below = at(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(attained, high, np.nan)


def payoff_quantile(contracts: ContractsLike, u: npt.ArrayLike, kind: OptionKind = "put") -> Array:
    """Quantile function of the discounted payoff at levels u in [0, 1].

    Shapes: n contracts, (m,) levels -> (n, m).
    """
    t = _terms(contracts)
    levels = np.atleast_1d(np.asarray(u, dtype=np.float64))
    check_probability(levels)
    sign = _sign(kind)
    z = ndtri(1 - levels if kind == "put" else levels)
    with np.errstate(over="ignore", invalid="ignore"):
        stretch = np.where(t.w[:, None] > 0, t.w[:, None] * z, 0.0)
        terminal = t.forward[:, None] * np.exp(stretch - 0.5 * t.w[:, None] ** 2)
    return np.asarray(t.discount[:, None] * np.maximum(sign * (terminal - t.K[:, None]), 0.0))


def payoff_bin_averages(contracts: ContractsLike, bins: int, kind: OptionKind = "put") -> Array:
    """Means of the discounted payoff's quantile function over `bins` equal slices of [0, 1].

    Shapes: n contracts -> (n, bins), ascending; the row mean is the price.
    """
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    return _quantile_integral(contracts, edges[:-1], edges[1:], kind) * bins


def cvar(contracts: ContractsLike, u: float, kind: OptionKind = "put") -> Array:
    """Mean of the discounted payoff over its worst 1 - u of outcomes for the seller.

    It is that of the payoff at expiry under the pricing measure, not of a position's value tomorrow, and does not add
    over a book. u = 1 is the largest payoff. Shapes: -> (n,). Raises: ConfigError for u outside [0, 1].
    """
    check_probability(np.array([u], dtype=np.float64))
    if u == 1.0:
        return payoff_quantile(contracts, u, kind)[:, 0]
    return _quantile_integral(contracts, np.array([u]), np.array([1.0]), kind)[:, 0] / (1 - u)


def _quantile_integral(contracts: ContractsLike, lower: Array, upper: Array, kind: OptionKind) -> Array:
    t = _terms(contracts)
    sign = _sign(kind)
    # Quantile u of the payoff is reached where y, the price's normal or for a call its negative, is ndtri(1 - u),
    # and the payoff is positive for y below +-d2: both tails are computed near 0, not near 1.
    exercised = sign * t.d2[:, None]
    low = np.minimum(ndtri(1 - upper)[None, :], exercised)
    high = np.minimum(ndtri(1 - lower)[None, :], exercised)
    w = sign * t.w[:, None]
    with np.errstate(invalid="ignore"):
        cash = t.K[:, None] * (ndtr(high) - ndtr(low))
        asset = t.forward[:, None] * (ndtr(high + w) - ndtr(low + w))
    certain = np.maximum(sign * (t.forward - t.K), 0.0)[:, None] * (upper - lower)[None, :]
    value = np.where(t.w[:, None] > 0, np.maximum(sign * (asset - cash), 0.0), certain)
    return np.asarray(t.discount[:, None] * value)


def _terms(contracts: ContractsLike) -> _Terms:
    X0, K, T, r, d, v = contract_array(contracts).T
    w = v * np.sqrt(T)
    forward = X0 * np.exp((r - d) * T)
    m = np.log(forward / K)
    with np.errstate(divide="ignore", invalid="ignore"):
        d1 = m / w + 0.5 * w
    # The limit w -> 0: certain exercise, certain lapse, or exactly at the money.
    d1 = np.where(w > 0, d1, np.where(m > 0, np.inf, np.where(m < 0, -np.inf, 0.0)))
    d2 = np.where(w > 0, d1 - w, d1)
    return _Terms(X0, K, T, r, d, v, w, forward, np.exp(-r * T), d1, d2)


def _sign(kind: OptionKind) -> float:
    if kind not in ("put", "call"):
        raise ConfigError(f"kind must be 'put' or 'call', got {kind!r}")
    return 1.0 if kind == "call" else -1.0


def check_probability(levels: Array) -> None:
    """Raises: ConfigError naming a level that is no probability."""
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        wrong = levels[~((levels >= 0) & (levels <= 1))][0]
        raise ConfigError(f"probability levels must lie in [0, 1], got {wrong:g}: 97.5 % is 0.975")
