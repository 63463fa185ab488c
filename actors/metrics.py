"""Ray metrics of commits, kept by the process that trains; Prometheus and the dashboard read them from its node."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Histogram

if TYPE_CHECKING:
    from smc.commits import CommitOutcome

__all__ = ["observe"]

_BOUNDARIES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def observe(outcome: CommitOutcome, experiment: str) -> None:
    """Count a commit by what became of it, and the seconds of each of its stages."""
    commits, seconds = _metrics()
    commits.inc(1, {"status": outcome.status, "experiment": experiment})
    for stage in fields(outcome.seconds):
        value = getattr(outcome.seconds, stage.name)
        if value is not None:
            seconds.observe(value, {"stage": stage.name, "experiment": experiment})


@lru_cache(maxsize=1)
def _metrics() -> tuple[Counter, Histogram]:  # once a process: Ray has no unregistering
    commits = Counter("smc_commits", "Commits by what became of them", ("status", "experiment"))
    seconds = Histogram("smc_commit_seconds", "Seconds of each stage of a commit", _BOUNDARIES, ("stage", "experiment"))
    return commits, seconds
