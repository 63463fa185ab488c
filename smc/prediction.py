"""What a trained network says of a contract: price, distribution, Greeks, within what must hold.

The functions take a `Predictor`, the part of a pricer that prediction needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from smc import black_scholes
from smc.black_scholes import Greeks, OptionKind
from smc.contracts import BoundSpec, ContractsLike, contract_array, outside_domain
from smc.errors import ConfigError
from smc.scaling import Scaling, features, intrinsic, unit_of_price
from smc.spectrum import PayoffDistribution, levels_from_spectrum

__all__ = ["Outside", "Predictor", "distribution", "greeks", "price"]

Outside = Literal["refuse", "warn"]
Array = npt.NDArray[np.float64]

_CHUNK = 65536


@dataclass(frozen=True)
class Predictor:
    """A network with the scaling and domain that give its output a meaning."""

    model: nn.Module
    scaling: Scaling
    domain: Mapping[str, BoundSpec]
    network_size: int

    def spectrum(self, contracts: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum of the discounted put payoff. Shapes: (n, 6) float64 -> two of (n, bins) float64.

        Units: currency.
        """
        inputs = features(contracts, self.domain).to(self.scaling.spread.dtype)
        real, imag = self.scaling.restore(*self.model(inputs, torch.zeros_like(inputs)))
        unit = unit_of_price(contracts)[:, None]
        real, imag = real.double() * unit, imag.double() * unit
        price = real[:, :1] + intrinsic(contracts)[:, None] * unit
        return torch.cat([price, real[:, 1:]], dim=1), imag

    @property
    def device(self) -> torch.device:
        return self.scaling.spread.device


def price(predictor: Predictor, contracts: ContractsLike, kind: OptionKind, outside: Outside) -> Array:
    """Prices within the no-arbitrage bounds. Shapes: -> (n,)."""
    array, learnt = _checked(predictor, contracts, kind, outside)
    put = black_scholes.price(array)  # exact where nothing is random; the rest is overwritten
    with torch.no_grad():
        for rows in _chunks(learnt):
            real, _ = predictor.spectrum(torch.from_numpy(array[rows]).to(predictor.device))
            put[rows] = real[:, 0].cpu().numpy()
    put = np.clip(put, *_put_bounds(array))
    if kind == "put":
        return put
    return np.maximum(put + _forward_value(array), 0.0)


def distribution(predictor: Predictor, contracts: ContractsLike, outside: Outside) -> PayoffDistribution:
    """Valid distributions whose means are the prices. Shapes: -> levels (n, N)."""
    array, learnt = _checked(predictor, contracts, "put", outside)
    n = predictor.network_size
    discount = np.exp(-array[:, 3] * array[:, 2])
    certain = discount * np.maximum(array[:, 1] - array[:, 0] * np.exp((array[:, 3] - array[:, 4]) * array[:, 2]), 0)
    levels = np.repeat(certain[:, None], n, axis=1)
    with torch.no_grad():
        for rows in _chunks(learnt):
            real, imag = predictor.spectrum(torch.from_numpy(array[rows]).to(predictor.device))
            levels[rows] = levels_from_spectrum(torch.complex(real, imag), n).cpu().numpy()
    lower, upper = _put_bounds(array)
    return PayoffDistribution.from_levels(levels, np.clip(levels.mean(axis=1), lower, upper), upper)


def greeks(predictor: Predictor, contracts: ContractsLike, kind: OptionKind, outside: Outside) -> Greeks:
    """First derivatives, and gamma, by two passes of automatic differentiation. Shapes: -> five of (n,)."""
    array, learnt = _checked(predictor, contracts, kind, outside)
    exact = black_scholes.greeks(array, "put")
    out = Greeks(*(np.array(values) for values in exact))
    for rows in _chunks(learnt):
        table = torch.from_numpy(array[rows]).to(predictor.device).requires_grad_()
        value, _ = predictor.spectrum(table)
        (first,) = torch.autograd.grad(value[:, 0].sum(), table, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), table)
        delta, dT, rho, vega = (first[:, i].detach().cpu().numpy() for i in (0, 2, 3, 5))
        for target, values in zip(out, (delta, second[:, 0].cpu().numpy(), vega, -dT, rho), strict=True):
            target[rows] = values
    if kind == "put":
        return out
    X0, K, T, r, d, _ = array.T
    df, q = np.exp(-r * T), np.exp(-d * T)
    # Call = put + X0 q - K df, differentiated.
    return Greeks(out.delta + q, out.gamma, out.vega, out.theta + d * X0 * q - r * K * df, out.rho + T * K * df)


def _checked(
    predictor: Predictor, contracts: ContractsLike, kind: OptionKind, outside: Outside
) -> tuple[Array, npt.NDArray[np.intp]]:
    if kind not in ("put", "call"):
        raise ConfigError(f"kind must be 'put' or 'call', got {kind!r}")
    if outside not in ("refuse", "warn"):
        raise ConfigError(f"outside must be 'refuse' or 'warn', got {outside!r}")
    array = contract_array(contracts)
    learnt = np.flatnonzero((array[:, 2] > 0) & (array[:, 5] > 0))
    for name, row in outside_domain(array[learnt], predictor.domain).items():
        at = int(learnt[row])
        bound = predictor.domain[name]
        value = array[at, list(predictor.domain).index(name)]
        text = f"contracts[{at}].{name} = {value:g} is outside the trained domain [{bound.lower:g}, {bound.upper:g}]"
        if outside == "refuse":
            raise ConfigError(text + "; pass outside='warn' to extrapolate")
        warnings.warn(text + ": extrapolated", stacklevel=4)
    return array, learnt


def _chunks(rows: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    return [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]


def _put_bounds(array: Array) -> tuple[Array, Array]:
    return np.maximum(-_forward_value(array), 0.0), array[:, 1] * np.exp(-array[:, 3] * array[:, 2])


def _forward_value(array: Array) -> Array:
    X0, K, T, r, d, _ = array.T
    return np.asarray(X0 * np.exp(-d * T) - K * np.exp(-r * T))
