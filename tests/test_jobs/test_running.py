"""What a sweep does with its experiments, without a cluster: trainers and the ledger's actor are played."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from jobs.recipes import make_experiment
from jobs.running import ExperimentOutcome, NotStarted, Runner, RunOptions, check_settings
from jobs.sweep import main, report
from smc.errors import ConfigError, Unavailable
from smc.learning.pricer import GbmCVNNPricer, TrainingResult
from smc.storage import AsyncBlockchainModelStore, ModelVersion, commit_snapshot
from smc.storage.commits import CommitOutcome
from smc.storage.objects import MemoryObjectStore

EXPERIMENT = make_experiment("a", recipe="tiny")


def result(*commits: CommitOutcome, stopped: bool = False, batches: int = 60) -> TrainingResult:
    return TrainingResult(batches, batches, 0.1, 1.0, 0.0, 960, stopped, commits)


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
    """`attempts` are what trainers come to, one after the other, and what is in the ledger then."""

    def __init__(
        self, actor: Any, *attempts: TrainingResult | Exception | None, away: int = 0, extend: bool = False
    ) -> None:
        store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
        super().__init__(store, actor, RunOptions(extend=extend))
        self.attempts, self._away = list(attempts), away
        self.version: ModelVersion | None = None
        self.extended: list[bool] = []
        self.checked: list[int] = []

    async def _newest(self, experiment: Any) -> ModelVersion | None:
        if self._away:
            self._away -= 1
            raise Unavailable("503 slow down")
        return self.version

    async def _check_settings(self, experiment: Any, version: Any) -> None:
        self.checked.append(version.step)

    async def _attempt(self, experiment: Any, found: Any, watch: Any) -> ExperimentOutcome:
        self.extended.append(self._extends(found, self.version))
        attempt = self.attempts.pop(0)
        if isinstance(attempt, Exception):
            raise attempt
        return ExperimentOutcome(experiment, attempt)


def at_step(step: int) -> ModelVersion:
    """The experiment's newest version in a plan of 60 steps, or in the next 60 that extended it."""
    return ModelVersion.model_construct(counter=step, step=step, loss=0.1, plan_end=60 * math.ceil(step / 60))


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
    assert isinstance(outcome.error, NotStarted)
    outcome = await asyncio.wait_for(runner.run(EXPERIMENT), 0.1)
    assert isinstance(outcome.error, NotStarted)


async def test_stopped_before_its_first_step_is_not_finished_before() -> None:
    runner = Played(Actor(), result(stopped=True, batches=0))
    attempt = runner._attempt

    async def stopped_meanwhile(*arguments: Any) -> ExperimentOutcome:
        runner.stop()
        return await attempt(*arguments)

    runner._attempt = stopped_meanwhile  # type: ignore[method-assign]
    outcome = await runner.run(EXPERIMENT)
    assert isinstance(outcome.error, NotStarted)
    assert outcome.stopped
    assert report([outcome]) == 2


async def test_the_entry_tells_whether_an_experiment_is_finished() -> None:
    runner = Played(Actor())
    runner.version = at_step(60)
    outcome = await runner.run(EXPERIMENT)
    assert outcome.line.split() == ["a", "finished", "before,", "skipped"]
    assert runner.checked == [60]
    runner = Played(Actor(), result())
    runner.version = at_step(40)
    assert (await runner.run(EXPERIMENT)).result == result()
    assert runner.extended == [False]


@pytest.mark.parametrize("how", ["lost", "stopped by its node"])
@pytest.mark.parametrize(("step", "extended"), [(60, [True, True]), (100, [True, False]), (120, [True])])
async def test_an_extension_that_is_interrupted_is_not_begun_again(how: str, step: int, extended: list[bool]) -> None:
    """Whether nothing of it is in the ledger yet, half of it, or all."""
    runner = Played(Actor(), ActorDiedError() if how == "lost" else result(stopped=True), result(), extend=True)
    runner.version = at_step(60)
    attempt = runner._attempt

    async def interrupted(*arguments: Any) -> ExperimentOutcome:
        try:
            return await attempt(*arguments)
        finally:
            runner.version = at_step(step)

    runner._attempt = interrupted  # type: ignore[method-assign]
    outcome = await runner.run(EXPERIMENT)
    assert outcome.error is None
    assert outcome.restarts == (how == "lost")
    assert runner.extended == extended
    assert "finished before" not in outcome.line
    assert outcome.done
    assert outcome.loss == 0.1


async def test_what_a_lost_trainer_came_to_is_told_from_the_ledger() -> None:
    async def lost_at(version: ModelVersion, *, stopping: bool = False) -> ExperimentOutcome:
        runner = Played(Actor(), ActorDiedError())

        async def lost(*arguments: Any) -> ExperimentOutcome:
            runner.version = version
            if stopping:
                runner.stop()
            raise ActorDiedError

        runner._attempt = lost  # type: ignore[method-assign]
        return await runner.run(EXPERIMENT)

    whole = await lost_at(at_step(60))
    assert whole.line == "a               trained to step 60, as v0000000060 says, resumed once"
    assert (whole.done, whole.loss, report([whole])) == (True, 0.1, 0)
    part = await lost_at(at_step(40), stopping=True)
    assert part.line == "a               stopped at step 40, as v0000000040 says, resumed once"
    assert (part.done, part.stopped, report([part])) == (False, True, 2)
    given_up = at_step(40).model_copy(update={"pruned": True})
    pruned = await lost_at(given_up)
    assert pruned.line == "a               given up at step 40, as v0000000040 says, resumed once"
    assert (pruned.done, pruned.stopped, pruned.pruned) == (False, False, True)
    # One that was given up before is trained on when that is asked for.
    runner = Played(Actor(), result())
    runner.version = given_up
    assert (await runner.run(EXPERIMENT)).result == result()


async def test_the_wait_for_a_ledger_begins_again_when_it_was_there_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.running._UNAVAILABLE_PAUSE", 0.01)
    monkeypatch.setattr("jobs.running._UNAVAILABLE_LIMIT", 0.2)
    runner = Played(Actor(), Unavailable("503"), Unavailable("503"), result())
    attempt = runner._attempt

    async def after_a_while(*arguments: Any) -> ExperimentOutcome:
        await asyncio.sleep(0.3)
        return await attempt(*arguments)

    runner._attempt = after_a_while  # type: ignore[method-assign]
    assert (await runner.run(EXPERIMENT)).result == result()


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


def test_a_search_without_optuna_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    path = tmp_path / "s.yaml"
    space = "{training.learning_rate: {low: 0.1, high: 0.2}}"
    path.write_text(f"recipe: tiny\nexperiments: {{a: }}\nsearch: {{trials: 2, parameters: {space}}}\n")
    assert main([str(path), "--ledger", "x"]) == 2
    assert capsys.readouterr().err == "error: a search needs Optuna: pip install 'spectralmc[search]'\n"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"training": {"learning_rate": 0.05}}, "training.learning_rate is 0.05, and was 0.01"),
        ({"training": {"num_batches": 200}}, "training.num_batches is 200, and was 60"),
        ({"network": {"hidden": [8]}}, "network.hidden is (8,), and was (16, 16)"),
        ({"simulation": {"sim_params": {"mc_seed": 1}}}, "simulation.sim_params.mc_seed is 1, and was 42"),
        ({"domain": {"v": {"lower": 0.1, "upper": 0.2}}}, "domain.v.lower is 0.1, and was 0.05"),
    ],
)
async def test_an_experiment_whose_settings_changed_is_another_one(changed: dict[str, Any], told: str) -> None:
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    pricer = GbmCVNNPricer(EXPERIMENT.fresh())
    pricer.train(EXPERIMENT.training)
    async with store:
        version = await commit_snapshot(store, pricer.snapshot(), "m", experiment="a")
        await check_settings(store, EXPERIMENT, version)
        await check_settings(store, make_experiment("a", {"commit_interval": 7, "num_cpus": 2}, recipe="tiny"), version)
        with pytest.raises(ConfigError, match=re.escape(told)):
            await check_settings(store, make_experiment("a", changed, recipe="tiny"), version)


async def test_an_experiment_that_was_extended_is_still_the_same() -> None:
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    pricer = GbmCVNNPricer(EXPERIMENT.fresh())
    pricer.train(EXPERIMENT.training)
    pricer.train(EXPERIMENT.training.model_copy(update={"num_batches": 25}))
    async with store:
        await check_settings(store, EXPERIMENT, await commit_snapshot(store, pricer.snapshot(), "m", experiment="a"))
        longer = make_experiment("a", {"training": {"num_batches": 100}}, recipe="tiny")
        with pytest.raises(ConfigError, match="num_batches is 100, and was 25"):
            await check_settings(store, longer, (await store.list_versions())[-1])


async def test_who_is_told_to_stop_in_some_seconds_does_not_wait_for_a_ledger_that_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = Played(Actor())

    async def hang() -> None:
        await asyncio.sleep(3600)

    runner._actor.flush.remote = hang
    runner.stop(5.0)
    await asyncio.wait_for(runner.close(), 3)
    assert "does not answer in time" in caplog.text
