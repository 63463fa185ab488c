"""Contracts priced a second: from a GPU's memory, and from the host and back.

.venv/bin/python -m benchmarks.predict [--json FILE] [--contracts N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.reporting import Report, run
from smc.learning.network import build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholesConfig, SimulationParams

LEVELS = 256


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median of the wall clock, the device's work included."""
    spans = []
    for _ in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - started)
    return statistics.median(spans[2:])


def measure(report: Report, options: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    params = SimulationParams(timesteps=1, network_size=LEVELS, batches_per_mc_run=16, mc_seed=1)
    pricer = GbmCVNNPricer(
        GbmCVNNPricerConfig(
            cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=build_cvnn(params).to(device)
        )
    )
    pricer.train(TrainingConfig(num_batches=200, batch_size=32, learning_rate=1e-2))
    n = options.contracts or (1 << 21 if on_gpu else 1 << 14)
    array = SobolSampler({}, seed=2).sample(n)
    some = array[: min(n, 1 << 19)]
    if on_gpu:
        table = torch.from_numpy(array).cuda()
        rate = n / seconds(lambda: pricer.predict_price(table))
        report.add(f"prices of {n:,} contracts on the device", rate / 1e6, "M contracts/s", at_least=20)
        part = table[: len(some)]
        rate = len(some) / seconds(lambda: pricer.predict_distribution(part))
        report.add(f"distributions of {LEVELS} levels on the device", rate / 1e6, "M contracts/s", at_least=2)
    bar = 1 if on_gpu else None
    rate = n / seconds(lambda: pricer.predict_price(array))
    report.add(f"prices of {n:,} contracts from host memory and back", rate / 1e6, "M contracts/s", at_least=bar)
    rate = len(some) / seconds(lambda: pricer.predict_distribution(some))
    report.add(f"distributions of {LEVELS} levels from host memory and back", rate / 1e6, "M contracts/s")
    for count in (1, 100):
        few = np.ascontiguousarray(array[:count])
        each = seconds(lambda c=few: pricer.predict_price(c), repeats=51)  # type: ignore[misc]
        report.add(f"one call for {count} contracts", each * 1e3, "ms")


if __name__ == "__main__":
    run(
        f"Prediction, network 7-64-64-64-{LEVELS // 2 + 1}, float32",
        measure,
        ("--contracts", {"type": int, "default": 0, "help": "how many at a time"}),
    )
