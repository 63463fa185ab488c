"""Options whose strike is set later: a multiple of the price on a date before expiry."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from pydantic import model_validator
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import black
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.schema import Field

__all__ = ["ForwardStartCall", "ForwardStartPut"]

_STRIKE = Field("m", "strike", "a ratio to the price on the date of its start", 0.8, 1.2, least=0.0, strict=True)


class ForwardStartCall(Product):
    """Pays max(S_T - m S_t, 0), t being date number `start` of `dates` equally spaced ones, the last of them expiry."""

    kind: ClassVar[str] = "forward_start_call"
    fields: ClassVar[tuple[Field, ...]] = (_STRIKE,)
    lipschitz: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...] | None] = ()
    option: ClassVar[Literal["put", "call"] | None] = "call"

    dates: WholeNumber = Setting(default=2, ge=2)
    start: WholeNumber = Setting(default=1, ge=1)

    @model_validator(mode="after")
    def _starts_before_expiry(self) -> ForwardStartCall:
        if self.start >= self.dates:
            raise ValueError(f"start must be below dates, which is {self.dates}, got {self.start}")
        return self

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def coefficients(self, c: Any) -> tuple[float, float]:
        """The strike's ratio, and the discount factor."""
        return c.m, math.exp(-c.r * c.T)

    def observe(
        self, seen: tuple[float, ...], spot: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """The price on the date of the start."""
        return (spot if date == self.start else seen[0],)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The discounted payoff."""
        return k[1] * max(self.sign * (spot - k[0] * seen[0]), 0.0)

    def unit(self, law: Law) -> Tensor:
        """The discounted forward, by the deviation after the start."""
        return law.forward * law.discount * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """Black's formula on what the price does after the start."""
        later = black(law.forward, law.c.m * self._start(law)[0], self.width(law), self.sign)
        return later * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the expected strike."""
        return (torch.log(law.forward / (law.c.m * self._start(law)[0])),)

    def width(self, law: Law) -> Tensor:
        """The deviation after the start."""
        return (law.deviation.square() - self._start(law)[1]).sqrt()

    def bounds(self, law: Law) -> Bounds:
        """The value of certain exercise, and the expected price, or strike."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        if not law.known:
            return Bounds(nothing, endless, endless)
        strike = law.c.m * self._start(law)[0]
        most = law.forward if self.option == "call" else strike
        lower = (self.sign * (law.forward - strike)).clamp(min=0)
        return Bounds(lower * law.discount, most * law.discount, endless)

    def parity(self, law: Law) -> Tensor | None:
        """A call is worth more by what the forward is above the expected strike."""
        if not law.known:
            return None
        return -self.sign * (law.forward - law.c.m * self._start(law)[0]) * law.discount

    def _start(self, law: Law) -> tuple[Tensor, Tensor]:
        """The expected price at the start, and the variance until then."""
        forwards, variances = law.on_dates(self.dates)
        return forwards[:, self.start - 1], variances[:, self.start - 1]


class ForwardStartPut(ForwardStartCall):
    """Pays max(m S_t - S_T, 0)."""

    kind: ClassVar[str] = "forward_start_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"
