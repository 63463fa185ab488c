"""What a simulation of a problem needs to know beforehand: how many numbers its methods give, and its time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypedDict

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.problem.conditional import ConditionallyLogNormal, Estimator, ExpectedOnPath, PricedOnBridge
from smc.problem.problem import Problem
from smc.problem.product import Product

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
    normals: int
    """Normals of a step, those of the product last."""
    draws: int = 0
    """How many of these the product takes between dates."""
    outer: int = 0
    """Numbers of the state that belong to the outer path, which three others follow where there is a bridge."""
    kept: int = 0
    """Numbers that are kept of a bridge, behind those that the product sees of a path."""
    extras: int = 0
    """Normals that are drawn once a path, at expiry."""
    outputs: int = 1
    """Numbers that a path gives: its payoff; where something is expected of it, that, and then the controls."""

    @property
    def arrays(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """What a path keeps from step to step: names of its numbers in generated code, and how many there are."""
        return ("s", self.state), ("a", self.seen)


@lru_cache(maxsize=1024)
def sizes_of(problem: Problem, estimator: Estimator = "payoff") -> Sizes:
    """Measured by calling the methods, as Python, on the contract in the middle of the domain.

    `estimator`: what is expected of a path, beside its payoff.

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

    conditional = estimator in ("outer", "bridge")
    outer = "outer_" if conditional else ""
    normals = process.outer if conditional and isinstance(process, ConditionallyLogNormal) else process.normals
    k = numbers(process, f"{outer}coefficients", middle, middle.T / 4)
    state = numbers(process, f"{outer}start", middle)
    after = numbers(process, f"{outer}step", state, (0.5,) * normals, k)
    if len(after) != len(state):
        name = type(process).__name__
        raise ConfigError(f"{name}.{outer}step gives {len(after)} numbers, and {outer}start {len(state)}")
    if conditional:
        return _of_outer_path(problem, numbers, (k, after), normals, middle, bridge=estimator == "bridge")
    spot = process.spot(after, k)
    if process.assets > 1 and (not isinstance(spot, tuple) or len(spot) != process.assets):
        raise ConfigError(f"{type(process).__name__}.spot gives {spot!r}: it must give {process.assets} prices")
    q = numbers(product, "coefficients", middle)
    seen = numbers(product, "begin", q)
    if product.dates:
        later = numbers(product, "observe", seen, spot, 1.0, q)
        if len(later) != len(seen):
            raise ConfigError(f"{type(product).__name__}.observe gives {len(later)} numbers, and begin {len(seen)}")
    draws = product.draws if product.continuous else 0
    if product.continuous:
        later = numbers(product, "between", seen, spot, process.variation(state, after, k), (0.5,) * draws, 0.25, q)
        if len(later) != len(seen):
            raise ConfigError(f"{type(product).__name__}.between gives {len(later)} numbers, and begin {len(seen)}")
    _check_number(product, "payoff", product.payoff(seen, spot, q))
    if estimator == "path":
        assert isinstance(product, ExpectedOnPath)
        _check_number(product, "expected_payoff", product.expected_payoff(seen, spot, q))
    outputs = 2 if estimator == "path" else 1
    return Sizes(len(k), len(q), len(state), len(seen), normals + draws, draws, outputs=outputs)


def _check_number(product: Product, method: str, found: Any) -> None:
    if isinstance(found, tuple) or not isinstance(found, int | float) or found != found:
        raise ConfigError(f"{type(product).__name__}.{method} gives {found!r}: it must give a number")


def _of_outer_path(
    problem: Problem,
    numbers: Callable[..., tuple[float, ...]],
    path: Sequence[Any],
    normals: int,
    middle: Any,
    *,
    bridge: bool,
) -> Sizes:
    process, product = problem.process, problem.product
    assert isinstance(process, ConditionallyLogNormal)
    k, state = path
    finals = (0.5,) * process.finals
    given = numbers(process, "given", state, finals, k)
    if len(given) < 2:
        name = type(process).__name__
        raise ConfigError(f"{name}.given gives one number: it must give mean and variance, and then controls")
    q = numbers(product, "coefficients", middle)
    seen = numbers(product, "begin", q)
    if not bridge:
        return Sizes(len(k), len(q), len(state), len(seen), normals, extras=process.finals + 1, outputs=len(given))
    assert isinstance(product, PricedOnBridge)
    kept = numbers(product, "begin_bridge", q)
    later = numbers(product, "observe_bridge", kept, 0.0, 1.0, 1.0, q)
    if len(later) != len(kept):
        name = type(product).__name__
        raise ConfigError(f"{name}.observe_bridge gives {len(later)} numbers, and begin_bridge {len(kept)}")
    _check_number(product, "on_bridge", product.on_bridge(kept, 0.0, 0.0, 1.0, q))
    numbers(process, "along", state, 1.0, k)
    return Sizes(
        len(k), len(q), len(state) + 3, len(seen) + len(kept), normals + 1,
        outer=len(state), kept=len(kept), outputs=len(given),
    )  # fmt: skip


def time_grid(problem: Problem, steps: int, sampling: Sampling, sizes: Sizes | None = None) -> tuple[int, int]:
    """The steps that are taken, and how many of them lead from one date of the product to the next.

    Raises: ConfigError for steps that miss a date, or more normals than Sobol points have coordinates.
    """
    problem.check_steps(steps)
    if sampling == "sobol" and problem.process.exact and problem.product.dates == 0 and not problem.product.continuous:
        steps = 1  # a bridge's increments sum to its end point, and nothing else is read
    sizes = sizes or sizes_of(problem)
    width = sizes.normals * steps + sizes.extras
    if sampling == "sobol" and width > _MOST_DIMENSIONS:
        raise ConfigError(f"sampling='sobol' has at most {_MOST_DIMENSIONS:,} dimensions, {width:,} are wanted")
    return steps, steps // problem.product.dates if problem.product.dates else steps
