"""An experiment: everything that determines a training run, and how to begin or continue it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from smc.checkpoint.file import CheckpointMetadata, first_difference
from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.learning.labels import check_derivatives
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.plan import TrainingConfig
from smc.numeric_fields import RealNumber, WholeNumber
from smc.problem.contracts import BoundSpec, resolve_domain
from smc.simulation.config import ProblemConfig, SimulationConfig
from smc.storage.commits import DEFAULT_MESSAGE, check_template

__all__ = ["Experiment"]


class Experiment(BaseModel):
    """One named training run. `num_gpus` above 0 puts model and simulation on a GPU, 0 on the CPU.

    `parameters` are what a sweep chose for it, by dotted names, for whoever reads the ledger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/=-]{0,127}$")
    simulation: SimulationConfig
    domain: dict[str, BoundSpec] = Field(default_factory=dict)
    network: CVNNConfig = CVNNConfig()
    training: TrainingConfig
    commit_interval: WholeNumber | None = Field(default=None, ge=1)
    commit_message_template: str = DEFAULT_MESSAGE
    num_cpus: RealNumber = Field(default=1, gt=0)
    num_gpus: RealNumber = Field(default=0, ge=0)
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        self._whole_domain()
        if self.training.differential > 0:
            check_derivatives(self.simulation.problem, conditional=getattr(self.simulation, "conditional", False))
        check_template(self.commit_message_template)
        return self

    @property
    def device(self) -> str:
        """Where the model lives: 'cuda' or 'cpu'."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    def _whole_domain(self) -> dict[str, BoundSpec]:
        return resolve_domain(self.domain, self.simulation.problem.schema)

    def fresh(self) -> GbmCVNNPricerConfig:
        """The state of a run that has not begun."""
        simulation = self.simulation
        model = build_cvnn(simulation.sim_params, self.network, simulation.problem).to(self.device)
        return GbmCVNNPricerConfig(cfg=self.simulation, domain_bounds=self._whole_domain(), cvnn=model)

    def difference(self, trained: CheckpointMetadata) -> str | None:
        """The first setting that is another than a checkpoint was trained with, in words; None if there is none.

        That it was trained further since, to its end, is no other setting.
        """
        ours = {
            "simulation": self.simulation.model_dump(),
            "domain": {name: bound.model_dump() for name, bound in self._whole_domain().items()},
            "network": self.network.model_dump(),
            "training": self.training.model_dump(),
        }
        theirs = {
            "simulation": _as_compared(self.simulation, trained.simulation).model_dump(),
            "domain": {name: bound.model_dump() for name, bound in trained.domain.items()},
            "network": trained.network.model_dump() if trained.network is not None else ours["network"],
            "training": trained.plan.config.model_dump() if trained.plan is not None else ours["training"],
        }
        ignored = {"simulation.sim_params.skip"}  # how far into its random streams a run is belongs to its state
        plan = trained.plan
        if plan is not None and trained.global_step >= max(plan.end, self.training.num_batches):
            ignored.add("training.num_batches")
        found = first_difference(ours, theirs, ignored)
        return None if found is None else "{} is {!r}, and was {!r}".format(*found)

    def remaining(self, state: GbmCVNNPricerConfig) -> int:
        """Batches still to train of the plan that a checkpoint of this experiment belongs to."""
        if state.plan is None:
            return self.training.num_batches
        return max(0, state.plan.end - state.global_step)


def _as_compared(ours: SimulationConfig, theirs: SimulationConfig) -> SimulationConfig:
    return ours.compared_with(theirs) if isinstance(ours, ProblemConfig) else theirs
