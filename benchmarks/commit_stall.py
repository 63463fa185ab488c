"""What commits cost training: throughput and the longest step, beside the usual ways to save a checkpoint.

.venv/bin/python -m benchmarks.commit_stall [--json FILE] [--only abcde] [--steps 4000] [--soak 20000]

(a) a large model on a GPU, S3 at 200 ms and 200 MB/s   (b) the default model on a GPU, a commit every 10 steps
(c) the default model on a CPU, a commit every 20       (d) S3 cannot be reached   (e) a soak of many commits
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import smc.learning.pricer
import smc.storage.commits
from benchmarks.reporting import Report, memory_of, run
from benchmarks.slow_link import SlowLink
from jobs.recipes import make_experiment
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig, TrainingResult
from smc.learning.step import TrainingStep
from smc.simulation.engine import BlackScholesConfig, SimulationParams
from smc.storage import AsyncBlockchainModelStore, recover
from smc.storage.commits import CommitSeconds, Committer
from smc.storage.dev_server import DevServer
from smc.storage.objects import Body, MemoryObjectStore
from smc.storage.spool import Spool

WARM_UP = 100  # steps before the ones that count

Save = Callable[[TrainingStep], None]


@dataclass
class Measured:
    """One run. `seconds` of its steps and whatever held them up; `steps` each one's own, in milliseconds."""

    seconds: float
    flush: float
    steps: np.ndarray
    result: TrainingResult
    processor: float  # seconds, of all threads

    @property
    def longest(self) -> float:
        """By how much the longest step exceeds the median one, in milliseconds."""
        return float(self.steps.max() - np.median(self.steps))

    @property
    def longest_steps(self) -> str:
        """The five longest, with where they were."""
        return ", ".join(f"{i}: {self.steps[i]:.2f} ms" for i in np.argsort(self.steps)[:-6:-1])


class Bench:
    """Trains a model again and again from the same state, timing every step."""

    def __init__(self, config: GbmCVNNPricerConfig, training: TrainingConfig) -> None:
        self.config, self.training = config, training
        self.on_gpu = next(config.cvnn.parameters()).is_cuda
        pricer = GbmCVNNPricer(config)
        pricer.train(training.model_copy(update={"num_batches": WARM_UP}))
        self.state = pricer.snapshot()

    def run(self, *, save: Save | None = None, every: int = 0, **commits: Any) -> Measured:
        """`save` is called after every so many steps, on the thread that trains."""
        marks: list[Any] = []

        class Timed(TrainingStep):
            def __call__(self) -> None:
                if not marks:
                    marks.append(_mark(on_gpu))
                super().__call__()
                if save is not None and len(marks) % every == 0:
                    save(self)
                marks.append(_mark(on_gpu))

        on_gpu = self.on_gpu
        pricer = GbmCVNNPricer(self.state)
        before = time.process_time()
        with patch.object(smc.learning.pricer, "TrainingStep", Timed):
            result = pricer.train(self.training, **commits)
        processor = time.process_time() - before
        if on_gpu:
            torch.cuda.synchronize()
        steps = np.array([_milliseconds(a, b) for a, b in pairwise(marks)])
        return Measured(steps.sum() / 1e3, result.flush_seconds, steps, result, processor)


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _milliseconds(first: Any, second: Any) -> float:
    return (second - first) * 1e3 if isinstance(first, float) else first.elapsed_time(second)


# --- the usual ways ---------------------------------------------------------------------------------------


def _tensors(step: TrainingStep) -> dict[str, Any]:
    return {"model": step._model.state_dict(), "optimizer": step._optimizer.state_dict()}


class SynchronousPut:
    """torch.save into memory and a PUT, in the training thread."""

    def __init__(self, endpoint_url: str) -> None:
        self._store = AsyncBlockchainModelStore(f"s3://spectralmc/{uuid.uuid4().hex}", endpoint_url=endpoint_url)

    def __call__(self, step: TrainingStep) -> None:
        self._put(_saved(_tensors(step)))

    def _put(self, data: memoryview) -> None:
        async def upload() -> None:
            async with self._store.another() as store:
                await store.upload(data)

        asyncio.run(upload())

    def finish(self) -> None:
        """Nothing is under way."""


class ThreadedPut(SynchronousPut):
    """state_dict().cpu() in a thread, then torch.save and a PUT there; the next save waits for it."""

    thread: threading.Thread | None = None

    def __call__(self, step: TrainingStep) -> None:
        self.finish()
        self.thread = threading.Thread(target=lambda: self._put(_saved(_on_cpu(_tensors(step)))))
        self.thread.start()

    def finish(self) -> None:
        if self.thread is not None:
            self.thread.join()


class DistributedCheckpoint:
    """torch.distributed.checkpoint.async_save to disk; the next save waits for it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._saving: Any = None
        self._saves = 0

    def __call__(self, step: TrainingStep) -> None:
        import torch.distributed.checkpoint as dcp

        self.finish()
        self._saves += 1
        path = Path(self._directory.name) / str(self._saves % 2)
        with contextlib.suppress(FileNotFoundError):
            for file in path.iterdir():
                file.unlink()
        state = _tensors(step)
        parameters = {str(k): v for k, v in state["optimizer"]["state"].items()}
        self._saving = dcp.async_save({"model": state["model"], "optimizer": parameters}, checkpoint_id=str(path))

    def finish(self) -> None:
        if self._saving is not None:
            self._saving.result()


def _saved(tensors: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getbuffer()


def _on_cpu(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.cpu()
    return {key: _on_cpu(value) for key, value in values.items()} if isinstance(values, dict) else values


# --- (a), (b), (c) ----------------------------------------------------------------------------------------


def large_model(report: Report, options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, batch = ((2480,) * 3, 1024) if device == "cuda" else ((128,) * 3, 32)
    params = SimulationParams(timesteps=16, network_size=256, batches_per_mc_run=128, mc_seed=1)
    model = build_cvnn(params, CVNNConfig(hidden=hidden)).to(device)
    config = GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=model)
    training = TrainingConfig(num_batches=options.steps, batch_size=batch, learning_rate=1e-4, optimizer="adam")
    bench = Bench(config, training)
    size = sum(p.numel() for p in model.parameters())
    every = options.steps // 16
    with servers() as server, SlowLink(server.endpoint_url, latency=0.2, megabytes=200) as link:
        asyncio.run(_warm(link.url))

        def ours() -> Measured:
            store = AsyncBlockchainModelStore(f"s3://spectralmc/{uuid.uuid4().hex}", endpoint_url=link.url)
            return bench.run(blockchain_store=store, auto_commit=True, commit_interval=every)

        def usual(save: Any) -> Measured:
            measured = bench.run(save=save, every=every)
            started = time.perf_counter()
            save.finish()
            measured.flush = time.perf_counter() - started
            return measured

        ways: dict[str, Callable[[], Measured]] = {
            "no commits": bench.run,
            "ours": ours,
            "torch.save and a synchronous put": lambda: usual(SynchronousPut(link.url)),
            "state_dict().cpu() in a thread, then put": lambda: usual(ThreadedPut(link.url)),
            "DCP async_save to disk": lambda: usual(DistributedCheckpoint()),
        }
        order = list(ways)
        runs: dict[str, list[Measured]] = {way: [] for way in ways}
        for way in [*order, *reversed(order[:2])]:
            runs[way].append(ways[way]())
    name = f"(a) {size / 1e6:.1f} M parameters, {options.steps} steps, {'H100' if device == 'cuda' else 'CPU'}"
    print(f"{name}, a commit every {every}")
    base = statistics.median(m.seconds for m in runs["no commits"])
    report.add("(a) median step without commits", float(np.median(runs["no commits"][0].steps)), "ms")
    for way, measured in runs.items():
        held = way == "ours" and device == "cuda"
        share = 100 * base / statistics.median(m.seconds for m in measured)
        report.add(f"(a) {way}: throughput", share, "%", at_least=99 if held else None)
        report.add(
            f"(a) {way}: longest step above the median", max(m.longest for m in measured), "ms",
            at_most=2 if held else None,
        )  # fmt: skip
        print(*(m.longest_steps for m in measured), sep="\n")
        report.add(f"(a) {way}: after the last step", max(m.flush for m in measured), "s")
    _describe(report, "(a)", runs["ours"][0].result)


def frequent_commits(report: Report, options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("(b) needs a CUDA GPU: not measured")
        return
    params = SimulationParams(timesteps=100, network_size=1024, batches_per_mc_run=8, mc_seed=1)
    model = build_cvnn(params, CVNNConfig()).cuda()
    config = GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=model)
    training = TrainingConfig(num_batches=10_000, batch_size=32, learning_rate=1e-3)
    with servers() as server, SlowLink(server.endpoint_url, latency=0.2, megabytes=200) as link:
        for where, url in (("200 ms away", link.url), ("on this host", server.endpoint_url)):
            _with_and_without(report, f"(b) S3 {where}", Bench(config, training), url, every=10, at_least=97)


def on_a_cpu(report: Report, options: argparse.Namespace) -> None:
    experiment = make_experiment("cpu", {"training": {"num_batches": 400}})
    with servers() as server:
        bench = Bench(experiment.fresh(), experiment.training)
        # Two seconds each, on cores that others have a part of: three would tell a few per cent more or less.
        _with_and_without(report, "(c) CPU", bench, server.endpoint_url, every=20, at_least=90, rounds=9)


def _with_and_without(
    report: Report, name: str, bench: Bench, url: str, *, every: int, at_least: float, rounds: int = 3
) -> None:
    with_, without = [], []
    for _ in range(rounds):
        without.append(bench.run())
        store = AsyncBlockchainModelStore(f"s3://spectralmc/{uuid.uuid4().hex}", endpoint_url=url)
        with_.append(bench.run(blockchain_store=store, auto_commit=True, commit_interval=every))
    plain, ours = (statistics.median(m.seconds for m in runs) for runs in (without, with_))
    report.add(f"{name}: median step without commits", float(np.median(without[0].steps)), "ms")
    report.add(f"{name}: throughput, a commit every {every} steps", 100 * plain / ours, "%", at_least=at_least)
    for label, runs in (("with", with_), ("without", without)):
        print(*(m.longest_steps for m in runs), sep="\n")
        report.add(f"{name}: longest step above the median, {label}", statistics.median(m.longest for m in runs), "ms")
    _describe(report, name, with_[-1].result)
    asyncio.run(_check(store, with_[-1].result))


def _describe(report: Report, name: str, result: TrainingResult) -> None:
    for status in ("committed", "replaced", "failed"):
        report.add(f"{name}: {status}", len(result.commits_that(status)), "commits")
    for stage in fields(CommitSeconds):
        seconds = [s for c in result.commits_that("committed") if (s := getattr(c.seconds, stage.name)) is not None]
        if seconds:
            report.add(f"{name}: {stage.name}", 1e3 * statistics.median(seconds), "ms")


async def _check(store: AsyncBlockchainModelStore, result: TrainingResult) -> None:
    """Every outcome is accounted for, and the ledger has the committed ones in order."""
    async with store:
        steps = [version.step for version in await store.list_versions()]
    assert steps == sorted(steps) == [c.step for c in result.commits_that("committed")]
    assert len({c.step for c in result.commits}) == len(result.commits)


async def _warm(url: str) -> None:
    async with AsyncBlockchainModelStore("s3://spectralmc/warm", endpoint_url=url) as store:
        await store.ledger.prepare()


@contextlib.contextmanager
def servers() -> Iterator[DevServer]:
    with (
        tempfile.TemporaryDirectory() as directory,
        DevServer(Path(directory)) as server,
        patch.dict(os.environ, server.environment),
    ):
        yield server


# --- (d), (e) ---------------------------------------------------------------------------------------------


class Retries(logging.Filter):
    """Counts what the store says of each retry, and prints none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "again in" in record.getMessage()
        return record.levelno >= logging.WARNING


def unreachable(report: Report, options: argparse.Namespace) -> None:
    experiment = make_experiment("unreachable", {"training": {"num_batches": 800}})
    rounds = 9
    with servers() as server, tempfile.TemporaryDirectory() as spool:
        os.environ["SMC_SPOOL_DIR"] = spool
        bench = Bench(experiment.fresh(), experiment.training)
        plain, lost = [], []
        name = f"s3://spectralmc/{uuid.uuid4().hex}"
        retries = Retries()
        logging.getLogger("smc.storage").addFilter(retries)
        logging.getLogger("smc.storage").setLevel(logging.INFO)
        for _ in range(rounds):
            plain.append(bench.run())
            store = AsyncBlockchainModelStore(name, endpoint_url="http://127.0.0.1:1")
            lost.append(bench.run(blockchain_store=store, auto_commit=True, commit_interval=200))
        ratios = [100 * a.seconds / b.seconds for a, b in zip(plain, lost, strict=True)]
        print("(d) of each round:", ", ".join(f"{ratio:.1f} %" for ratio in ratios))
        report.add("(d) S3 unreachable: throughput, median of nine rounds", statistics.median(ratios), "%", at_least=97)
        report.add("(d) S3 unreachable: least and", min(ratios), "%")
        report.add("(d) S3 unreachable: most", max(ratios), "%")
        report.add("(d) retries a round", retries.count / rounds, "requests")
        costs = [b.processor - a.processor for a, b in zip(plain, lost, strict=True)]
        report.add("(d) processor time of commits and retries, a round", 1e3 * statistics.median(costs), "ms")
        report.add("(d) processor time of training, a round", 1e3 * statistics.median(m.processor for m in plain), "ms")
        report.add("(d) S3 unreachable: after the last step", max(m.flush for m in lost), "s")
        report.add(
            "(d) final snapshots in the spool", sum(r.step == WARM_UP + 800 for r in Spool().records()), f"of {rounds}"
        )

        async def recovered() -> int:
            async with AsyncBlockchainModelStore(name, endpoint_url=server.endpoint_url) as store:
                return len(await recover(store, Spool()))

        failed = sum(len(m.result.commits_that("failed")) for m in lost)
        report.add("(d) commits recovered, of those that failed", 100 * asyncio.run(recovered()) / failed, "%",
                   at_least=100)  # fmt: skip


class Forgetful(MemoryObjectStore):
    """Keeps the log and the latest few checkpoints: what grows is then ours."""

    async def put(self, key: str, data: Body) -> None:
        await super().put(key, data)
        self._forget()

    async def create(self, key: str, data: Body) -> None:
        await super().create(key, data)
        self._forget()

    def _forget(self) -> None:
        blobs = [key for key in self.objects if key.startswith("blobs/")]
        for key in blobs[:-8]:
            del self.objects[key]


class Paced:
    """A store that counts what is settled, so that a soak can go at its pace."""

    def __init__(self, store: AsyncBlockchainModelStore) -> None:
        self._store, self.uri, self.settled_commits = store, store.uri, 0

    @contextlib.asynccontextmanager
    async def committer(self) -> AsyncIterator[Committer]:
        async with self._store.committer() as committer:
            committer.settled = self._settled  # type: ignore[method-assign]
            yield committer

    def _settled(self, outcome: object, experiment: str) -> None:
        self.settled_commits += 1


def soak(report: Report, options: argparse.Namespace) -> None:
    experiment = make_experiment("soak", {"training": {"num_batches": options.soak}}, recipe="tiny")
    objects = Forgetful()
    before = set(threading.enumerate()), _descriptors()
    resident: list[float] = []

    def watch(step_report: Any) -> None:
        while step_report.batch - store.settled_commits > 4:  # so that nothing is replaced
            time.sleep(0.0005)
        if step_report.batch % (options.soak // 20) == 0:
            gc.collect()
            kept = list(objects.objects.items())
            stored = sum(sum(map(sys.getsizeof, (key, value, *value))) for key, value in kept)
            resident.append((memory_of() - stored) / 1e6)

    pricer = GbmCVNNPricer(experiment.fresh())
    store = Paced(AsyncBlockchainModelStore("s3://spectralmc/soak", objects=objects))
    started = time.perf_counter()
    with patch.object(smc.storage.commits, "_SHARE", 1.0):
        result = pricer.train(
            experiment.training, logger=watch, blockchain_store=store, auto_commit=True, commit_interval=1
        )
    committed = len(result.commits_that("committed"))
    report.add("(e) soak: committed", committed, "commits")
    report.add("(e) soak: replaced or failed", len(result.commits) - committed, "commits")
    report.add("(e) soak: commits a second", committed / (time.perf_counter() - started), "1/s")
    report.add("(e) soak: resident memory less the store's, at a tenth", resident[1], "MB")
    growth = 100 * (resident[-1] / resident[1] - 1)
    report.add("(e) soak: growth from there to the end", growth, "%", at_most=5)
    gc.collect()
    after = set(threading.enumerate()), _descriptors()
    report.add("(e) soak: threads left behind", len(after[0] - before[0]), "threads", at_most=0)
    report.add("(e) soak: file descriptors left behind", after[1] - before[1], "", at_most=0)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def measure(report: Report, options: argparse.Namespace) -> None:
    parts = {"a": large_model, "b": frequent_commits, "c": on_a_cpu, "d": unreachable, "e": soak}
    for letter, part in parts.items():
        if letter in options.only:
            part(report, options)


if __name__ == "__main__":
    run(
        "Training with commits against training without",
        measure,
        ("--only", {"default": "abcde"}),
        ("--steps", {"type": int, "default": 4000, "help": "of (a)"}),
        ("--soak", {"type": int, "default": 20_000, "help": "commits of (e)"}),
    )
