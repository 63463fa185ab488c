"""Autocallable notes on several assets, of which the worst counts."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.anchors import NoteTerms, extreme_of, note_on_dates
from smc.problem.law import Law
from smc.problem.products.autocallable import NOTE_FIELDS, Autocallable
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["WorstOfAutocallable"]

_MOST_ASSETS = 16


class WorstOfAutocallable(Autocallable):
    """The same note on the worst performance, min S_i / K_i, of `n_assets` assets. K1, K2, ... are initial prices."""

    kind: ClassVar[str] = "worst_of_autocallable"

    n_assets: WholeNumber = Setting(default=2, ge=2, le=_MOST_ASSETS)

    @classmethod
    def largest(cls) -> WorstOfAutocallable:
        """On as many assets as there may be."""
        return cls(n_assets=_MOST_ASSETS)

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    @property
    def bridged(self) -> bool:
        """The worst of several prices is not one number times a power of another."""
        return False

    @cached_property
    def initials(self) -> tuple[str, ...]:
        """Names of the initial prices."""
        return tuple(f"K{i}" for i in range(1, self.n_assets + 1))

    @cached_property
    def fields(self) -> tuple[Field, ...]:  # type: ignore[override]
        """Initial prices, and what the note promises."""
        return (*(STRIKE.of(name, f"of asset {name[1:]}") for name in self.initials), *NOTE_FIELDS)

    @property
    def still(self) -> tuple[str, ...]:  # type: ignore[override]
        """The initial prices."""
        return self.initials

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """As of one asset whose initial price is 1; and one over each asset's."""
        discount = math.exp(-c.r * c.T / self.dates)
        return (
            c.call_level, c.coupon_level, c.protection, 1.0, self.nominal * c.coupon, discount,
            *tuple(1.0 / getattr(c, self.initials[i]) for i in range(self.n_assets)),
        )  # fmt: skip

    def worst(self, spot: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The worst performance."""
        return min(spot[i] * k[6 + i] for i in range(self.n_assets))

    def observe(
        self, seen: tuple[float, ...], spot: Any, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """As of one asset."""
        return super().observe(seen, self.worst(spot, k), date, k)

    def payoff(self, seen: tuple[float, ...], spot: Any, k: tuple[float, ...]) -> float:
        """As of one asset."""
        return super().payoff(seen, self.worst(spot, k), k)

    # --- what is known of prices ---------------------------------------------------------------------

    def unit(self, law: Law) -> Tensor:
        """The discounted nominal, by the deviation of the worst performance."""
        return self.nominal * law.discount * self.width(law)

    def width(self, law: Law) -> Tensor:
        """That of the worst performance at expiry."""
        return extreme_of(law.forwards / self._initial(law), law.covariances, highest=False)[1]

    def anchor(self, law: Law) -> Tensor:
        """The price if the worst performance were log-normal on each date."""
        return note_on_dates(*self._worst_on_dates(law), self._terms(law)) * self.nominal / self.unit(law)

    def _initial(self, law: Law) -> Tensor:
        return torch.stack([getattr(law.c, name) for name in self.initials], dim=1)

    def _worst_on_dates(self, law: Law) -> tuple[Tensor, Tensor]:
        """Means, and variances of logarithms, of the worst performance on the dates. Shapes: -> two of (n, dates)."""
        forwards, worst = law.paths(self.dates) / self._initial(law)[:, None], []
        for date in range(1, self.dates + 1):
            covariances = law.covariances_at(law.c.T * (date / self.dates))
            worst.append(extreme_of(forwards[:, date - 1], covariances, highest=False))
        means, deviations = zip(*worst, strict=True)
        return torch.stack(means, dim=1), torch.stack(deviations, dim=1).square()

    def _terms(self, law: Law) -> NoteTerms:
        c, share = law.c, law.spot.new_tensor(range(1, self.dates + 1)) / self.dates
        discounts = torch.exp(law.discount.log()[:, None] * share)
        one = torch.ones_like(c.call_level)
        return NoteTerms(c.call_level, c.coupon_level, c.protection, one, c.coupon, discounts, memory=self.memory)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the levels of redemption, coupon and protection, from the worst performance; and of each asset."""
        performances = law.forwards / self._initial(law)
        worst = torch.log(extreme_of(performances, law.covariances, highest=False)[0])
        levels = (law.c.call_level, law.c.coupon_level, law.c.protection)
        return *(worst - torch.log(level) for level in levels), *torch.log(performances).unbind(dim=1)

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """The guess of the price."""
        return (self.anchor(law) * self.width(law),)
