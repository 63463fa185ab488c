"""One GPU shared by experiments: contracts a second of one alone, against several in a process of their own each.

.venv/bin/python -m benchmarks.shared_gpu [--json FILE] [--seconds 8] [--together 2 4]

Trainers are Ray actors with an equal share of the GPU, as a sweep starts them; all commit through one LedgerActor, to
moto's S3 server, since it is the GPU that is measured. Without a GPU it runs on CPUs, to try the script.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import boto3
import ray
import torch
from moto.server import ThreadedMotoServer

from actors.ledger import LedgerHandle, ledger_actor
from actors.trainer import RemoteTrainerActor
from benchmarks.reporting import Report, run
from jobs.recipes import make_experiment
from smc.gbm_trainer import GbmCVNNPricer

SIZES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "batch 32 x 8,192 paths": (
        "gpu",
        {
            "simulation": {"sim_params": {"batches_per_mc_run": 8, "network_size": 1024, "timesteps": 100}},
            "network": {"hidden": [64, 64, 64]},
            "training": {"batch_size": 32, "differential": 0.0},
        },
    ),
    "batch 256 x 131,072 paths": ("gpu", {}),
}


async def rates(count: int, recipe: str, settings: Mapping[str, Any], interval: int | None, seconds: float) -> Any:
    """Contracts a second of each of `count` trainers while all of them train, and what they committed."""
    uri = f"s3://spectralmc/{uuid.uuid4().hex}"
    ledger = await asyncio.to_thread(ledger_actor, uri)
    handle = LedgerHandle(uri, ledger)
    gpus = 1.0 / count if torch.cuda.is_available() else 0.0
    more = {"training": {"num_batches": 10**7}, "num_gpus": gpus, "num_cpus": 1, "commit_interval": interval}
    experiments = [make_experiment(f"e{i}", settings, more, recipe=recipe) for i in range(count)]
    trainers = [
        RemoteTrainerActor.options(num_cpus=1, num_gpus=gpus, max_concurrency=8).remote(e, handle) for e in experiments
    ]
    training = [trainer.train.remote() for trainer in trainers]
    while not all(await asyncio.gather(*(at(trainer) for trainer in trainers))):
        done, _ = ray.wait(training, timeout=0.1)
        assert not done, await asyncio.gather(*training)
    await asyncio.sleep(1.0)
    before = await asyncio.gather(*(at(trainer) for trainer in trainers))
    await asyncio.sleep(seconds)
    after = await asyncio.gather(*(at(trainer) for trainer in trainers))
    await asyncio.gather(*(trainer.stop.remote(5.0) for trainer in trainers))
    results = await asyncio.gather(*training)
    for trainer in [*trainers, ledger]:
        ray.kill(trainer)
    batch = experiments[0].training.batch_size
    measured = [batch * (b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(before, after, strict=True)]
    return measured, [len(result.commits_that("committed")) for result in results]


async def at(trainer: Any) -> tuple[float, int] | None:
    """The time at which an actor said how many steps it has done; None before the first."""
    progress = await trainer.progress.remote()
    return (time.perf_counter(), progress.step) if progress is not None and progress.loss is not None else None


def busy(recipe: str, settings: Mapping[str, Any], steps: int = 400) -> float:
    """The share of time in which a kernel of one experiment alone runs on the GPU, in the second half of some steps."""
    from torch.profiler import ProfilerActivity, profile

    experiment = make_experiment("busy", settings, {"training": {"num_batches": steps}, "num_gpus": 1}, recipe=recipe)
    pricer = GbmCVNNPricer(experiment.fresh())
    pricer.train(experiment.training)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        pricer.train(experiment.training)
        torch.cuda.synchronize()
    found = sorted((e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type.name == "CUDA")
    middle = (found[0][0] + found[-1][1]) / 2
    covered, last = 0.0, middle
    for start, end in found:
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered / (last - middle)


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


def measure(report: Report, options: argparse.Namespace) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with server():
        ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=max(4, *options.together))
        try:
            for name, (recipe, settings) in SIZES.items():
                if not torch.cuda.is_available():
                    recipe, settings = "tiny", {}
                else:
                    report.add(f"{name}: GPU busy with one alone", 100 * busy(recipe, settings), "%")
                alone: list[float] = []
                for interval in (None, 10, None):
                    measured, commits = asyncio.run(rates(1, recipe, settings, interval, options.seconds))
                    if interval is None:
                        alone += measured
                    else:
                        report.add(
                            f"{name}: one, a commit every {interval} steps through Ray", measured[0], "contracts/s"
                        )
                        report.add(f"{name}: committed meanwhile", commits[0], "commits")
                one = sum(alone) / len(alone)
                report.add(f"{name}: one alone, the mean of two runs", one, "contracts/s")
                for count in options.together:
                    measured, _ = asyncio.run(rates(count, recipe, settings, None, options.seconds))
                    report.add(f"{name}: {count} at {1 / count:.2g} GPU each, together", sum(measured), "contracts/s")
                    report.add(f"{name}: {count}, against one alone", sum(measured) / one, "x", at_least=1.3)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    run(
        "Experiments that share one GPU",
        measure,
        ("--seconds", {"type": float, "default": 8.0, "help": "that each rate is measured over"}),
        ("--together", {"type": int, "nargs": "+", "default": [2, 4]}),
    )
