"""Cash-or-nothing calls: an amount of currency if the price at expiry is above a strike."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import RealNumber
from smc.problem.anchors import smooth_digital
from smc.problem.conditional import LEAST_VARIANCE
from smc.problem.law import Law
from smc.problem.normal import lower_tail
from smc.problem.product import Bounds
from smc.problem.products.digital import DigitalPut

__all__ = ["CashOrNothingCall", "CashOrNothingPut"]


class CashOrNothingCall(DigitalPut):
    """Pays `cash` if S_T > K."""

    kind: ClassVar[str] = "cash_or_nothing_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"

    cash: RealNumber = Setting(default=1.0, gt=0)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return self.cash * k[1] if spot > k[0] else 0.0

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The probability that it pays, times the amount, discounted."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        return self.cash * k[1] * lower_tail((mean - math.log(k[0])) / deviation)

    def unit(self, law: Law) -> Tensor:
        """What is paid, discounted."""
        return self.cash * law.discount

    def anchor(self, law: Law) -> Tensor:
        """A rounded step."""
        return smooth_digital(self.distances(law)[0] / law.deviation - law.deviation / 2)

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and what is paid."""
        most = self.unit(law)
        return Bounds(0 * most, most, most)

    def notionals(self, law: Law) -> Tensor:
        """The amount."""
        return 0 * law.spot + self.cash


class CashOrNothingPut(CashOrNothingCall):
    """Pays `cash` if S_T < K."""

    kind: ClassVar[str] = "cash_or_nothing_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return self.cash * k[1] if spot < k[0] else 0.0

    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The probability that it pays, times the amount, discounted."""
        deviation = math.sqrt(max(variance, LEAST_VARIANCE))
        return self.cash * k[1] * lower_tail((math.log(k[0]) - mean) / deviation)

    def anchor(self, law: Law) -> Tensor:
        """A rounded step."""
        return 1 - super().anchor(law)
