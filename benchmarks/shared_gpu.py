"""One GPU shared by experiments: contracts a second of one alone, against several in a process of their own each.

.venv/bin/python -m benchmarks.shared_gpu [--json FILE] [--seconds 8]

Trainers are Ray actors with an equal share of the GPU, as a sweep starts them; all commit through one LedgerActor, to
moto's S3 server, since it is the GPU that is measured. Where NVIDIA's MPS is installed, once more with it: processes
then run on the GPU side by side instead of in turns. Without a GPU it runs on CPUs, to try the script.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import orjson
import ray
import torch
from moto.server import ThreadedMotoServer

from actors.ledger import LedgerHandle, ledger_actor
from actors.trainer import RemoteTrainerActor
from benchmarks.reporting import Report, run
from jobs.mps import CONTROL, mps
from jobs.recipes import make_experiment
from smc.learning.pricer import GbmCVNNPricer

SIZES: Mapping[str, tuple[tuple[int, ...], str, Mapping[str, Any]]] = {
    "batch 32 x 8,192 paths": (
        (2, 4),
        "gpu",
        {
            "simulation": {"sim_params": {"batches_per_mc_run": 8, "network_size": 1024, "timesteps": 100}},
            "network": {"hidden": [64, 64, 64]},
            "training": {"batch_size": 32, "differential": 0.0},
        },
    ),
    "batch 256 x 131,072 paths": ((2,), "gpu", {}),
}


async def rates(
    handle: LedgerHandle,
    count: int,
    recipe: str,
    settings: Mapping[str, Any],
    seconds: float,
    *,
    interval: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Contracts a second of `count` trainers together while all of them train, and what the first committed."""
    gpus = 1.0 / count if torch.cuda.is_available() else 0.0
    more = {"training": {"num_batches": 10**7}, "num_gpus": gpus, "num_cpus": 1, "commit_interval": interval}
    experiments = [make_experiment(uuid.uuid4().hex, settings, more, recipe=recipe) for _ in range(count)]
    actor = RemoteTrainerActor.options(
        num_cpus=1, num_gpus=gpus, max_concurrency=8, runtime_env={"env_vars": dict(environment or {})}
    )
    trainers = [actor.remote(experiment, handle) for experiment in experiments]
    training = [trainer.train.remote() for trainer in trainers]
    while not all([await step(trainer) for trainer in trainers]):
        done, _ = ray.wait(training, timeout=0.1)
        assert not done, await asyncio.gather(*training)
    await asyncio.sleep(1.0)
    before = await asyncio.gather(*(next_step(trainer) for trainer in trainers))
    await asyncio.sleep(seconds)
    after = await asyncio.gather(*(next_step(trainer) for trainer in trainers))
    await asyncio.gather(*(trainer.stop.remote(5.0) for trainer in trainers))
    results = await asyncio.gather(*training)
    for trainer in trainers:
        ray.kill(trainer)
    batch = experiments[0].training.batch_size
    measured = sum(batch * (b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(before, after, strict=True))
    return measured, len(results[0].commits_that("committed"))


async def step(trainer: Any) -> int:
    """The last step that an actor knows to be done."""
    progress = await trainer.progress.remote()
    return progress.step if progress is not None and progress.loss is not None else 0


async def next_step(trainer: Any) -> tuple[float, int]:
    """When an actor first says another step, and which: it is told of one in fifty."""
    known = new = await step(trainer)
    while new == known:
        await asyncio.sleep(0.002)
        new = await step(trainer)
    return time.perf_counter(), new


def kernel_shares(recipe: str, settings: Mapping[str, Any], steps: int = 400) -> tuple[float, float]:
    """Of the time of one experiment alone: with a kernel on the GPU, and with one that leaves no room beside it.

    Such a kernel has more blocks than the GPU holds at once, or nine tenths of the threads: what another process
    launches meanwhile waits, with MPS too.
    """
    from torch.profiler import ProfilerActivity, profile

    experiment = make_experiment("busy", settings, {"training": {"num_batches": steps}, "num_gpus": 1}, recipe=recipe)
    pricer = GbmCVNNPricer(experiment.fresh())
    pricer.train(experiment.training)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        pricer.train(experiment.training)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = orjson.loads(trace.read_bytes())["traceEvents"]
    found = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    first, end = min(e["ts"] for e in found), max(e["ts"] + e["dur"] for e in found)
    middle = (first + end) / 2  # the first half has the warm-up and the capture
    full = [e for e in found if e["cat"] == "kernel" and _fills(e["args"])]
    return _covered(found, middle, end), _covered(full, middle, end)


def _fills(kernel: Mapping[str, Any]) -> bool:
    """Whether a kernel leaves no room: blocks of it wait, or nearly all threads there can be run."""
    resident = kernel["est. achieved occupancy %"]
    most = torch.cuda.get_device_properties(0).max_threads_per_multi_processor / 32
    asked = 100 * kernel["warps per SM"] / most
    return bool(asked > resident + 1 or resident >= 90)


def _covered(events: Sequence[Mapping[str, Any]], start: float, end: float) -> float:
    """The share of a time in which at least one of the events goes on."""
    covered, last = 0.0, start
    for since, until in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        covered += max(0.0, until - max(since, last))
        last = max(last, until)
    return covered / (end - start)


@contextmanager
def server() -> Iterator[None]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3").create_bucket(Bucket="spectralmc")
    try:
        yield
    finally:
        moto.stop()


def measure_size(report: Report, name: str, together: tuple[int, ...], measured: Callable[..., Any]) -> None:
    def row(what: str) -> str:
        return f"{name}: {what}"

    first, _ = measured(1)
    shared = {count: measured(count)[0] for count in together}
    committing, commits = measured(1, interval=10)
    second, _ = measured(1)
    one = (first + second) / 2
    report.add(row("one alone, the mean of two runs"), one, "contracts/s")
    report.add(row(f"one, {commits} commits through Ray meanwhile"), committing, "contracts/s")
    for count, total in shared.items():
        report.add(row(f"{count} of {1 / count:.2g} GPU each"), total / one, "x one alone")
    if shutil.which(CONTROL) is None:
        return
    with mps() as environment:
        for count in (1, *together):
            total, _ = measured(count, environment=environment)
            bar = 1.3 if count == 2 else None
            report.add(row(f"{count} of {1 / count:.2g} GPU, with MPS"), total / one, "x one alone", at_least=bar)


def measure(report: Report, options: argparse.Namespace) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with server():
        ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=8)
        uri = "s3://spectralmc/shared"
        handle = LedgerHandle(uri, ledger_actor(uri))
        try:
            for name, (together, recipe, settings) in SIZES.items():
                if not torch.cuda.is_available():
                    recipe, settings = "tiny", {}
                else:
                    busy, full = kernel_shares(recipe, settings)
                    report.add(f"{name}: time of one alone with a kernel on the GPU", 100 * busy, "%")
                    report.add(f"{name}: with one that leaves no room beside it", 100 * full, "%")

                def measured(count: int, recipe: str = recipe, settings: Any = settings, **more: Any) -> Any:
                    return asyncio.run(rates(handle, count, recipe, settings, options.seconds, **more))

                measure_size(report, name, together, measured)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    run(
        "Experiments that share one GPU",
        measure,
        ("--seconds", {"type": float, "default": 8.0, "help": "that each rate is measured over"}),
    )
