"""Loggers and signals: whatever happens beside training, it goes on or leaves its newest state behind."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smc.checkpoint.file import Snapshot, encode
from smc.errors import ConfigError
from smc.learning.plan import StepReport
from smc.learning.pricer import GbmCVNNPricer
from smc.serving.client import InferenceClient
from smc.storage import AsyncBlockchainModelStore, commit_snapshot
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import Spool
from tests.conftest import small_config, small_training, versions_of

STEPS = 12


def trained(**arguments: Any) -> bytes:
    pricer = GbmCVNNPricer(small_config())
    assert pricer.train(small_training(STEPS), **arguments).global_step == STEPS
    return encode(Snapshot.of(pricer.snapshot()))


@pytest.fixture(scope="module")
def undisturbed() -> bytes:
    return trained()


def draws(report: StepReport) -> None:
    torch.rand(1000)
    np.random.rand(3)


def seeds(report: StepReport) -> None:
    torch.manual_seed(report.step)


def fails(report: StepReport) -> None:
    if report.step == 5:
        raise OSError(28, "No space left on device")


def fails_always(report: StepReport) -> None:
    raise RuntimeError("never works")


def hangs(report: StepReport) -> None:
    if report.step == 3:
        time.sleep(60)


def changes_threads(report: StepReport) -> None:
    assert torch.get_num_threads() >= 1


def in_inference_mode(report: StepReport) -> None:
    with torch.inference_mode():
        torch.ones(3).sum()


@pytest.mark.parametrize(
    ("logger", "says"),
    [
        (draws, None),
        (seeds, None),
        (changes_threads, None),
        (in_inference_mode, None),
        (fails, "The logger fails failed: OSError(28, 'No space left on device'); training goes on without it"),
        (fails_always, "The logger fails_always failed: RuntimeError('never works')"),
        (hangs, "The logger hangs has not returned after 0.3 s; training goes on without it"),
    ],
)
def test_no_logger_changes_holds_or_ends_training(
    logger: Any, says: str | None, undisturbed: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smc.learning.guarded._LOGGER_SECONDS", 0.3)
    heard: list[int] = []
    started = time.monotonic()
    assert trained(logger=[logger, lambda report: heard.append(report.step)]) == undisturbed
    assert time.monotonic() - started < 20
    assert heard == list(range(1, STEPS + 1))  # the others go on
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [says in line for line in told] == [True] if says else told == []


def test_a_logger_may_ask_everything_of_its_pricer(undisturbed: bytes) -> None:
    pricer = GbmCVNNPricer(small_config())
    seen: list[Any] = []

    def asks(report: StepReport) -> None:
        seen.append(pricer.predict_price([[100, 105, 1.0, 0.03, 0.01, 0.25]])[0])
        seen.append(pricer.snapshot().global_step)
        if report.step == 7:
            pricer.stop()

    result = pricer.train(small_training(STEPS), logger=asks)
    assert (result.global_step, result.stopped) == (7, True)
    assert seen[1::2] == list(range(1, 8))
    pricer.train(small_training(STEPS - 7))
    assert encode(Snapshot.of(pricer.snapshot())) == undisturbed


def test_who_leaves_out_of_a_logger_leaves_the_newest_state_behind() -> None:
    objects = MemoryObjectStore()
    store = AsyncBlockchainModelStore("memory", objects=objects)

    def leaves(report: StepReport) -> None:
        if report.step == 6:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        GbmCVNNPricer(small_config()).train(
            small_training(STEPS), logger=leaves, blockchain_store=store, auto_commit=True
        )

    async def steps() -> list[int]:
        async with store.another() as reader:
            return [version.step for version in await reader.list_versions()]

    assert asyncio.run(steps()) == [6]


def test_two_pricers_of_one_process_do_not_train_at_once() -> None:
    one, other = GbmCVNNPricer(small_config()), GbmCVNNPricer(small_config())
    thread = threading.Thread(target=lambda: one.train(small_training(100_000)))
    thread.start()
    while one.progress.loss is None:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another pricer is training in this process"):
        other.train(small_training(1))
    one.stop()
    thread.join(20)
    assert other.train(small_training(1)).global_step == 1


# --- signals -------------------------------------------------------------------------------------------

SCRIPT = """
import asyncio, sys
from smc.learning.pricer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore
from tests.conftest import small_config, small_training

def note(report):
    with open(sys.argv[2], "w") as file:
        file.write(str(report.step))

def main():
    print("ready", flush=True)
    GbmCVNNPricer(small_config()).train(
        small_training(1_000_000), logger=note, auto_commit=True,
        blockchain_store=AsyncBlockchainModelStore(sys.argv[1]),
    )

async def within():
    main()
    await asyncio.sleep(0)

asyncio.run(within()) if sys.argv[3] == "loop" else main()
"""


@pytest.mark.parametrize(
    ("kind", "signals"),
    [
        ("plain", [signal.SIGINT]),
        ("loop", [signal.SIGTERM]),
        ("loop", [signal.SIGINT] * 2),
        ("plain", [signal.SIGTERM] * 2),
    ],
)
def test_a_signal_leaves_the_newest_state_in_the_ledger_or_the_spool(
    kind: str, signals: list[signal.Signals], on_seaweed: str, tmp_path: Path, own_spool: Path
) -> None:
    noted = tmp_path / "step"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, on_seaweed, str(noted), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    deadline = time.monotonic() + 60
    while not (noted.exists() and noted.read_text().isdigit()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    _, error = process.communicate(timeout=60)
    if signals[0] is signal.SIGTERM:
        assert process.returncode == -signal.SIGTERM, error
    else:
        assert process.returncode != 0
        assert "KeyboardInterrupt" in error
    kept = [version.step for version in versions_of(on_seaweed)] if "spool" not in error else []
    kept += [record.step for record in Spool(own_spool).records()]
    assert max(kept) >= int(noted.read_text())


# --- where a process is ----------------------------------------------------------------------------------


def test_a_user_without_a_home_trains_with_a_healthy_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SMC_SPOOL_DIR")
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    result = GbmCVNNPricer(small_config()).train(small_training(3), blockchain_store=store, auto_commit=True)
    assert [outcome.status for outcome in result.commits] == ["committed"]
    with pytest.raises(OSError, match="this user has no home: set SMC_SPOOL_DIR"):
        _ = Spool().directory


async def test_a_store_of_another_loop_says_so_at_once() -> None:
    async with AsyncBlockchainModelStore("memory", objects=MemoryObjectStore()) as store:

        def elsewhere() -> None:
            started = time.monotonic()
            for call in (store.get_head, store.list_versions, store.verify, lambda: store.upload(b"x")):
                with pytest.raises(ConfigError, match="was opened on another event loop"):
                    asyncio.run(call())
            assert time.monotonic() - started < 2

        await asyncio.to_thread(elsewhere)
        assert await store.get_head() is None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_of_a_client_follows_the_ledger(on_seaweed: str) -> None:
    def commit(steps: int) -> None:
        async def work() -> None:
            pricer = GbmCVNNPricer(small_config())
            pricer.train(small_training(steps))
            async with AsyncBlockchainModelStore(on_seaweed) as store:
                await commit_snapshot(store, pricer.snapshot(), "m")

        asyncio.run(work())

    script = f"""
import os, sys, time
from smc.serving.client import InferenceClient
with InferenceClient({on_seaweed!r}, poll_seconds=0.1) as client:
    print("ready", flush=True)
    child = os.fork()
    if child == 0:
        for _ in range(300):
            if client.current.version.counter == 1:
                print("child follows", client.status.problem, flush=True)
                os._exit(0)
            time.sleep(0.1)
        os._exit(1)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    commit(2)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    commit(3)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "child follows None" in out
    assert isinstance(InferenceClient, type)


_ON_A_FULL_DISK = """
import logging, resource, signal, sys
from smc.learning.pricer import GbmCVNNPricer
from smc.reporting.training_tensorboard import TensorBoardLogger
from tests.conftest import small_config, small_training
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pricer = GbmCVNNPricer(small_config())
logger = TensorBoardLogger(sys.argv[1], pricer.model, every=1, histograms_every=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # like a disk that fills
with logger:
    print(pricer.train(small_training(200), logger=logger).batches, flush=True)
logger = TensorBoardLogger(sys.argv[2], pricer.model, every=1, histograms_every=1)  # and one that nobody closes
pricer.train(small_training(100), logger=logger)
print("ends", flush=True)
"""


@pytest.mark.service
def test_a_full_disk_under_tensorboard_ends_neither_training_nor_the_process_late(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path / "a"), str(tmp_path / "b")]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200", "ends"]
    assert done.stderr.count("training goes on without it") == 2
    assert "File too large" in done.stderr
    assert time.monotonic() - started < 60
