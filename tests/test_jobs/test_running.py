"""What a sweep does with its experiments, without a cluster: trainers and the ledger's actor are played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from jobs.recipes import make_experiment
from jobs.running import ExperimentOutcome, NotStarted, Runner, RunOptions
from jobs.sweep import main, report
from smc.commits import CommitOutcome
from smc.errors import Unavailable
from smc.gbm_trainer import TrainingResult
from smc.storage import AsyncBlockchainModelStore
from smc.storage.objects import MemoryObjectStore

EXPERIMENT = make_experiment("a", recipe="tiny")


def result(*commits: CommitOutcome, stopped: bool = False) -> TrainingResult:
    return TrainingResult(60, 60, 0.1, 1.0, 0.0, 960, stopped, commits)


class Method:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    async def remote(self) -> Any:
        return self._call()


class Actor:
    """A LedgerActor, or what is left of one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.flushed = 0

        def flush() -> None:
            self.flushed += 1
            if error is not None:
                raise error

        self.flush = Method(flush)


class Played(Runner):
    """`attempts` are what trainers come to, one after the other."""

    def __init__(self, actor: Any, *attempts: TrainingResult | Exception | None, away: int = 0) -> None:
        super().__init__(AsyncBlockchainModelStore("memory", objects=MemoryObjectStore()), actor, RunOptions())
        self.attempts, self._away = list(attempts), away

    async def _is_finished(self, experiment: Any) -> bool:
        if self._away:
            self._away -= 1
            raise Unavailable("503 slow down")
        return False

    async def _attempt(self, experiment: Any, watch: Any) -> ExperimentOutcome:
        attempt = self.attempts.pop(0)
        if isinstance(attempt, Exception):
            raise attempt
        return ExperimentOutcome(experiment, attempt)


async def test_an_experiment_waits_for_a_ledger_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("jobs.running._UNAVAILABLE_PAUSE", 0.01)
    runner = Played(Actor(), Unavailable("503 slow down"), result(), away=2)
    outcome = await runner.run(EXPERIMENT)
    assert outcome.result == result()
    assert outcome.restarts == 0
    assert caplog.text.count("a: waits for the ledger: 503 slow down") == 3
    monkeypatch.setattr("jobs.running._UNAVAILABLE_LIMIT", -1.0)
    outcome = await Played(Actor(), away=1).run(EXPERIMENT)
    assert isinstance(outcome.error, Unavailable)


async def test_a_sweep_that_is_stopped_while_it_waits_ends() -> None:
    runner = Played(Actor(), away=100)
    asyncio.get_running_loop().call_later(0.1, runner.stop)
    outcome = await asyncio.wait_for(runner.run(EXPERIMENT), 5)
    assert isinstance(outcome.error, Unavailable | NotStarted)


async def test_stopped_before_its_first_step_is_not_finished_before() -> None:
    runner = Played(Actor(), None)
    attempt = runner._attempt

    async def stopped_meanwhile(experiment: Any, watch: Any) -> ExperimentOutcome:
        runner.stop()
        return await attempt(experiment, watch)

    runner._attempt = stopped_meanwhile  # type: ignore[method-assign]
    outcome = await runner.run(EXPERIMENT)
    assert isinstance(outcome.error, NotStarted)
    assert outcome.stopped
    assert report([outcome]) == 2


async def test_an_actor_replaced_by_newer_code_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    successor = Actor()
    monkeypatch.setattr("actors.ledger.ledger_actor", lambda uri: successor)
    runner = Played(Actor(ActorDiedError()))
    await runner._flush()
    await runner._flush()
    assert successor.flushed == 1
    # And one that cannot even be asked does not take along what the experiments came to.
    await Played(Actor(RuntimeError("gone"))).close()


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        (CommitOutcome(60, "committed"), 0, "1 of 1 experiments done"),
        (
            CommitOutcome(60, "failed", reason="503", spooled="/spool/x"),
            2,
            "not in the ledger but kept in /spool/x: 503",
        ),
        (CommitOutcome(60, "failed", reason="503"), 2, "not in the ledger but lost: 503"),
    ],
)
def test_done_means_in_the_ledger(
    last: CommitOutcome, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([ExperimentOutcome(EXPERIMENT, result(CommitOutcome(20, "replaced"), last))]) == status
    assert said in capsys.readouterr().out


def test_a_number_at_a_time_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("recipe: tiny\nexperiments: {a: }\n")
    assert main([str(path), "--ledger", "x", "--concurrency", "0"]) == 2
    assert capsys.readouterr().err == "error: --concurrency must be at least 1, got 0\n"
