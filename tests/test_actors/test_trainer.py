from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import pytest
import ray

from actors.ledger import LedgerHandle, ledger_actor
from actors.trainer import RemoteTrainerActor, TrainerActor
from jobs.recipes import make_experiment
from smc.checkpoint.file import Snapshot, decode, encode
from smc.learning.experiment import Experiment
from smc.learning.pricer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore


def tiny(name: str = "tiny", **training: Any) -> Experiment:
    return make_experiment(name, {"training": training}, recipe="tiny")


async def test_the_plain_class_trains_resumes_and_extends(on_seaweed: str) -> None:
    store = AsyncBlockchainModelStore(on_seaweed)
    trainer = TrainerActor(tiny(), store)
    assert await trainer.progress() is None
    assert await trainer.snapshot() is None
    result = await trainer.train()
    assert result is not None
    assert result.global_step == 60
    assert [c.step for c in result.commits_that("committed")] == [20, 40, 60]
    assert repr(trainer) == "Trainer(tiny)"
    async with store:
        versions = await store.list_versions()
        assert {v.experiment for v in versions} == {"tiny"}
        # A finished experiment has nothing left to do, unless it is extended.
        assert await TrainerActor(tiny(), store).train(versions[-1]) is None
        extended = await TrainerActor(tiny(), store).train(versions[-1], extend=True)
        assert extended is not None
        assert extended.global_step == 120
        # An interrupted one trains what remains, and ends where it would have.
        resumed = await TrainerActor(tiny(), store).train(versions[0])
        assert resumed is not None
        assert resumed.batches == 40
        assert resumed.commits[-1].content_hash == versions[-1].content_hash


async def test_a_cancelled_training_stops_its_thread_after_a_final_commit(on_seaweed: str) -> None:
    store = AsyncBlockchainModelStore(on_seaweed)
    trainer = TrainerActor(tiny(num_batches=1_000_000), store)
    training = asyncio.ensure_future(trainer.train())
    while (progress := await trainer.progress()) is None or progress.loss is None:
        await asyncio.sleep(0.01)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    async with store:
        head = await store.get_head()
    assert head is not None
    assert head.step >= progress.step


async def test_stopping_before_training_begins_trains_nothing(on_seaweed: str) -> None:
    trainer = TrainerActor(tiny(), AsyncBlockchainModelStore(on_seaweed))
    await trainer.stop()
    result = await trainer.train()
    assert result is not None
    assert (result.batches, result.stopped, result.commits) == (0, True, ())


@pytest.mark.usefixtures("ray_cluster")
async def test_progress_snapshot_and_stop_are_answered_within_50_ms_during_training(on_seaweed: str) -> None:
    trainer = RemoteTrainerActor.options(max_concurrency=8).remote(
        tiny(num_batches=1_000_000), LedgerHandle(on_seaweed, ledger_actor(on_seaweed))
    )
    training = trainer.train.remote()
    while (progress := await trainer.progress.remote()) is None or progress.loss is None:
        await asyncio.sleep(0.05)

    async def milliseconds(call: Any) -> float:
        started = time.perf_counter()
        await call.remote()
        return 1e3 * (time.perf_counter() - started)

    # Two cores carry the trainer, the S3 server, Ray and this test: one quiet moment in five must show it.
    times: dict[str, list[float]] = {}
    for _ in range(5):
        times = {
            name: [await milliseconds(getattr(trainer, name)) for _ in range(15)] for name in ("progress", "snapshot")
        }
        if all(statistics.median(t) < 50 for t in times.values()):
            break
    (ref,) = await trainer.snapshot.remote()
    assert decode(await ref).metadata.global_step > progress.step
    times["stop"] = [await milliseconds(trainer.stop)]
    print({name: f"median {statistics.median(t):.1f} ms, max {max(t):.1f} ms" for name, t in times.items()})
    assert statistics.median(times["progress"]) < 50, times
    assert statistics.median(times["snapshot"]) < 50, times
    assert times["stop"][0] < 500, times  # a single call
    result = await training
    assert result.stopped
    assert [c.status for c in result.commits][-1] == "committed"


@pytest.mark.usefixtures("ray_cluster")
async def test_an_actor_killed_between_two_commits_is_resumed_to_the_same_final_hash(on_seaweed: str) -> None:
    experiment = tiny(num_batches=2000)
    handle = LedgerHandle(on_seaweed, ledger_actor(on_seaweed))
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert await store.get_head() is None
        trainer = RemoteTrainerActor.options(max_concurrency=8).remote(experiment, handle)
        training = trainer.train.remote()
        while (head := await store.get_head()) is None or head.step < 100:
            await asyncio.sleep(0.02)
        ray.kill(trainer)
        with pytest.raises(ray.exceptions.RayActorError):
            await training
        head = await store.get_head()
        assert head is not None
        assert head.step < 2000
        result = await RemoteTrainerActor.remote(experiment, handle).train.remote(head)
        assert result.global_step == 2000
        undisturbed = GbmCVNNPricer(experiment.fresh())
        undisturbed.train(experiment.training)
        newest = await store.get_head()
        assert newest is not None
        assert await store.load_checkpoint(newest) == encode(Snapshot.of(undisturbed.snapshot()))
