"""Ray metrics, kept by the process that they are about; Prometheus and the dashboard read them from its node.

`docs/grafana/spectralmc.json` shows them. Ray puts `ray_` before each name, and `_total` behind a counter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from smc.learning.plan import StepReport
    from smc.storage.commits import CommitOutcome

__all__ = ["TrainingMetrics", "observe", "observe_ledger"]

_BOUNDARIES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
_TRAINING = {
    "loss": "Loss of the newest step",
    "step": "Steps done",
    "learning_rate": "Learning rate of the newest step",
    "step_seconds": "Seconds a step, since the last report",
    "contracts_per_second": "Contracts simulated a second, since the last report",
}
_LEDGER = {
    "head": "Number of the newest version",
    "queue_depth": "Entries that wait for a block",
    "uploading": "Checkpoints that are being uploaded",
    "bytes_in_flight": "Bytes that are being uploaded",
    "commits_per_s": "Commits a second, over ten seconds",
    "committed": "Commits since the actor started",
    "replaced": "Snapshots that newer ones replaced",
    "failed": "Commits that failed",
}


class TrainingMetrics:
    """A logger for `GbmCVNNPricer.train` that keeps an experiment's newest numbers."""

    def __init__(self, experiment: str) -> None:
        self._tags = {"experiment": experiment}
        self._last: StepReport | None = None

    def __call__(self, report: StepReport) -> None:
        """Take in what training reports, five times a second at most."""
        last = self._last
        if last is not None and report.seconds - last.seconds < 0.2:
            return
        self._last = report
        self._set(loss=report.loss, step=report.step, learning_rate=report.learning_rate)
        if last is not None and report.step > last.step:
            seconds = report.seconds - last.seconds
            self._set(
                step_seconds=seconds / (report.step - last.step),
                contracts_per_second=(report.contracts - last.contracts) / seconds,
            )

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            _gauges("train", "experiment")[name].set(value, self._tags)


def observe(outcome: CommitOutcome, experiment: str) -> None:
    """Count a commit by what became of it, and the seconds of each of its stages."""
    commits, seconds = _of_commits()
    commits.inc(1, {"status": outcome.status, "experiment": experiment})
    for stage in fields(outcome.seconds):
        value = getattr(outcome.seconds, stage.name)
        if value is not None:
            seconds.observe(value, {"stage": stage.name, "experiment": experiment})


def observe_ledger(status: Mapping[str, Any]) -> None:
    """Keep what a LedgerActor says of itself."""
    head = status["head"]
    values = {**status, "head": -1 if head is None else int(str(head)[1:])}
    for name, gauge in _gauges("ledger", "ledger").items():
        gauge.set(float(values[name]), {"ledger": str(status["ledger"])})


@lru_cache(maxsize=1)
def _of_commits() -> tuple[Counter, Histogram]:  # once a process: Ray has no unregistering
    commits = Counter("smc_commits", "Commits by what became of them", ("status", "experiment"))
    seconds = Histogram("smc_commit_seconds", "Seconds of each stage of a commit", _BOUNDARIES, ("stage", "experiment"))
    return commits, seconds


@lru_cache(maxsize=2)
def _gauges(family: str, tag: str) -> dict[str, Gauge]:
    described = {"train": _TRAINING, "ledger": _LEDGER}[family]
    return {name: Gauge(f"smc_{family}_{name}", text, (tag,)) for name, text in described.items()}
