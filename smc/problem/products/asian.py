"""Options on an average of prices: at equally spaced dates, the last of which is expiry."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import black, matched_average
from smc.problem.law import Law
from smc.problem.product import Product
from smc.problem.products.struck import StruckOption

__all__ = ["LEAST_PRICE", "ArithmeticAsianCall", "ArithmeticAsianPut", "Averaging", "FixedStrikeAverage"]

LEAST_PRICE = 1e-30
"""What a price is taken to be at least, where one needs its logarithm: one that was absorbed is 0."""


class Averaging(Product):
    """What an average is taken of: the prices on the `dates`, and that of today too, or all prices as time passes.

    `over`: 'dates'; 'today and dates', one more, all with the same weight; 'time', the integral, which the trapezoidal
    rule takes on the dates: its error falls with the square of their number.
    """

    recent: ClassVar[tuple[str, ...]] = ("over",)

    dates: WholeNumber = Setting(default=16, ge=1)
    over: Literal["dates", "today and dates", "time"] = "dates"

    @property
    def with_today(self) -> bool:
        """Whether the price of today counts."""
        return self.over != "dates"

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of today's price, of each date's, and of the last one's."""
        n = self.dates
        if self.over == "time":
            return 0.5 / n, 1.0 / n, 0.5 / n
        each = 1.0 / (n + 1 if self.with_today else n)
        return each if self.with_today else 0.0, each, each

    @property
    def first(self) -> float:
        """The weight of today's price."""
        return self.weights[0]

    @property
    def each(self) -> float:
        """The weight of a date."""
        return self.weights[1]

    @property
    def excess(self) -> float:
        """How much too much a sum over the dates counts the last one."""
        return self.weights[1] - self.weights[2]

    def on_dates(self, law: Law) -> tuple[Tensor, Tensor, Tensor]:
        """Forwards and variances of logarithms on the dates that count, today first; and the weights.

        Shapes: -> two of (n, dates), (dates,).
        """
        forwards, variances = law.on_dates(self.dates)
        weights = [self.each] * (self.dates - 1) + [self.weights[2]]
        if self.with_today:
            forwards = torch.cat([law.spot[:, None], forwards], dim=1)
            variances = torch.cat([0 * law.spot[:, None], variances], dim=1)
            weights = [self.first, *weights]
        return forwards, variances, forwards.new_tensor(weights)


class FixedStrikeAverage(Averaging, StruckOption):
    """Pays max(K - A, 0) or max(A - K, 0), as its `option` says; a subclass says what kind of average A is."""

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    @abstractmethod
    def matched(self, law: Law) -> tuple[Tensor, Tensor]:
        """The expected average, and the deviation of the log-normal number that is like it. Shapes: -> two of (n,)."""

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation of the average."""
        return law.c.K * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the average were log-normal with its first two moments."""
        mean, deviation = self.matched(law)
        return black(mean, law.c.K, deviation, self.sign) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike, from the expected average."""
        return (torch.log(self.expected(law) / law.c.K),)

    def width(self, law: Law) -> Tensor:
        """That of the average."""
        return self.matched(law)[1]

    def expected(self, law: Law) -> Tensor:
        """The expected average."""
        return self.matched(law)[0]


class ArithmeticAsianPut(FixedStrikeAverage):
    """Pays max(K - A, 0), A being the mean of the prices at `dates` dates."""

    kind: ClassVar[str] = "arithmetic_asian_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and today's part of the average."""
        return c.K, math.exp(-c.r * c.T), self.first * c.X0 if self.with_today else 0.0

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the prices so far."""
        return (seen[0] + spot,)

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """Nothing yet."""
        return (0.0,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(self.sign * (self.each * seen[0] + k[2] - self.excess * spot - k[0]), 0.0)

    def matched(self, law: Law) -> tuple[Tensor, Tensor]:
        """With the first two moments."""
        return matched_average(*self.on_dates(law))


class ArithmeticAsianCall(ArithmeticAsianPut):
    """Pays max(A - K, 0)."""

    kind: ClassVar[str] = "arithmetic_asian_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
