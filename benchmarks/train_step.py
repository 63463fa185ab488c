"""One training step on a GPU: the CUDA graph, the same step eagerly, and what the graph's time goes into.

.venv/bin/python -m benchmarks.train_step [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from benchmarks.reporting import Report, captured, gpu_seconds, run
from smc.learning.labels import Examples, ExampleSource
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.optimizer import make_optimizer
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.learning.scale import Scaling
from smc.learning.step import Position, TrainingStep
from smc.problem.contracts import resolve_domain
from smc.simulation.engine import BlackScholes, BlackScholesConfig, SimulationParams
from smc.simulation.levels import bin_weights

SIZE, STEPS = 1024, 100


def parameters(batches: int) -> SimulationParams:
    return SimulationParams(timesteps=STEPS, network_size=SIZE, batches_per_mc_run=batches, mc_seed=1)


def training_step(batches: int, batch_size: int, hidden: tuple[int, ...]) -> tuple[TrainingStep, ExampleSource]:
    params = parameters(batches)
    source = ExampleSource(BlackScholes(BlackScholesConfig(sim_params=params), "cuda"), resolve_domain({}))
    model = build_cvnn(params, CVNNConfig(hidden=hidden)).cuda()
    examples = source.simulate(source.contracts(0, 64), torch.zeros((), dtype=torch.int64, device="cuda"))
    step = TrainingStep(
        model,
        make_optimizer("adam", model),
        source,
        Scaling.of(examples.targets[:, 0]),
        bin_weights(SIZE).float().cuda(),
        lambda step: 1e-3,
        Position(0, 0, 0),
        fresh=batch_size,
        batch_size=batch_size,
        replay=None,
    )
    return step, source


def forward_and_backward(step: TrainingStep, batch: Examples) -> None:
    step._loss(batch).backward()  # type: ignore[no-untyped-call]


def measure(report: Report, options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("needs a CUDA GPU: nothing measured")
        return
    first = torch.zeros((), dtype=torch.int64, device="cuda")
    for batch_size, batches in ((32, 8), (256, 128)):
        large = batch_size == 256
        size = f"{batch_size} x {SIZE * batches} x {STEPS}"
        step, source = training_step(batches, batch_size, (256, 256))
        whole = gpu_seconds(step, repeats=50 if large else 400, warmup=10)
        report.add(f"step as a CUDA graph, {size}, complex 9-256-256-513", whole * 1e3, "ms",
                   at_most=None if large else 0.35)  # fmt: skip
        report.add(f"  contracts a second, {size}", batch_size / whole, "1/s")
        contracts = source.contracts(0, batch_size)
        chain = gpu_seconds(captured(partial(source.simulate, contracts, first)))
        report.add(f"  of it the target chain, {size}", 100 * chain / whole, "%", at_least=90 if large else None)
        if large:
            continue
        paths = gpu_seconds(captured(partial(source.engine.simulate, contracts.table, first)))
        report.add("  of it the paths", paths * 1e3, "ms")
        report.add("  of it levels and spectrum", (chain - paths) * 1e3, "ms")
        batch = source.simulate(contracts, first)
        with torch.no_grad():
            forward = gpu_seconds(captured(partial(step._loss, batch)))
        both = gpu_seconds(captured(partial(forward_and_backward, step, batch)))
        report.add("  of it forward and loss", forward * 1e3, "ms")
        report.add("  of it backward", (both - forward) * 1e3, "ms")
        report.add("  of it the rest: Adam, rates, counters, contracts", (whole - chain - both) * 1e3, "ms")
        started = time.perf_counter()
        torch.cuda.synchronize()
        for _ in range(50):
            step._step()
        torch.cuda.synchronize()
        eager = (time.perf_counter() - started) / 50
        report.add("the same step eagerly, launched from this host", eager * 1e3, "ms")
    for hidden in ((64, 64, 64), (256, 256)):
        params = parameters(8)
        model = build_cvnn(params, CVNNConfig(hidden=hidden)).cuda()
        pricer = GbmCVNNPricer(
            GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=model)
        )
        pricer.train(TrainingConfig(num_batches=200, batch_size=32, learning_rate=1e-3))
        result = pricer.train(TrainingConfig(num_batches=10_000, batch_size=32, learning_rate=1e-3))
        each = result.seconds / result.batches
        report.add(f"train(), 10,000 batches of 32, {'-'.join(map(str, hidden))}: a batch", each * 1e3, "ms")


if __name__ == "__main__":
    run("Training step, 1024 levels, 100 steps, float32", measure)
