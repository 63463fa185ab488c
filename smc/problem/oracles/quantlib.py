"""European puts under geometric Brownian motion by QuantLib, where it is installed: a reference of somebody else's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smc.problem.oracles.black_scholes import Greeks

__all__ = ["quantlib_values"]

Array = npt.NDArray[np.float64]


def quantlib_values(contracts: Array) -> tuple[Array, Greeks]:
    """Prices and Greeks of puts by QuantLib's BlackCalculator. Shapes: (n, 6) -> (n,), five of (n,)."""
    import QuantLib as ql  # noqa: N813  # as its own documentation writes it

    rows = []
    for X0, K, T, r, d, v in contracts.tolist():
        forward = X0 * np.exp((r - d) * T)
        at = ql.BlackCalculator(ql.PlainVanillaPayoff(ql.Option.Put, K), forward, v * np.sqrt(T), np.exp(-r * T))
        rows.append((at.value(), at.delta(X0), at.gamma(X0), at.vega(T), at.theta(X0, T), at.rho(T)))
    price, *greeks = np.array(rows).T
    return price, Greeks(*greeks)
