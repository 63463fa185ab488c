"""What a product is: what one path pays, in scalar functions of plain Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from smc.problem.schema import Field

if TYPE_CHECKING:
    from torch import Tensor

    from smc.problem.law import Law
    from smc.problem.reflection import Reflection

__all__ = ["Bounds", "Product"]


@dataclass(frozen=True)
class Bounds:
    """What prices and payoffs cannot be beyond, discounted. Shapes: (n,) each. Units: currency."""

    lower: Tensor
    upper: Tensor
    payoff: Tensor


class Product(BaseModel, ABC):
    """What is paid. A subclass is one file: its fields, and up to four scalar methods, compiled as a process's are.

    `kind` is the name in a checkpoint. `lipschitz` says whether the payoff moves little when a price does: only then
    has it a derivative along a path. A product that looks at prices before expiry says on how many equally spaced
    dates, the last of which is expiry: `dates`. `observe` is called at each, and never where `dates` is 0.

    The rest makes a product easier to learn and its answers narrower, and may be left out: the scale of its price, a
    guess of it, how far its strikes and barriers are, bounds. All of it follows from the law of the prices, so that it
    holds for every process. `inputs` names the fields that the network sees as they are; None, which is always right,
    all, and the spots. `still` names those that derivatives as labels do not move, because only their ratio to a spot
    matters. `notional` names what errors of prices are told in basis points of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    lipschitz: ClassVar[bool] = False
    assets: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...] | None] = None
    still: ClassVar[tuple[str, ...]] = ()
    option: ClassVar[Literal["put", "call"] | None] = None
    """Which of the two it is, if it is one of them."""
    ratios: ClassVar[tuple[str, ...]] = ()
    """Fields that are a ratio to the spot: prices in the contract, which stay where they are when the spot moves."""
    notional: ClassVar[str] = "spot"
    reflection: ClassVar[Reflection | None] = None
    """How the distribution of the other option follows from this one's, where logarithms of prices are normal."""

    draws: ClassVar[int] = 0
    """Normals that `between` takes at each step, where the product looks at prices all the time."""

    recent: ClassVar[tuple[str, ...]] = ()
    """Settings that earlier versions did not know: a checkpoint names them where they are not the default."""

    dates: int = 0

    @model_validator(mode="after")
    def _has_dates_of_its_own(self) -> Product:
        if self.dates and not type(self).looks_at_dates():
            raise ValueError(f"it pays by the price at expiry alone, and has no dates, got {self.dates}")
        return self

    @classmethod
    def looks_at_dates(cls) -> bool:
        """Whether this kind looks at prices on dates: it gives their number, or what it observes on them."""
        return bool(cls.model_fields["dates"].default) or cls.observe is not Product.observe

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a contract that the settings name."""
        return ()

    @property
    def continuous(self) -> bool:
        """Whether it looks at prices between dates: then `between` is called at each step, and `observe` never."""
        return False

    def check_ready(self) -> None:
        """Raises: ConfigError for what has to be learned before anything can be simulated."""

    def as_asked(self) -> Product:
        """The product without what was learned of it, as somebody asks for it."""
        return self

    @classmethod
    def largest(cls) -> Product | None:
        """The one whose fields have the names of all others, of a kind whose fields a setting decides; else None."""
        return None

    @property
    def title(self) -> str:
        """Its kind, as people write it."""
        title = self.kind.replace("_", " ")
        for name in ("european", "asian", "bermudan"):
            title = title.replace(name, name.capitalize())
        return title

    @abstractmethod
    def coefficients(self, c: Any) -> tuple[float, ...]:
        """What a contract's payoff needs, in double precision. `c` has the contract's fields by name."""

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """What is known of a path before the first date."""
        return (0.0,)

    def observe(self, seen: tuple[float, ...], spot: Any, date: float, k: tuple[float, ...]) -> tuple[float, ...]:
        """What is known after date number `date`, from 1 to `dates`, at which the price is `spot`."""
        return seen

    def between(
        self, seen: tuple[float, ...], spot: Any, variation: float, normals: tuple[float, ...], share: float,
        k: tuple[float, ...],
    ) -> tuple[float, ...]:  # fmt: skip
        """What is known after a step that ends at the price `spot`; `share` of the time to expiry is in its middle.

        `variation` is the quadratic variation of the price's logarithm over the step: between its ends the logarithm
        is taken for a Brownian bridge of that variance. `normals` are `draws` of them, nobody else's.
        """
        return seen

    @abstractmethod
    def payoff(self, seen: tuple[float, ...], spot: Any, k: tuple[float, ...]) -> float:
        """What is paid, discounted to today. `spot` is the price at expiry. Units: currency."""

    def certain_payoff(self, path: Sequence[Any], c: Any) -> float:
        """What a contract pays whose prices on the dates are certain to be these, the last of them at expiry."""
        k = self.coefficients(c)
        seen = self.begin(k)
        if self.dates:
            for date, price in enumerate(path, 1):
                seen = self.observe(seen, price, float(date), k)
        return self.payoff(seen, path[-1], k)

    # --- for a whole table of contracts, in torch -----------------------------------------------------

    def shortfall(self, law: Law) -> Tensor | None:
        """The level below which the price at expiry pays the difference, discounted; None if it pays otherwise.

        Shapes: -> (n,). Units: currency.
        """
        return None

    def unit(self, law: Law) -> Tensor:
        """The scale of the price, above 0: what is learnt is divided by it. Shapes: -> (n,). Units: currency."""
        return law.spot * law.discount * law.deviation

    def anchor(self, law: Law) -> Tensor:
        """A smooth guess of the price, in units of `unit`. Shapes: -> (n,)."""
        return 0 * law.spot

    def distances(self, law: Law) -> tuple[Tensor, ...]:
        """How far the forward is above each strike or barrier: differences of logarithms. Shapes: -> of (n,) each."""
        return ()

    def width(self, law: Law) -> Tensor:
        """The deviation that distances are to be measured by. Shapes: -> (n,)."""
        return law.deviation

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """What else a network should see, of order one. Shapes: -> of (n,) each."""
        return ()

    def bounds(self, law: Law) -> Bounds:
        """What holds without arbitrage. Shapes: -> (n,) each."""
        nothing = 0 * law.spot
        return Bounds(nothing, nothing + float("inf"), nothing + float("inf"))

    def parity(self, law: Law) -> Tensor | None:
        """By how much the other option of the two is worth more, if that is known. Shapes: -> (n,). Units: currency."""
        return None

    def notionals(self, law: Law) -> Tensor:
        """What `notional` names. Shapes: -> (n,). Units: currency."""
        return law.spot
