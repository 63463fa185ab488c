"""How an experiment of a job ended, in words and for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

from smc.errors import ConfigError
from smc.learning.experiment import Experiment
from smc.learning.pricer import TrainingResult
from smc.prediction.soundness import Evaluated
from smc.storage import ModelVersion
from smc.storage.commits import CommitOutcome

__all__ = ["ExperimentOutcome", "NotStarted"]


class NotStarted(ConfigError):
    """The sweep was told to stop before the experiment's turn."""

    def __init__(self) -> None:
        super().__init__("not started: the sweep was stopped")


@dataclass(frozen=True)
class ExperimentOutcome:
    """How one experiment ended: with a result, with nothing left to do (None), or with an error.

    `version`: its newest, where this job trained it and the trainer was lost before it could tell; `restarts`: how
    often its trainer was lost; `pruned`: it was given up; `value`: what was asked to be measured; `evaluated`: what it
    was compared with, if that was asked, or why it could not be.
    """

    experiment: Experiment
    result: TrainingResult | None
    error: Exception | None = None
    version: ModelVersion | None = None
    restarts: int = 0
    pruned: bool = False
    value: float | None = None
    evaluated: Evaluated | str | None = None

    @property
    def stopped(self) -> bool:
        """Whether it, or the sweep before its turn, was told to stop before its end, and it was not given up."""
        if isinstance(self.error, NotStarted):
            return True
        if self.result is None:
            return self.version is not None and not self.version.is_finished and not self.pruned
        return self.result.stopped and not self.pruned

    @property
    def failed(self) -> bool:
        """Whether it ended with an error, or its last state is not in the ledger."""
        if isinstance(self.error, NotStarted):
            return False
        return self.error is not None or self._lost_commit is not None

    @property
    def done(self) -> bool:
        """Whether it was trained to its end."""
        return self.error is None and not self.stopped and not self.pruned

    @property
    def loss(self) -> float | None:
        """The last step's, if this job trained it."""
        if self.result is not None:
            return self.result.loss
        return self.version.loss if self.version is not None else None

    @property
    def _lost_commit(self) -> CommitOutcome | None:
        commits = self.result.commits if self.result is not None else ()
        return commits[-1] if commits and commits[-1].status != "committed" else None

    @property
    def line(self) -> str:
        """One line for people."""
        name = f"{self.experiment.name:<15} "
        again = f", resumed {self.restarts} times" if self.restarts > 1 else ", resumed once" if self.restarts else ""
        if isinstance(self.error, NotStarted):
            return f"{name}{self.error}{again}"
        if self.error is not None:
            return f"{name}failed: {str(self.error).splitlines()[0]}{again}"
        verb = "given up at" if self.pruned else "stopped at" if self.stopped else "trained to"
        if self.result is None:
            if self.version is None:
                return f"{name}finished before, skipped{again}"
            return f"{name}{verb} step {self.version.step}, as {self.version.version_id} says{again}"
        r = self.result
        counts = ", ".join(f"{len(r.commits_that(s))} {s}" for s in ("committed", "replaced", "failed"))
        line = f"{name}{verb} step {r.global_step} in {r.seconds:.1f} s, loss {r.loss:.3e}; commits: {counts}{again}"
        if (lost := self._lost_commit) is not None:
            where = f"kept in {lost.spooled}" if lost.spooled else "lost"
            line += f"; its last state is not in the ledger but {where}: {lost.reason}"
        return line
