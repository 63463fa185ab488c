"""Prices from what is known of a payoff before all of its path is drawn: the mean of a formula, not that of payoffs.

Three parts of a path can be left to a formula, and each has far less noise than the mean of payoffs, or none:

- the price's own normals. Given the path of the variance, a price under stochastic volatility is log-normal: only the
  variance has to be simulated, and a regression on controls, whose means are known, takes away most of what is left;
- the height of the bridge. Given all but the end of the Brownian motion that is the price's own, each price on a date
  is a known number times a power of one log-normal number: what is paid is paid where that number lies in an interval;
- what happens between steps. Given the prices on the steps, a barrier that is always looked at is passed between two of
  them with a known probability.

Process and product each declare their half; where one of them does not, payoffs are averaged.

Sources: Romano and Touzi, "Contingent claims and market completeness in a stochastic volatility model" (1997); Willard,
"Calculating prices and sensitivities for path-independent derivative securities in multifactor models" (1997); control
variates and bridges, Glasserman, "Monte Carlo Methods in Financial Engineering" (2003), sections 4.1 and 6.4.
"""

from __future__ import annotations

from abc import abstractmethod
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from smc.errors import ConfigError
from smc.problem.process import Process
from smc.problem.product import Product

if TYPE_CHECKING:
    from smc.problem.problem import Problem

__all__ = [
    "LEAST_VARIANCE",
    "ConditionallyLogNormal",
    "Estimator",
    "ExpectedOnPath",
    "PricedOnBridge",
    "PricedOnLogNormal",
    "estimator_of",
    "is_conditional",
]

Estimator = Literal["payoff", "path", "bridge", "outer"]
"""What is expected of a payoff: itself; given the prices on the steps, the bridge, or the outer path."""

LEAST_VARIANCE = 1e-12
"""What a variance is taken to be at least, where one divides by its root."""


class ConditionallyLogNormal(Process):
    """A process that also says, in scalar methods, how the outer part of a path moves and what follows from it.

    Attributes of the class: `outer`, how many normals a step of the outer part takes, 0 where prices are log-normal as
    they are; `finals`, how many more are drawn once a path, at expiry.
    """

    outer: ClassVar[int] = 1
    finals: ClassVar[int] = 0

    @property
    def conditional(self) -> bool:
        """Whether it is so with the settings of this instance."""
        return True

    @abstractmethod
    def outer_coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """What a contract's outer steps of `dt` years need, in double precision."""

    @abstractmethod
    def outer_start(self, c: Any) -> tuple[float, ...]:
        """The outer state at the beginning."""

    @abstractmethod
    def outer_step(
        self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """The outer state one step later."""

    @abstractmethod
    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """Mean and variance of the logarithm of the price at expiry, given the outer path; and controls.

        Controls are numbers of order one, whose expected value in the model is 0, and that prices go with.
        """

    def along(self, state: tuple[float, ...], left: float, k: tuple[float, ...]) -> tuple[float, float]:
        """Mean and variance of the logarithm of the price `left` steps before expiry, given the outer path so far.

        The price's own part has independent increments. A process may leave it out, where it has no such law.
        Raises: ConfigError where it does.
        """
        raise ConfigError(f"{self.kind} does not say the law of the price before expiry")


class PricedOnLogNormal(Product):
    """A product without dates that also says what it is worth on a log-normal price."""

    @abstractmethod
    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The expected payoff, discounted, where the logarithm of the price at expiry is normal with these moments."""


class PricedOnBridge(Product):
    """A product on dates that also says what it is worth on a path whose bridge is known, and not its end.

    On a date by which the own variance is u, of w in all, the logarithm of the price is what it is on the path, plus
    u / w times y; y is normal with the mean -own and the variance w.
    """

    @property
    def bridged(self) -> bool:
        """Whether it does so with the settings of this instance."""
        return True

    @abstractmethod
    def begin_bridge(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """What is kept of a bridge before the first date."""

    @abstractmethod
    def observe_bridge(
        self, kept: tuple[float, ...], log_price: float, variance: float, date: float, k: tuple[float, ...]
    ) -> tuple[float, ...]:
        """What is kept after date number `date`, by which the own variance is `variance`, above 0."""

    @abstractmethod
    def on_bridge(
        self, kept: tuple[float, ...], log_price: float, own: float, variance: float, k: tuple[float, ...]
    ) -> float:
        """The expected payoff, discounted. `log_price` is that of expiry on the path, `own` the price's own part."""


class ExpectedOnPath(Product):
    """A product that also says what is expected of it, given the prices on the steps and not what is between them."""

    @abstractmethod
    def expected_payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """The expected payoff, discounted."""


def estimator_of(problem: Problem) -> Estimator:
    """The best price that there is of a path of a problem.

    A class that changes a method of a path, and not the half that tells what is expected of it, is taken to have no
    such half.
    """
    process, product = problem.process, problem.product
    if product.continuous:
        keeps = isinstance(product, ExpectedOnPath) and _keeps_up(product, "expected_payoff")
        return "path" if keeps else "payoff"
    if not (isinstance(process, ConditionallyLogNormal) and process.conditional and _keeps_up(process, "given")):
        return "payoff"
    if isinstance(product, PricedOnLogNormal):
        keeps = product.dates == 0 and process.outer > 0 and _keeps_up(product, "on_log_normal")
        return "outer" if keeps else "payoff"
    if isinstance(product, PricedOnBridge) and product.bridged and product.dates > 0 and process.finals == 0:
        keeps = _keeps_up(process, "along") and _keeps_up(product, "on_bridge")
        return "bridge" if keeps and type(process).along is not ConditionallyLogNormal.along else "payoff"
    return "payoff"


def is_conditional(problem: Problem) -> bool:
    """Whether prices of a problem can be taken from something better than payoffs."""
    return estimator_of(problem) != "payoff"


# What a class may say anew without a path of it moving, or paying, otherwise.
_OF_NO_PATH = frozenset(
    {
        "title", "largest", "exact", "longest_step", "restarted", "growth", "deviation", "growths", "covariances",
        "features", "discount", "check_ready", "as_asked", "shortfall", "unit", "anchor", "distances", "width",
        "bounds", "parity", "notionals",
    }
)  # fmt: skip


def _keeps_up(part: Process | Product, half: str) -> bool:
    """Whether no class below the one that defines the half has a method, or a property, that a path may go through."""
    for holder in type(part).__mro__:
        own = vars(holder)
        if half in own:
            return True
        changed = (name for name, value in own.items() if isinstance(value, FunctionType | property))
        if any(name not in _OF_NO_PATH and not name.startswith("__") for name in changed):
            return False
    return False
