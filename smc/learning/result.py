"""What a call of `train()` came to, its commits included."""

from __future__ import annotations

from dataclasses import dataclass

from smc.storage.commits import CommitOutcome

__all__ = ["TrainingResult"]


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `train()` did. `loss` is the last step's; `stopped` tells a run cut short by `stop()`.

    `seconds` is until the last step was done, `flush_seconds` how long it then waited for its commits.
    """

    batches: int
    global_step: int
    loss: float
    seconds: float
    flush_seconds: float
    contracts: int
    stopped: bool
    commits: tuple[CommitOutcome, ...] = ()

    def commits_that(self, status: str) -> tuple[CommitOutcome, ...]:
        """The commits that ended 'committed', 'replaced' or 'failed'."""
        return tuple(outcome for outcome in self.commits if outcome.status == status)
