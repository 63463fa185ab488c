"""Heston's model, and Bates's, by Fourier inversion: prices, sensitivities and quantiles, to a dozen digits.

Source: Lewis, "Option Valuation under Stochastic Volatility" (2000), ch. 2; the characteristic function in the form of
Albrecher, Mayer, Schoutens and Tistaert, "The little Heston trap" (Wilmott, 2007), which is continuous in its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from smc.errors import NumericsError

__all__ = ["HestonLaw", "delta", "gamma", "price", "price_by_variance", "rho", "terminal_quantile"]

Array = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]

# The integrands are analytic within half a unit of the contour, so that the trapezoidal rule's error is
# exp(-pi / step): 1e-17.
_STEP = 0.08
# The sum is cut where the integrand has fallen to this share of its value at 0.
_NEGLIGIBLE = 1e-17
_MOST_NODES = 1 << 21
# The square of a volatility of variance below which the variance is certain.
_CERTAIN = 1e-24
# So many complex numbers, contracts by nodes, are held at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class HestonLaw:
    """The law of ln(S_T / F) for n contracts. Shapes: (n,) each."""

    T: Array
    v0: Array
    kappa: Array
    theta: Array
    xi: Array
    rho: Array
    intensity: Array
    jump_mean: Array
    jump_deviation: Array

    @classmethod
    def of(cls, c: Any) -> HestonLaw:
        """From columns by name; where there are none of jumps, there are no jumps."""
        nothing = 0.0 * np.asarray(c.T, dtype=np.float64)
        return cls(*(np.asarray(getattr(c, name, nothing), dtype=np.float64) for name in cls.__dataclass_fields__))

    def exponents(self, u: Complex) -> tuple[Complex, Complex]:
        """A and B of the characteristic function, exp(A + B v0). Shapes: u (nodes,) or (n, nodes) -> (n, nodes)."""
        T, kappa, theta, xi, rho = (a[:, None] for a in (self.T, self.kappa, self.theta, self.xi, self.rho))
        slow = kappa - rho * xi * 1j * u
        both = 1j * u + u * u
        d = np.sqrt(slow * slow + xi * xi * both)
        # (slow - d) / xi^2 and g / xi^2, without a difference of numbers that are next to each other.
        less, ratio = -both / (slow + d), -both / (slow + d) ** 2
        g, e = xi * xi * ratio, np.exp(-d * T)
        b = less * (1 - e) / (1 - g * e)
        moved = ratio * (1 - e) / (1 - g)
        certain = xi * xi < _CERTAIN
        per_square = np.where(certain, 1.0, xi * xi)
        logarithm = np.where(certain, moved, np.log1p(xi * xi * moved) / per_square)
        a = kappa * theta * (less * T - 2 * logarithm)
        return a, b

    def characteristic(self, u: Complex) -> Complex:
        """E exp(i u ln(S_T / F)). Shapes: u (nodes,) or (n, nodes) -> (n, nodes)."""
        a, b = self.exponents(u)
        value: Complex = np.exp(a + b * self.v0[:, None] + self.jumps(u))
        return value

    def jumps(self, u: Complex) -> Complex:
        """What jumps add to the exponent. Shapes: as `exponents`."""
        T, intensity, mean, deviation = (
            a[:, None] for a in (self.T, self.intensity, self.jump_mean, self.jump_deviation)
        )
        variance = deviation * deviation
        expected = np.expm1(mean + variance / 2)
        of_jump: Complex = intensity * T * (np.exp(1j * u * mean - variance * u * u / 2) - 1 - 1j * u * expected)
        return of_jump

    def __getitem__(self, rows: Any) -> HestonLaw:
        return HestonLaw(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def reach(self) -> npt.NDArray[np.int64]:
        """Nodes until the characteristic function is negligible, a power of two each. Shapes: -> (n,)."""
        nodes = np.full(len(self.T), 256, dtype=np.int64)
        left = np.arange(len(self.T))
        while len(left):
            u = (nodes[left] * _STEP)[:, None].astype(np.complex128)
            size = np.abs(self[left].characteristic(u - 0.5j))[:, 0] / (u[:, 0].real ** 2 + 0.25)
            left = left[size > _NEGLIGIBLE]
            nodes[left] *= 2
            if nodes.max() > _MOST_NODES:
                raise NumericsError(
                    "an integral over Heston's characteristic function does not converge: a time to expiry or a "
                    "variance is next to 0"
                )
        return nodes


def price(c: Any, option: Literal["put", "call"], spot: str = "X0") -> Array:
    """Discounted prices. Shapes: columns of (n,) -> (n,). Units: currency.

    Raises: NumericsError where a variance to expiry is so small, and not 0, that the integral does not converge.
    """
    forward, discount = _forward(c, spot)
    # There is nothing to integrate over where the price at expiry is known: at expiry, or without any variance.
    random = (c.T > 0) & ((c.v0 > 0) | (c.kappa * c.theta > 0) | (HestonLaw.of(c).intensity > 0))
    least = np.minimum(forward, c.K)
    if random.any():
        some = type(c)(*(np.asarray(column)[random] for column in c))
        least[random] = _overlap(some, forward[random], lambda u, law: 1.0)
    call = discount * (forward - least)
    put = call - discount * (forward - c.K)
    return np.asarray(np.maximum(call if option == "call" else put, 0.0))


def delta(c: Any, option: Literal["put", "call"], spot: str = "X0") -> Array:
    """Derivatives of prices by the spot. Shapes: columns of (n,) -> (n,)."""
    forward, discount = _forward(c, spot)
    slope = _overlap(c, forward, lambda u, law: 0.5 + 1j * u)
    of_call = discount * (forward - slope) / getattr(c, spot)
    return np.asarray(of_call if option == "call" else of_call - discount * forward / getattr(c, spot))


def gamma(c: Any, spot: str = "X0") -> Array:
    """Second derivatives of prices by the spot, the same for put and call. Shapes: columns of (n,) -> (n,)."""
    forward, discount = _forward(c, spot)
    # The overlap is (F K)^1/2 times an integral over (F / K)^iu.
    curve = _overlap(c, forward, lambda u, law: (0.5 + 1j * u) * (-0.5 + 1j * u))
    return np.asarray(-discount * curve / getattr(c, spot) ** 2)


def rho(c: Any, option: Literal["put", "call"], spot: str = "X0") -> Array:
    """Derivatives of prices by the interest rate. Shapes: columns of (n,) -> (n,)."""
    by_spot = delta(c, option, spot)
    return np.asarray(c.T * (getattr(c, spot) * by_spot - price(c, option, spot)))


def price_by_variance(c: Any, spot: str = "X0") -> Array:
    """Derivatives of prices by v0, the same for put and call. Shapes: columns of (n,) -> (n,)."""
    forward, discount = _forward(c, spot)
    return np.asarray(-discount * _overlap(c, forward, lambda u, law: law.exponents(u - 0.5j)[1]))


def terminal_quantile(c: Any, p: float, spot: str = "X0") -> Array:
    """The price at expiry below which it is with probability p. Shapes: columns of (n,) -> (n,). Units: currency.

    The distribution function is integrated for by Gil-Pelaez's formula, shifted into the strip where that converges
    fast, and inverted by bisection.
    """
    law = HestonLaw.of(c)
    forward, _ = _forward(c, spot)
    nodes = int(law.reach().max())
    # P(ln(S/F) > x) = exp(-x/2) / pi int_0^inf Re[exp(-i u x) phi(u - i/2) / (1/2 + i u)] du
    u = np.arange(nodes) * _STEP
    weights = np.where(np.arange(nodes) == 0, 0.5, 1.0) * _STEP / np.pi
    phi = law.characteristic(u.astype(np.complex128) - 0.5j) * weights / (0.5 + 1j * u)

    def above(x: Array) -> Array:
        value: Array = np.exp(-x / 2) * (np.exp(-1j * u * x[:, None]) * phi).real.sum(axis=1)
        return value

    low, high = np.full(len(law.T), -12.0), np.full(len(law.T), 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        too_high = above(middle) < 1 - p
        low, high = np.where(too_high, low, middle), np.where(too_high, middle, high)
    return np.asarray(forward * np.exp((low + high) / 2))


def _forward(c: Any, spot: str) -> tuple[Array, Array]:
    return np.asarray(getattr(c, spot) * np.exp((c.r - c.d) * c.T)), np.asarray(np.exp(-c.r * c.T))


def _overlap(c: Any, forward: Array, of: Callable[[Complex, HestonLaw], Any]) -> Array:
    """E min(S_T, K), or what it becomes with a factor `of` its integrand. Shapes: -> (n,)."""
    law, strike = HestonLaw.of(c), np.asarray(c.K, dtype=np.float64)
    nodes, moneyness = law.reach(), np.log(forward / strike)
    found = np.empty(len(forward))
    for count in np.unique(nodes):
        alike = np.flatnonzero(nodes == count)
        u = np.arange(count) * _STEP
        weights = np.where(np.arange(count) == 0, 0.5, 1.0) * _STEP / np.pi / (u * u + 0.25)
        for rows in np.array_split(alike, -(-len(alike) * count // _BLOCK)):
            part, points = law[rows], u.astype(np.complex128)
            integrand = part.characteristic(points - 0.5j) * np.exp(1j * points * moneyness[rows, None])
            found[rows] = (integrand * of(points, part)).real @ weights
    return np.asarray(np.sqrt(forward * strike) * found)
