"""Options whose strike is an average: what the price at expiry is above it, or below."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from smc.problem.anchors import exchange, geometric_average, matched_average
from smc.problem.law import Law
from smc.problem.product import Bounds
from smc.problem.products.asian import LEAST_PRICE, Averaging
from smc.problem.schema import Field

__all__ = [
    "ArithmeticAsianFloatingCall",
    "ArithmeticAsianFloatingPut",
    "FloatingStrike",
    "GeometricAsianFloatingCall",
    "GeometricAsianFloatingPut",
]


class FloatingStrike(Averaging):
    """Pays max(S_T - A, 0) or max(A - S_T, 0), as its `option` says; a subclass says what kind of average A is."""

    fields: ClassVar[tuple[Field, ...]] = ()
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    @abstractmethod
    def average(self, law: Law) -> tuple[Tensor, Tensor, Tensor]:
        """Of the log-normal number that is like the average: mean, deviation, covariance with the logarithm of S_T."""

    def unit(self, law: Law) -> Tensor:
        """The discounted forward, by the deviation of the ratio of price and average."""
        return law.forward * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the average were log-normal."""
        return self._exchange(law)[0] * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the expected average."""
        return (torch.log(law.forward / self.average(law)[0]),)

    def width(self, law: Law) -> Tensor:
        """That of the ratio of price and average."""
        return self._exchange(law)[1]

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and the forward, or the mean of the forwards."""
        forwards, _, weights = self.on_dates(law)
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        most = (law.forward if self.option == "call" else forwards @ weights) * law.discount
        return Bounds(nothing, most if law.known else endless, endless)

    def _exchange(self, law: Law) -> tuple[Tensor, Tensor]:
        mean, deviation, covariance = self.average(law)
        average, price = (mean, deviation), (law.forward, law.deviation)
        if self.option == "call":
            return exchange(price, average, covariance)
        return exchange(average, price, covariance)


class ArithmeticAsianFloatingCall(FloatingStrike):
    """Pays max(S_T - A, 0), A being the mean of the prices at `dates` dates."""

    kind: ClassVar[str] = "arithmetic_asian_floating_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"

    def coefficients(self, c: Any) -> tuple[float, float]:
        """The discount factor, and today's part of the average."""
        return math.exp(-c.r * c.T), self.first * c.X0 if self.with_today else 0.0

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the prices so far."""
        return (seen[0] + spot,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[0] * max(self.sign * (spot - (self.each * seen[0] + k[1] - self.excess * spot)), 0.0)

    def average(self, law: Law) -> tuple[Tensor, Tensor, Tensor]:
        """With the first two moments, and the first of its product with the price."""
        forwards, variances, weights = self.on_dates(law)
        mean, deviation = matched_average(forwards, variances, weights)
        return mean, deviation, torch.log((forwards * variances.exp()) @ weights / mean)

    def parity(self, law: Law) -> Tensor | None:
        """A call is worth more by what the forward is above the expected average."""
        if not law.known:
            return None
        more = (law.forward - self.average(law)[0]) * law.discount
        return more if self.option == "put" else -more


class ArithmeticAsianFloatingPut(ArithmeticAsianFloatingCall):
    """Pays max(A - S_T, 0)."""

    kind: ClassVar[str] = "arithmetic_asian_floating_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"


class GeometricAsianFloatingCall(FloatingStrike):
    """Pays max(S_T - G, 0), G being the geometric mean of the prices at `dates` dates."""

    kind: ClassVar[str] = "geometric_asian_floating_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"

    def coefficients(self, c: Any) -> tuple[float, float]:
        """The discount factor, and today's part of the mean logarithm."""
        return math.exp(-c.r * c.T), self.first * math.log(c.X0) if self.with_today else 0.0

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the logarithms so far."""
        return (seen[0] + math.log(max(spot, LEAST_PRICE)),)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        average = math.exp(self.each * seen[0] + k[1] - self.excess * math.log(max(spot, LEAST_PRICE)))
        return k[0] * max(self.sign * (spot - average), 0.0)

    def average(self, law: Law) -> tuple[Tensor, Tensor, Tensor]:
        """That of log-normal prices."""
        forwards, variances, weights = self.on_dates(law)
        return *geometric_average(forwards, variances, weights), variances @ weights


class GeometricAsianFloatingPut(GeometricAsianFloatingCall):
    """Pays max(G - S_T, 0)."""

    kind: ClassVar[str] = "geometric_asian_floating_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
