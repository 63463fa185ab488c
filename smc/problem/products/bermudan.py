"""Bermudan options: exercised on one of several dates, as a policy says that was learned over the whole domain.

What is simulated is the payoff under the policy, so that the price is a lower bound of the option's. An upper bound
follows by duality, `smc.prediction.duality`.
Sources: Longstaff and Schwartz, "Valuing American options by simulation" (2001); a network for all dates, Becker,
Cheridito and Jentzen, "Deep optimal stopping" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field as Setting
from pydantic import model_validator
from torch import Tensor

from smc.errors import ConfigError
from smc.numeric_fields import WholeNumber
from smc.problem.anchors import black, extreme_of, smooth_maximum
from smc.problem.exercise import Policy
from smc.problem.law import Law
from smc.problem.product import Bounds, Product
from smc.problem.products.struck import STRIKE
from smc.problem.schema import Field

__all__ = ["BermudanCall", "BermudanMaxCall", "BermudanOption", "BermudanPut"]

# Where the hidden units begin among the coefficients, and how wide the kink between two guesses is, in deviations.
_UNITS, _SOFTNESS = 6, 0.1
# What has a logarithm: of the contract's numbers, and of prices as a share of the strike, where they may be 0.
_LEAST, _LEAST_RATIO = 1e-12, 1e-6


class BermudanOption(Product):
    """Pays max(sign (U - K), 0) on the first of `dates` dates on which the policy exercises, discounted from there.

    On the last date it is exercised if it pays. `policy` is learned for the domain when a pricer is made, unless it is
    given. A subclass says what U is, and which ratios of prices the policy sees.
    """

    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    inputs: ClassVar[tuple[str, ...] | None] = ()
    still: ClassVar[tuple[str, ...]] = ("K",)
    seen_count: ClassVar[int] = 1

    dates: WholeNumber = Setting(default=8, ge=1)
    policy: Policy | None = None

    @model_validator(mode="after")
    def _policy_fits(self) -> BermudanOption:
        if self.policy is not None and len(self.policy.of_ratios) != self.policy.units * self.seen_count:
            ratios = len(self.policy.of_ratios) // self.policy.units
            raise ValueError(f"its policy sees {self.seen_count} ratios of prices, and the one given sees {ratios}")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that the policy reads."""
        return () if self.policy is None else self.policy.fields

    @property
    def sign(self) -> float:
        """1 of a call, -1 of a put."""
        return 1.0 if self.option == "call" else -1.0

    def check_ready(self) -> None:
        """Raises: ConfigError for want of a policy."""
        if self.policy is None:
            raise ConfigError(
                f"{self.kind} has no policy of exercise: smc.learning.exercise.with_policy learns one for a domain, as "
                "a pricer does when it is made"
            )

    def as_asked(self) -> BermudanOption:
        """Without its policy."""
        return self.model_copy(update={"policy": None})

    # --- what one path pays --------------------------------------------------------------------------

    @property
    def known(self) -> Policy:
        """The policy. Raises: ConfigError for want of one."""
        self.check_ready()
        assert self.policy is not None
        return self.policy

    @property
    def read(self) -> int:
        """How many numbers of the contract the policy reads."""
        return len(self.known.fields)

    @property
    def units(self) -> int:
        """How many hidden units it has."""
        return self.known.units

    def coefficients(self, c: Any) -> tuple[float, ...]:
        """Strike, its logarithm, one over the scale of ratios, and the discount, rate and growth of a date.

        After them a term for each hidden unit.
        """
        numbers = tuple(
            (
                (
                    math.log(max(getattr(c, self.known.fields[i]), _LEAST))
                    if self.known.logarithms[i]
                    else getattr(c, self.known.fields[i])
                )
                - self.known.centres[i]
            )
            / self.known.spreads[i]
            for i in range(self.read)
        )
        scale = self.known.scale[0] + sum(
            numbers[i] * (self.known.scale[1 + i] + numbers[i] * self.known.scale[1 + self.read + i])
            for i in range(self.read)
        )
        growth = self.known.growth[0] + sum(
            numbers[i] * (self.known.growth[1 + i] + numbers[i] * self.known.growth[1 + self.read + i])
            for i in range(self.read)
        )
        return (
            c.K,
            math.log(c.K),
            math.exp(-scale),
            math.exp(-c.r * c.T / self.dates),
            c.r * c.T / self.dates,
            growth * c.T / self.dates,
            *tuple(
                self.known.biases[u]
                + sum(self.known.of_fields[u * self.read + i] * numbers[i] for i in range(self.read))
                for u in range(self.units)
            ),
        )

    def waiting(self, price: float, ratios: tuple[float, ...], left: float, k: tuple[float, ...]) -> float:
        """How much more it is worth to wait than to exercise, as the policy sees it, in units of K times the scale.

        `left` are the dates to come.
        """
        certain = max(self.forward(price, 1.0, k), self.forward(price, left, k), 0.0)
        more = certain - max(self.sign * (price - k[0]), 0.0)
        hidden = tuple(
            k[_UNITS + u]
            + self.known.of_time[u] * (left / self.dates)
            + sum(self.known.of_ratios[u * self.seen_count + i] * ratios[i] for i in range(self.seen_count))
            for u in range(self.units)
        )
        told = sum(self.known.output[u] * hidden[u] / (1.0 + abs(hidden[u])) for u in range(self.units))
        return more * k[2] / k[0] + self.known.output[self.units] + told

    def forward(self, price: float, dates: float, k: tuple[float, ...]) -> float:
        """What exercise is expected to be worth after so many dates if it is certain, discounted to now."""
        return self.sign * (price * math.exp(dates * (k[5] - k[4])) - k[0] * math.exp(-dates * k[4]))

    def underlying(self, spot: Any) -> float:
        """What is compared with the strike."""
        return spot

    def seen_prices(self, spot: Any, k: tuple[float, ...]) -> tuple[float, ...]:
        """What the policy sees of prices: logarithms of ratios to the strike, over their scale."""
        return ((math.log(max(spot, _LEAST_RATIO * k[0])) - k[1]) * k[2],)

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """1 until it is exercised; what was paid, and the discount factor."""
        return 1.0, 0.0, 1.0

    def observe(
        self, seen: tuple[float, ...], spot: Any, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:  # fmt: skip
        """Exercised where it pays and waiting is worth no more, or time is up."""
        discount, price = seen[2] * k[3], self.underlying(spot)
        pays = max(self.sign * (price - k[0]), 0.0)
        waiting = self.waiting(price, self.seen_prices(spot, k), self.dates - date, k)
        exercised = seen[0] if pays > 0.0 and (waiting <= 0.0 or date >= self.dates) else 0.0
        return seen[0] - exercised, seen[1] + exercised * discount * pays, discount

    def payoff(self, seen: tuple[float, ...], spot: Any, k: tuple[float, ...]) -> float:
        """What was paid, discounted."""
        return seen[1]

    def certain_payoff(self, path: Sequence[Any], c: Any) -> float:
        """That of the best date, which whoever knows the prices knows."""
        paid = (
            math.exp(-c.r * c.T * (date + 1) / self.dates) * self.sign * (self.underlying(price) - c.K)
            for date, price in enumerate(path)
        )
        return max(0.0, *paid)

    # --- for learning a policy, in torch -------------------------------------------------------------

    def underlyings(self, prices: Tensor) -> Tensor:
        """What is compared with the strike. Shapes: prices (..., assets) -> (...)."""
        return prices[..., 0]

    def logs_seen(self, prices: Tensor, strike: Tensor) -> Tensor:
        """Logarithms of what `seen_prices` sees, not scaled. Shapes: (..., assets), (...) -> (..., seen_count)."""
        return torch.log((prices / strike[..., None]).clamp(min=_LEAST_RATIO))

    def certain(self, prices: Tensor, strike: Tensor, rate: Tensor, growth: Tensor, dates: Tensor) -> Tensor:
        """What waiting is certain to be worth more than exercise, as in `waiting`, over the strike.

        Shapes: prices (..., assets), rate and growth of a date, and `dates` to come (...) -> (...).
        """
        u = self.underlyings(prices) / strike

        def forward(n: Tensor) -> Tensor:
            return self.sign * (u * torch.exp(n * (growth - rate)) - torch.exp(-n * rate))

        worth = torch.maximum(forward(torch.ones_like(dates)), forward(dates)).clamp(min=0)
        return worth - (self.sign * (u - 1)).clamp(min=0)

    # --- what is known of prices ---------------------------------------------------------------------

    def unit(self, law: Law) -> Tensor:
        """The strike, by the deviation."""
        return law.c.K * self.width(law)

    def anchor(self, law: Law) -> Tensor:
        """The European option, or what exercise on the first date is worth, whichever is more, the kink rounded."""
        mean, deviation = self.matched(law)
        discount = law.discount
        european = black(mean, law.c.K, deviation, self.sign) * discount
        first, unit = 1 / self.dates, self.unit(law)
        early = self.sign * (law.spot * (law.growth * first).exp() - law.c.K) * discount**first
        return smooth_maximum(european / unit, early / unit, _SOFTNESS)

    def matched(self, law: Law) -> tuple[Tensor, Tensor]:
        """Mean of U at expiry, and the deviation of its logarithm. Shapes: -> two of (n,)."""
        return law.forward, law.deviation

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike, from the spot and from the forward."""
        return torch.log(law.spot / law.c.K), torch.log(law.spot / law.c.K) + law.growth

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How much interest and dividends matter beside the deviation, and the guess of the price."""
        w = self.width(law)
        rate = -law.discount.log()
        return rate / (rate.abs() + w), law.growth / (law.growth.abs() + w), torch.log1p(self.anchor(law).clamp(min=0))

    def bounds(self, law: Law) -> Bounds:
        """Nothing, and the strike of a put; a call has no bound."""
        nothing, endless = 0 * law.spot, torch.full_like(law.spot, math.inf)
        strike = law.c.K * torch.maximum(law.discount, law.discount ** (1 / self.dates))
        most = strike if self.option == "put" else endless
        return Bounds(nothing, most, most)


class BermudanPut(BermudanOption):
    """Pays max(K - S, 0) on the date of exercise."""

    kind: ClassVar[str] = "bermudan_put"
    option: ClassVar[Literal["put", "call"] | None] = "put"


class BermudanCall(BermudanOption):
    """Pays max(S - K, 0) on the date of exercise."""

    kind: ClassVar[str] = "bermudan_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"


class BermudanMaxCall(BermudanOption):
    """Pays max(max S_i - K, 0) on the date of exercise, of `n_assets` assets."""

    kind: ClassVar[str] = "bermudan_max_call"
    option: ClassVar[Literal["put", "call"] | None] = "call"
    seen_count: ClassVar[int] = 3

    n_assets: WholeNumber = Setting(default=2, ge=2, le=16)

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    def underlying(self, spot: Any) -> float:
        """The highest price."""
        return max(spot[i] for i in range(self.n_assets))

    def seen_prices(self, spot: Any, k: tuple[float, ...]) -> tuple[float, ...]:
        """Of the highest price, of the second, and of the mean."""
        best, second = max(spot[0], spot[1]), min(spot[0], spot[1])
        for i in range(2, self.n_assets):
            second = max(second, min(best, spot[i]))
            best = max(best, spot[i])
        mean = sum(spot[i] for i in range(self.n_assets)) / self.n_assets
        highest = (math.log(best) - k[1]) * k[2]
        return highest, (math.log(second) - k[1]) * k[2], (math.log(mean) - k[1]) * k[2]

    def underlyings(self, prices: Tensor) -> Tensor:
        """The highest price."""
        return prices.amax(dim=-1)

    def logs_seen(self, prices: Tensor, strike: Tensor) -> Tensor:
        """Of the highest price, of the second, and of the mean."""
        seen = torch.cat([prices.topk(2, dim=-1).values, prices.mean(dim=-1, keepdim=True)], dim=-1)
        return torch.log(seen / strike[..., None])

    def matched(self, law: Law) -> tuple[Tensor, Tensor]:
        """Of the highest price."""
        return extreme_of(law.forwards, law.covariances, highest=True)

    def width(self, law: Law) -> Tensor:
        """That of the highest price."""
        return self.matched(law)[1]

    def anchor(self, law: Law) -> Tensor:
        """The European option."""
        mean, deviation = self.matched(law)
        return black(mean, law.c.K, deviation, self.sign) * law.discount / self.unit(law)

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """Of the strike, from the expected highest price, and from each spot."""
        return (
            torch.log(self.matched(law)[0] / law.c.K),
            *torch.log(law.spots / law.c.K[:, None]).unbind(dim=1),
        )

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """How much interest matters beside the deviation, and the guess of the price."""
        w, rate = self.width(law), -law.discount.log()
        return rate / (rate.abs() + w), torch.log1p(self.anchor(law))
