"""Prices at expiry that are log-normal, given the part of a path that some of its normals drive.

Given the path of the variance, a price under stochastic volatility is log-normal: its expected payoff is a formula, and
only the variance has to be simulated. The mean of that formula over paths is a price with far less noise than the mean
of payoffs; a regression on controls, whose means are known, takes away most of what is left. Process and product each
declare their half; where one of them does not, payoffs are averaged.

Sources: Romano and Touzi, "Contingent claims and market completeness in a stochastic volatility model" (1997); Willard,
"Calculating prices and sensitivities for path-independent derivative securities in multifactor models" (1997); control
variates, Glasserman, "Monte Carlo Methods in Financial Engineering" (2003), section 4.1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from smc.problem.process import Process
from smc.problem.product import Product

if TYPE_CHECKING:
    from smc.problem.problem import Problem

__all__ = ["LEAST_VARIANCE", "ConditionallyLogNormal", "PricedOnLogNormal", "is_conditional"]


LEAST_VARIANCE = 1e-12
"""What a variance is taken to be at least, where one divides by its root."""


class ConditionallyLogNormal(Process):
    """A process that also says, in scalar methods, how the outer part of a path moves and what follows from it.

    Attributes of the class: `outer`, how many normals a step of the outer part takes; `finals`, how many more are drawn
    once a path, at expiry.
    """

    outer: ClassVar[int] = 1
    finals: ClassVar[int] = 0

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


class PricedOnLogNormal(Product):
    """A product without dates that also says what it is worth on a log-normal price."""

    @abstractmethod
    def on_log_normal(self, mean: float, variance: float, k: tuple[float, ...]) -> float:
        """The expected payoff, discounted, where the logarithm of the price at expiry is normal with these moments."""


def is_conditional(problem: Problem) -> bool:
    """Whether prices of a problem can be taken from the law of the price given the outer path.

    A class that changes how a path moves or what it pays, and not the other half of it, is taken to have no such half.
    """
    process, product = problem.process, problem.product
    return (
        isinstance(process, ConditionallyLogNormal)
        and isinstance(product, PricedOnLogNormal)
        and product.dates == 0
        and _keeps_up(type(process), "given", "step", "coefficients")
        and _keeps_up(type(product), "on_log_normal", "payoff", "coefficients")
    )


def _keeps_up(kind: type, half: str, *others: str) -> bool:
    """Whether no class changes the others below the one that defines the half."""
    order = kind.__mro__

    def depth(name: str) -> int:
        return next(depth for depth, holder in enumerate(order) if name in vars(holder))

    return all(depth(half) <= depth(other) for other in others)
