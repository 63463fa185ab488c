"""The six tests of training with a ledger, on moto and on a real S3 server, and what belongs to them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smc.checkpoint.file import Snapshot, decode, encode
from smc.errors import ConfigError, NumericsError
from smc.learning.pricer import GbmCVNNPricer, StepReport
from smc.learning.result import TrainingResult
from smc.storage import (
    AsyncBlockchainModelStore,
    commit_snapshot,
    load_snapshot_from_checkpoint,
    recover,
)
from smc.storage.objects import MemoryObjectStore, ObjectStore
from smc.storage.spool import Spool
from tests.conftest import NO_DELAYS, small_config, small_training
from tests.faults import FaultStore


async def test_training_with_auto_commit(on_s3: str) -> None:
    pricer = GbmCVNNPricer(small_config())
    async with AsyncBlockchainModelStore(on_s3) as store:
        assert await store.get_head() is None
        result = pricer.train(
            small_training(5),
            blockchain_store=store,
            auto_commit=True,
            commit_message_template="Training complete: step={step}, loss={loss:.4f}",
        )
        head = await store.get_head()
        assert head is not None
        assert head.counter == 0
        assert head.commit_message == f"Training complete: step=5, loss={result.loss:.4f}"
        assert head.step == 5
        assert head.loss == result.loss
        assert [c.status for c in result.commits] == ["committed"]
        assert (await store.verify(blobs=True)).ok


async def test_training_with_commit_interval(on_s3: str) -> None:
    pricer = GbmCVNNPricer(small_config())
    async with AsyncBlockchainModelStore(on_s3) as store:
        pricer.train(small_training(25), blockchain_store=store, auto_commit=True, commit_interval=10)
        assert [v.step for v in await store.list_versions()] == [10, 20, 25]
        # The final step was just committed by the interval: it is not committed twice.
        pricer.train(small_training(20), blockchain_store=store, auto_commit=True, commit_interval=10)
        versions = await store.list_versions()
        assert [v.step for v in versions] == [10, 20, 25, 35, 45]
        assert [v.counter for v in versions] == [0, 1, 2, 3, 4]


def test_training_without_storage_backward_compat() -> None:
    pricer = GbmCVNNPricer(small_config())
    result = pricer.train(small_training(5))
    assert result.global_step == 5
    assert result.commits == ()


def test_training_validation_auto_commit_requires_store() -> None:
    pricer = GbmCVNNPricer(small_config())
    for arguments in ({"auto_commit": True}, {"commit_interval": 100}):
        with pytest.raises(ValueError, match=r"^auto_commit or commit_interval requires blockchain_store$"):
            pricer.train(small_training(5), **arguments)  # type: ignore[arg-type]
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    with pytest.raises(ValueError, match="commit_interval requires auto_commit"):
        pricer.train(small_training(5), blockchain_store=store, commit_interval=2)
    for bad in (0, -3, 2.5):
        with pytest.raises(ValueError, match="commit_interval must be a whole number"):
            pricer.train(
                small_training(5),
                blockchain_store=store,
                auto_commit=True,
                commit_interval=bad,  # type: ignore[arg-type]
            )
    assert pricer.snapshot().global_step == 0


async def test_training_commit_message_template(on_s3: str) -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(3))
    async with AsyncBlockchainModelStore(on_s3) as store:
        losses: list[float] = []
        pricer.train(
            small_training(4),
            logger=lambda report: losses.append(report.loss),
            blockchain_store=store,
            auto_commit=True,
            commit_interval=2,
            commit_message_template="[EXP] step={step:05d}, loss={loss:.6f}, batch={batch}",
        )
        messages = [v.commit_message for v in await store.list_versions()]
        assert messages == [
            f"[EXP] step=00005, loss={losses[1]:.6f}, batch=2",
            f"[EXP] step=00007, loss={losses[3]:.6f}, batch=4",
        ]
        with pytest.raises(ValueError, match=r"unknown variable \{epoch\}; allowed are \{step\}, \{loss\}, \{batch\}"):
            pricer.train(small_training(4), blockchain_store=store, auto_commit=True, commit_message_template="{epoch}")
        assert pricer.snapshot().global_step == 7


async def test_training_commit_preserves_optimizer_state(on_s3: str) -> None:
    pricer = GbmCVNNPricer(small_config())
    async with AsyncBlockchainModelStore(on_s3) as store:
        pricer.train(small_training(5), blockchain_store=store, auto_commit=True)
        head = await store.get_head()
        assert head is not None
        template = small_config()
        restored = await load_snapshot_from_checkpoint(store, head, template.cvnn, template)
        state = pricer.snapshot()
        assert restored.global_step == 5
        assert restored.resumed_from == "v0000000000"
        assert restored.optimizer_state is not None
        assert state.optimizer_state is not None
        assert restored.optimizer_state.step == 5
        assert restored.optimizer_state.name == state.optimizer_state.name == "soap"
        assert set(restored.optimizer_state.tensors) == set(state.optimizer_state.tensors)
        for name, tensor in state.optimizer_state.tensors.items():
            assert torch.equal(restored.optimizer_state.tensors[name], tensor)
            assert tensor.abs().sum() > 0


async def test_manual_commits(on_s3: str) -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    async with AsyncBlockchainModelStore(on_s3) as store:
        version = await commit_snapshot(
            store, pricer.snapshot(), "Manual checkpoint after validation", experiment="manual", metrics={"rmse": 1.5}
        )
        assert version.version_id == "v0000000000"
        assert version.metrics == {"rmse": 1.5}
        assert await store.get_version("v0000000000") == version


def test_commits_work_from_plain_code_too(on_s3: str) -> None:
    store = AsyncBlockchainModelStore(on_s3)
    result = GbmCVNNPricer(small_config()).train(small_training(2), blockchain_store=store, auto_commit=True)
    assert [c.version_id for c in result.commits] == ["v0000000000"]


async def test_a_resumed_run_commits_what_the_uninterrupted_one_would_have(on_s3: str) -> None:
    async with AsyncBlockchainModelStore(on_s3) as store:
        GbmCVNNPricer(small_config()).train(
            small_training(20), blockchain_store=store, auto_commit=True, commit_interval=8
        )
        uninterrupted = await store.list_versions()
        template = small_config()
        snapshot = await load_snapshot_from_checkpoint(store, uninterrupted[0], template.cvnn, template)
        GbmCVNNPricer(snapshot).train(small_training(12), blockchain_store=store, auto_commit=True, commit_interval=8)
        versions = await store.list_versions()
        assert [v.step for v in versions] == [8, 16, 20, 16, 20]
        assert [v.content_hash for v in versions[3:]] == [v.content_hash for v in uninterrupted[1:]]
        assert versions[3].resumed_from == "v0000000000"


async def test_training_completes_when_the_ledger_is_unreachable(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, on_seaweed: str
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    async with AsyncBlockchainModelStore(on_seaweed, retry_delays=(0.01, 0.02, 0.04)) as store:
        pricer = GbmCVNNPricer(small_config())
        result = pricer.train(small_training(6), blockchain_store=store, auto_commit=True, commit_interval=4)
    assert result.global_step == 6
    assert [c.status for c in result.commits] == ["failed", "failed"]
    assert "Failed to commit at step 4: " in caplog.text
    assert "Failed to commit at step 6: " in caplog.text
    # What was kept is committed later, once.
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert [v.step for v in await recover(store, Spool())] == [4, 6]
        assert await recover(store, Spool()) == []
        versions = await store.list_versions()
        assert [v.content_hash for v in versions][1] == versions[1].content_hash
        assert decode(await store.load_checkpoint(versions[1])).metadata.global_step == 6
        assert encode(Snapshot.of(pricer.snapshot())) == await store.load_checkpoint(versions[1])


async def test_a_nan_stops_training_and_keeps_what_was_committed() -> None:
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    pricer = GbmCVNNPricer(small_config())

    def poison(report: StepReport) -> None:
        if report.step == 5:
            with torch.no_grad():
                next(pricer.model.parameters()).fill_(float("nan"))

    with pytest.raises(NumericsError, match="the loss is nan at step 6"):
        pricer.train(small_training(10), logger=poison, blockchain_store=store, auto_commit=True, commit_interval=2)
    async with store:
        assert [v.step for v in await store.list_versions()] == [2, 4]


_KILLED = """
    import asyncio, os, signal, sys, time
    sys.path.insert(0, {root!r})
    from smc.learning.pricer import GbmCVNNPricer
    from smc.storage import AsyncBlockchainModelStore
    from tests.conftest import small_config, small_training

    async def head():
        async with AsyncBlockchainModelStore({ledger!r}) as store:
            return await store.get_head()

    def kill(report):
        if report.step == 17:  # the commit of step 10 is in, that of step 20 never will be
            while asyncio.run(head()) is None:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    GbmCVNNPricer(small_config()).train(
        small_training(40), logger=kill, blockchain_store=AsyncBlockchainModelStore({ledger!r}),
        auto_commit=True, commit_interval=10,
    )
"""


async def test_a_run_killed_between_two_commits_and_resumed_ends_with_the_same_hash(on_seaweed: str) -> None:
    script = textwrap.dedent(_KILLED).format(root=str(Path(__file__).parents[2]), ledger=on_seaweed)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        head = await store.get_head()
        assert head is not None
        assert head.step == 10
        resumed = GbmCVNNPricer(await load_snapshot_from_checkpoint(store, head))
        resumed.train(small_training(30), blockchain_store=store, auto_commit=True, commit_interval=10)
        newest = await store.get_head()
        assert newest is not None
        assert newest.step == 40
        undisturbed = GbmCVNNPricer(small_config())
        undisturbed.train(small_training(40))
        other = await commit_snapshot(store, undisturbed.snapshot(), "never killed")
        assert other.content_hash == newest.content_hash
        assert (await store.verify(blobs=True)).ok


async def test_the_message_of_a_failure_is_one_line(caplog: pytest.LogCaptureFixture, on_seaweed: str) -> None:
    store = AsyncBlockchainModelStore("s3://no-such-bucket-here", retry_delays=(0.0,))
    with caplog.at_level(logging.ERROR):
        result = GbmCVNNPricer(small_config()).train(small_training(1), blockchain_store=store, auto_commit=True)
    (outcome,) = result.commits_that("failed")
    assert outcome.reason is not None
    assert outcome.reason.startswith("bucket 'no-such-bucket-here' does not exist at http://127.0.0.1")
    assert "\n" not in outcome.reason


def stopped_at_20(objects: ObjectStore, **why: Any) -> tuple[AsyncBlockchainModelStore, TrainingResult]:
    """A run that is stopped at a step which is to be committed anyway."""
    store = AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS)
    pricer = GbmCVNNPricer(small_config())
    result = pricer.train(
        small_training(100),
        logger=lambda report: pricer.stop(**why) if report.step == 20 else None,
        blockchain_store=store,
        auto_commit=True,
        commit_interval=10,
    )
    assert result.stopped
    return store, result


async def test_where_it_was_stopped_there_is_one_commit_the_final_one() -> None:
    store, _ = stopped_at_20(MemoryObjectStore(), metrics={"reason": 1.0}, pruned=True)
    async with store:
        versions = await store.list_versions()
    assert [v.step for v in versions] == [10, 20]
    assert [v.metrics.get("reason") for v in versions] == [None, 1.0]
    assert [v.pruned for v in versions] == [False, True]
    assert [v.plan_end for v in versions] == [100, 100]
    assert not any({"plan_end", "pruned"} & v.metrics.keys() for v in versions)
    with pytest.raises(ConfigError, match="metrics must be finite"):
        GbmCVNNPricer(small_config()).stop(metrics={"reason": float("nan")})


def test_the_state_it_was_stopped_in_is_kept_on_a_disk_with_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    _, result = stopped_at_20(FaultStore(MemoryObjectStore(), lambda call, operation, key: "fails"))
    assert [(c.step, c.spooled is not None) for c in result.commits] == [(10, False), (20, True)]


def test_parameters_that_no_entry_can_hold_are_refused_before_training() -> None:
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    pricer = GbmCVNNPricer(small_config())
    for bad, message in (({"x": {1, 2}}, r"parameters\.x: .* what JSON does"), ({"x": float("inf")}, "finite number")):
        with pytest.raises(ConfigError, match=message):
            pricer.train(small_training(2), blockchain_store=store, auto_commit=True, parameters=bad)
    assert pricer.progress.step == 0


def test_a_users_metrics_stand_in_the_entries_and_change_nothing(memory_store: AsyncBlockchainModelStore) -> None:
    asked: list[int] = []

    def metrics(pricer: GbmCVNNPricer) -> dict[str, float]:
        asked.append(pricer.progress.step)
        torch.rand(100)
        return {"price": float(pricer.predict_price([[100, 105, 1.0, 0.03, 0.01, 0.25]])[0]), "learning_rate": -1.0}

    plain, measured = (GbmCVNNPricer(small_config()) for _ in range(2))
    plain.train(small_training(6))
    measured.train(
        small_training(6), blockchain_store=memory_store, auto_commit=True, commit_interval=2, metrics=metrics
    )
    assert encode(Snapshot.of(plain.snapshot())) == encode(Snapshot.of(measured.snapshot()))
    assert len(asked) == 3

    async def entries() -> Any:
        async with memory_store as store:
            return await store.list_versions()

    for version in asyncio.run(entries()):
        assert version.metrics["price"] > 0
        assert version.metrics["learning_rate"] > 0  # ours are ours


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pricer: 1 / 0,
        lambda pricer: {"a": float("nan")},
        lambda pricer: {"a": "text"},
        lambda pricer: {1: 2.0},
        lambda pricer: None,
        lambda pricer: {"\ud800": 1.0},
    ],
)
def test_metrics_that_fail_are_dropped_with_one_line(
    memory_store: AsyncBlockchainModelStore, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pricer = GbmCVNNPricer(small_config())
    result = pricer.train(
        small_training(6), blockchain_store=memory_store, auto_commit=True, commit_interval=2, metrics=wrong
    )
    assert len(result.commits_that("committed")) == 3
    assert caplog.text.count("metrics failed, and commits go on without it") == 1
