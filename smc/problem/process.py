"""What a process is: how the state of one path moves, in scalar functions of plain Python; and what is known of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from smc.errors import ConfigError
from smc.problem.schema import Field

__all__ = ["Process"]


class Process(BaseModel, ABC):
    """How the market moves. A subclass is one file: its fields, and four scalar methods.

    The methods are compiled, for a CPU by Numba and into one kernel for a GPU, with the settings of the instance as
    constants. They may use arithmetic, comparisons, conditional expressions, tuples, loops over ranges, the functions
    of `math` and other scalar functions; no arrays and no objects. In Python they work as they stand.

    Attributes of the class: `kind`, the name in a checkpoint; `fields`, the spots first; `normals`, how many a step
    takes; `assets`, how many spots there are.

    What is known of prices without simulating them makes a problem easier to learn, and lets prices be held within
    bounds: `growth` and `deviation`, of tensors. A process may leave them out. `inputs` names the fields that the
    network sees as they are, beside what the deviation says of them; None, which is always right, all but the spots.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    normals: ClassVar[int] = 1
    assets: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...] | None] = None
    volatility: ClassVar[str | None] = "v"
    """The field whose derivative is vega: a volatility, or a variance today; None if there is none."""
    lipschitz: ClassVar[bool] = True
    """Whether a path moves little when its contract does: where it may jump, derivatives as labels are noisy."""
    still: ClassVar[tuple[str, ...]] = ()
    """Fields that make a path jump when their value changes, such as an intensity: derivatives do not move them."""
    continuous: ClassVar[bool] = False
    """Whether prices do not jump, and `variation` says how much they move between two steps."""
    log_normal: ClassVar[bool] = False
    """Whether the logarithm of the price at expiry is normal."""

    @classmethod
    def largest(cls) -> Process | None:
        """The one whose fields have the names of all others, of a kind whose fields a setting decides; else None."""
        return None

    @property
    def title(self) -> str:
        """Its kind, as people write it."""
        return self.kind.replace("_", " ")

    @property
    def exact(self) -> bool:
        """Whether one step of any length has the right law: then a payoff of the last spot needs one normal."""
        return False

    def longest_step(self, c: Any) -> float:
        """The time step, in years, up to which a contract's bias is small. `c` has the contract's fields by name."""
        return float("inf")

    @abstractmethod
    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """What a contract's steps of `dt` years need, in double precision. `c` has the contract's fields by name."""

    @abstractmethod
    def start(self, c: Any) -> tuple[float, ...]:
        """The state at the beginning."""

    @abstractmethod
    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The state one step later. `k` are the coefficients."""

    @abstractmethod
    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> Any:
        """The price that a state means, or a tuple of as many as there are assets. Units: currency."""

    def variation(self, before: tuple[float, ...], after: tuple[float, ...], k: tuple[float, ...]) -> float:
        """The quadratic variation of the logarithm of the price over a step, of the states at its ends; no units.

        Raises: ConfigError where a process does not say it.
        """
        raise ConfigError(f"{self.kind} does not say the quadratic variation of a step")

    def restarted(self, c: Any, prices: Any) -> Any:
        """A contract's fields that differ once its prices are these; None if prices alone do not say how it goes on.

        Shapes: columns of (n,), prices (n, assets) -> a mapping of names to (n,).
        """
        return None

    # --- for a whole table of contracts, in torch -----------------------------------------------------

    def growth(self, c: Any, t: Any) -> Any:
        """Logarithm of the expected price after t years over the spot; None if it is not known.

        Shapes: columns of (n,) or (n, 1), t of (n,) or (n, dates) -> as t.
        """
        return None

    def deviation(self, c: Any, t: Any) -> Any:
        """Standard deviation of the logarithm of the price after t years; None if it is not known. Shapes: as `growth`.

        It may be a good guess, but it is 0 exactly where prices are certain.
        """
        return None

    def growths(self, c: Any, t: Any) -> Any:
        """Of several assets, `growth` of each; None if it is not known. Shapes: t of (n,) -> (n, assets)."""
        return None

    def covariances(self, c: Any, t: Any) -> Any:
        """Of several assets, covariances of the logarithms of prices after t years; None if they are not known.

        Shapes: t of (n,) -> (n, assets, assets).
        """
        return None

    def features(self, c: Any) -> tuple[Any, ...]:
        """What else of the law a network should see, of order one. Shapes: columns of (n,) -> of (n,) each."""
        return ()

    def discount(self, c: Any, t: Any) -> Any:
        """What one unit of currency after t years is worth today: by the rate `r`, where there is such a field."""
        return (-c.r * t).exp() if hasattr(c, "r") else (0 * t).exp()
