"""What a simulation of a problem needs to know beforehand: how many numbers its methods give, and its time steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.problem.problem import Problem

__all__ = ["KernelSizes", "PathSizes", "Sampling", "Sizes", "sizes_of", "time_grid"]

Sampling = Literal["pseudorandom", "sobol"]


class _Common(TypedDict):
    seed: int
    paths: int
    steps: int
    precision: Precision
    sampling: Sampling


class PathSizes(_Common, total=False):
    """What is simulated of each contract, and how many rows a thread of a CPU takes before it is given more."""

    rows_at_once: int


class KernelSizes(_Common, total=False):
    """What is simulated of each contract, and the threads of a block on a GPU."""

    threads: int


_MOST_DIMENSIONS = 21201  # of Sobol points, as there are direction numbers for


@dataclass(frozen=True)
class Sizes:
    """How many numbers the scalar methods of a problem give."""

    process: int
    product: int
    state: int
    seen: int

    @property
    def arrays(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """What a path keeps from step to step: names of its numbers in generated code, and how many there are."""
        return ("s", self.state), ("a", self.seen)


def sizes_of(problem: Problem) -> Sizes:
    """Measured by calling the methods, as Python, on the contract in the middle of the domain.

    Raises: ConfigError for a method that fails, gives no numbers, or a state of another size than it was given.
    """
    process, product, schema = problem.process, problem.product, problem.schema
    middle = schema.row(*((field.lower + field.upper) / 2 for field in schema))

    def numbers(owner: object, method: str, *arguments: Any) -> tuple[float, ...]:
        where = f"{type(owner).__name__}.{method}"
        try:
            found = getattr(owner, method)(*arguments)
        except Exception as error:
            raise ConfigError(f"{where} fails for {middle}: {type(error).__name__}: {error}") from None
        if not isinstance(found, tuple) or not found or not all(isinstance(v, int | float) for v in found):
            raise ConfigError(f"{where} gives {found!r}: it must give a tuple of numbers, one at least")
        return found

    k = numbers(process, "coefficients", middle, middle.T / 4)
    state = numbers(process, "start", middle)
    after = numbers(process, "step", state, (0.5,) * process.normals, k)
    if len(after) != len(state):
        raise ConfigError(f"{type(process).__name__}.step gives {len(after)} numbers, and start {len(state)}")
    spot = process.spot(after, k)
    if process.assets > 1 and (not isinstance(spot, tuple) or len(spot) != process.assets):
        raise ConfigError(f"{type(process).__name__}.spot gives {spot!r}: it must give {process.assets} prices")
    q = numbers(product, "coefficients", middle)
    seen = numbers(product, "begin", q)
    if product.dates:
        later = numbers(product, "observe", seen, spot, 1.0, q)
        if len(later) != len(seen):
            raise ConfigError(f"{type(product).__name__}.observe gives {len(later)} numbers, and begin {len(seen)}")
    paid = product.payoff(seen, spot, q)
    if isinstance(paid, tuple) or not isinstance(paid, int | float) or paid != paid:
        raise ConfigError(f"{type(product).__name__}.payoff gives {paid!r}: it must give a number")
    return Sizes(len(k), len(q), len(state), len(seen))


def time_grid(problem: Problem, steps: int, sampling: Sampling) -> tuple[int, int]:
    """The steps that are taken, and how many of them lead from one date of the product to the next.

    Raises: ConfigError for steps that miss a date, or more normals than Sobol points have coordinates.
    """
    problem.check_steps(steps)
    if sampling == "sobol" and problem.process.exact and problem.product.dates == 0:
        steps = 1  # a bridge's increments sum to its end point, and nothing else is read
    width = problem.process.normals * steps
    if sampling == "sobol" and width > _MOST_DIMENSIONS:
        raise ConfigError(f"sampling='sobol' has at most {_MOST_DIMENSIONS:,} dimensions, {width:,} are wanted")
    return steps, steps // problem.product.dates if problem.product.dates else steps
