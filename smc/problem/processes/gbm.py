"""Geometric Brownian motion, dS = (r - d) S dt + v S dW.

Source: Euler-Maruyama and log-Euler schemes, Glasserman, "Monte Carlo Methods in Financial Engineering" (2003), ch. 6.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from smc.problem.conditional import ConditionallyLogNormal
from smc.problem.schema import Field

__all__ = ["DIVIDEND", "RATE", "SPOT", "VOLATILITY", "GeometricBrownianMotion"]

SPOT = Field("X0", "spot", "in currency", 50.0, 150.0, least=0.0, strict=True)
RATE = Field("r", "interest rate", "per year, so that 5 % is 0.05", 0.0, 0.08, doubtful=1.0)
DIVIDEND = Field("d", "dividend yield", "per year, so that 5 % is 0.05", 0.0, 0.04, doubtful=1.0)
VOLATILITY = Field(
    "v",
    "volatility",
    "per square root of a year, so that 20 % is 0.2",
    0.05,
    0.6,
    least=0.0,
    doubtful=5.0,
    certain=True,
)


class GeometricBrownianMotion(ConditionallyLogNormal):
    """Log-normal prices. `scheme`: 'log' steps ln(S / X0), which is exact; 'euler' steps S / X0 and has a bias."""

    kind: ClassVar[str] = "gbm"
    fields: ClassVar[tuple[Field, ...]] = (SPOT, RATE, DIVIDEND, VOLATILITY)
    inputs: ClassVar[tuple[str, ...] | None] = ("r", "d")
    log_normal: ClassVar[bool] = True
    continuous: ClassVar[bool] = True
    outer: ClassVar[int] = 0

    scheme: Literal["log", "euler"] = "log"

    @property
    def title(self) -> str:
        """In full."""
        return "geometric Brownian motion"

    @property
    def exact(self) -> bool:
        """Whether one step is as good as many."""
        return self.scheme == "log"

    @property
    def euler(self) -> bool:
        """Whether the state is the ratio of price and spot, and not its logarithm."""
        return self.scheme == "euler"

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: drift, or growth; and volatility. And the spot."""
        if self.euler:
            return 1.0 + (c.r - c.d) * dt, c.v * math.sqrt(dt), c.X0
        return (c.r - c.d - 0.5 * c.v * c.v) * dt, c.v * math.sqrt(dt), c.X0

    def start(self, c: Any) -> tuple[float, ...]:
        """A ratio of 1, or its logarithm: small numbers lose less to rounding."""
        return (1.0 if self.euler else 0.0,)

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """One Euler step may cross zero, a price may not: it is reflected."""
        if self.euler:
            return (abs(state[0] * (k[1] * normals[0] + k[0])),)
        return (state[0] + k[0] + k[1] * normals[0],)

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The price."""
        return k[2] * (state[0] if self.euler else math.exp(state[0]))

    def variation(self, before: tuple[float, ...], after: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The same in each step."""
        return k[1] * k[1]

    # --- the logarithm of the price, all of which is its own ------------------------------------------

    @property
    def conditional(self) -> bool:
        """Prices that are stepped by Euler are not log-normal."""
        return not self.euler

    def outer_coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: drift and variance; and the mean of the logarithm of the price at expiry."""
        drift = c.r - c.d - 0.5 * c.v * c.v
        return drift * dt, c.v * c.v * dt, math.log(c.X0) + drift * c.T

    def outer_start(self, c: Any) -> tuple[float, ...]:
        """How many steps have been taken."""
        return (0.0,)

    def outer_step(
        self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """One more."""
        return (state[0] + 1.0,)

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The law of the price."""
        return k[2], k[1] * state[0]

    def along(self, state: tuple[float, ...], left: float, k: tuple[float, ...]) -> tuple[float, float]:
        """Both grow with time."""
        return k[2] - left * k[0], k[1] * state[0]

    def restarted(self, c: Any, prices: Any) -> Any:
        """From another spot."""
        return {"X0": prices[:, 0]}

    # --- what is known of prices ---------------------------------------------------------------------

    def growth(self, c: Any, t: Any) -> Any:
        """At the rate less the dividend yield."""
        return (c.r - c.d) * t

    def deviation(self, c: Any, t: Any) -> Any:
        """With the square root of time."""
        return c.v * t.sqrt()
