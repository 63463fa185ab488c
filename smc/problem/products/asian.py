"""Options on an average: of the prices at equally spaced dates, the last of which is expiry."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import black, matched_average
from smc.problem.law import Law
from smc.problem.products.struck import StruckOption

__all__ = ["ArithmeticAsianCall", "ArithmeticAsianPut"]


class ArithmeticAsianPut(StruckOption):
    """Pays max(K - A, 0), A being the mean of the prices at `dates` dates."""

    kind: ClassVar[str] = "arithmetic_asian_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"

    dates: WholeNumber = Setting(default=16, ge=1)

    def coefficients(self, c: Any) -> tuple[float, float, float]:
        """Strike, discount factor, and the weight of a date."""
        return c.K, math.exp(-c.r * c.T), 1.0 / self.dates

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The sum of the prices so far."""
        return (seen[0] + spot,)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[0] - k[2] * seen[0], 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted strike, by the deviation of the average."""
        return law.c.K * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The price if the average were log-normal with its first two moments."""
        mean, deviation = matched_average(*law.on_dates(self.dates))
        return black(mean, law.c.K, deviation, 1.0 if self.option == "call" else -1.0) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike, from the expected average."""
        return (torch.log(self.expected(law) / law.c.K),)

    def width(self, law: Law) -> Tensor:
        """That of the average."""
        return matched_average(*law.on_dates(self.dates))[1]

    def expected(self, law: Law) -> Tensor:
        """The mean of the forwards on the dates."""
        return law.on_dates(self.dates)[0].mean(dim=1)


class ArithmeticAsianCall(ArithmeticAsianPut):
    """Pays max(A - K, 0)."""

    kind: ClassVar[str] = "arithmetic_asian_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(k[2] * seen[0] - k[0], 0.0)
