"""What a simulation is told: how many paths of which problem, by which scheme, with which random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)

from smc.models.numerical import Precision
from smc.numeric_fields import WholeNumber
from smc.problem.problem import Problem, process_of, product_of
from smc.problem.process import Process
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.european import EuropeanPut

__all__ = ["CONFIG_TAGS", "BlackScholesConfig", "ProblemConfig", "SimulationConfig", "SimulationParams"]


class SimulationParams(BaseModel):
    """How many paths are simulated, and with which random numbers.

    `network_size` is N, the number of levels of the quantile spectrum; each level averages
    `batches_per_mc_run` sorted payoffs, so a contract takes M = N x batches_per_mc_run paths.
    `skip` counts the contracts already simulated: it is the whole state of the random numbers.
    `sampling`: 'pseudorandom' (Philox), 'sobol' (scrambled, Brownian bridge), or 'auto': Sobol on a CPU,
    where paths are dear, unless forwards are normalised, which would undo its accuracy; else Philox.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: WholeNumber = Field(ge=1, le=16384)
    network_size: WholeNumber = Field(ge=2)
    batches_per_mc_run: WholeNumber = Field(ge=1)
    threads_per_block: WholeNumber = Field(default=256, ge=32, le=1024, multiple_of=32)
    mc_seed: WholeNumber = Field(ge=0, lt=2**64)
    buffer_size: WholeNumber = Field(default=10_000, ge=1)
    skip: WholeNumber = Field(default=0, ge=0)
    dtype: Precision = Precision.float32
    sampling: Literal["auto", "pseudorandom", "sobol"] = "auto"

    @model_validator(mode="after")
    def _paths_fit_the_counter(self) -> SimulationParams:
        if self.paths >= 2**31:
            raise ValueError(f"network_size x batches_per_mc_run must be below 2^31, got {self.paths}")
        return self

    @property
    def paths(self) -> int:
        """M, the paths simulated for one contract."""
        return self.network_size * self.batches_per_mc_run

    @property
    def bins(self) -> int:
        """Complex bins of the spectrum, network_size // 2 + 1."""
        return self.network_size // 2 + 1


class BlackScholesConfig(BaseModel):
    """The dynamics: which scheme, and whether terminal prices are rescaled to the exact forward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sim_params: SimulationParams
    simulate_log_return: bool = True
    normalize_forwards: bool = False

    @model_validator(mode="after")
    def _sobol_needs_no_normalisation(self) -> BlackScholesConfig:
        if self.normalize_forwards and self.sim_params.sampling == "sobol":
            raise ValueError(
                "normalize_forwards with sampling='sobol' makes prices worse than either alone: "
                "choose one (normalize_forwards=False, or sampling='pseudorandom' or 'auto')"
            )
        return self

    @cached_property
    def problem(self) -> Problem:
        """European puts under geometric Brownian motion."""
        scheme: Literal["log", "euler"] = "log" if self.simulate_log_return else "euler"
        return Problem(GeometricBrownianMotion(scheme=scheme), EuropeanPut())


class ProblemConfig(BaseModel):
    """Any problem: a process and a product, each an instance or its settings with a `kind`.

    `conditional`: whether the price in a label is that of `smc.problem.conditional` where process and product allow it,
    with the spectrum's other bins from payoffs as ever; else it is the mean payoff.
    Raises: pydantic's ValidationError for an unknown kind or setting, parts that do not go together, and a number of
    time steps that has none at some date of the product.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    process: InstanceOf[Process] = GeometricBrownianMotion()
    product: InstanceOf[Product]
    sim_params: SimulationParams
    conditional: bool = True

    @field_validator("process", mode="before")
    @classmethod
    def _process(cls, value: Any) -> Any:
        return process_of(value) if isinstance(value, Mapping) else value

    @field_validator("product", mode="before")
    @classmethod
    def _product(cls, value: Any) -> Any:
        return product_of(value) if isinstance(value, Mapping) else value

    @field_serializer("process", "product")
    def _settings(self, part: Process | Product) -> dict[str, Any]:
        settings = part.model_dump(mode="json")
        for name in getattr(part, "recent", ()):
            if getattr(part, name) == type(part).model_fields[name].default:
                del settings[name]
        return {"kind": part.kind, **settings}

    @model_validator(mode="after")
    def _fits_together(self) -> ProblemConfig:
        self.problem.check_steps(self.sim_params.timesteps)
        return self

    @cached_property
    def problem(self) -> Problem:
        """Both together."""
        return Problem(self.process, self.product)

    def with_product(self, product: Product) -> ProblemConfig:
        """The same of another product."""
        return ProblemConfig(
            process=self.process, product=product, sim_params=self.sim_params, conditional=self.conditional
        )

    def compared_with(self, other: SimulationConfig) -> SimulationConfig:
        """The other one, without what was learned of its product if this one asks for it without."""
        if isinstance(other, ProblemConfig) and self.product == self.product.as_asked():
            return other.with_product(other.product.as_asked())
        return other


def _which(settings: Any) -> str:
    if isinstance(settings, Mapping):
        return "problem" if {"process", "product"} & set(settings) else "black_scholes"
    return "problem" if isinstance(settings, ProblemConfig) else "black_scholes"


SimulationConfig = Annotated[
    Annotated[BlackScholesConfig, Tag("black_scholes")] | Annotated[ProblemConfig, Tag("problem")],
    Discriminator(_which),
]
"""Of European puts under geometric Brownian motion, or of any problem: the one that names a process or a product."""

CONFIG_TAGS: Final[Mapping[str, type[BaseModel]]] = {"black_scholes": BlackScholesConfig, "problem": ProblemConfig}
"""What stands for each of the two in the places that pydantic's errors name."""
