"""What is learnt of every problem in a given time, by one recipe, against its oracle or a simulation.

.venv/bin/python -m benchmarks.learning [--seconds 60] [--seeds 1] [--process heston] [--kinds KIND ...] [--json FILE]

Batches are counted as in `benchmarks.accuracy`. Beside the errors stands what must hold: no NaN, no bound broken,
levels in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.accuracy import trained
from benchmarks.reporting import Report, run
from jobs.recipes import overlaid
from jobs.train import setting
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import Measure, evaluate
from smc.prediction.soundness import soundness
from smc.problem.sobol_sampler import SobolSampler

KINDS = (
    "european_put", "european_call", "digital_put", "arithmetic_asian_put", "up_and_out_call", "down_and_out_call",
)  # fmt: skip
CONTRACTS = 2048


def measure(report: Report, options: argparse.Namespace) -> None:
    """Train each kind and print what came of it."""
    torch.set_num_threads(options.threads)
    for kind in options.kinds:
        given: dict[str, Any] = {"simulation": {"process": {"kind": options.process}, "product": {"kind": kind}}}
        for text in options.set:
            given = overlaid(given, setting(text))
        for seed in range(options.seeds):
            pricer, batches, took = trained(given, options.seconds, seed, options.recipe)
            schema = pricer.problem.schema
            fresh = SobolSampler({}, seed=20_261_123, schema=schema).sample(CONTRACTS)
            title = f"{options.process} x {kind}, {options.seconds} s, seed {seed}: "
            for found, statistic, value in shown(evaluate(pricer, fresh)):
                unit = "of its mean" if statistic == "relative" else f"{found.unit}, {found.compared}"
                report.add(f"{title}{found.name} {statistic}", value, unit)
            report.add(f"{title}training, {batches} batches", took, "s")
            sound(report, title, pricer)


def shown(measures: dict[str, Measure]) -> Iterator[tuple[Measure, str, float]]:
    """What is printed of the measures."""
    for name, found in measures.items():
        yield found, "rmse", found.rmse
        if name == "price":
            yield found, "maximum", found.maximum
        elif found.relative is not None:
            yield found, "relative", found.relative


def sound(report: Report, title: str, pricer: GbmCVNNPricer) -> None:
    """What must hold for any contract, over many random ones, those of the domain's corners among them."""
    found = soundness(pricer)
    report.add(f"{title}NaN over {found.contracts:,} contracts", float(found.wrong), "", at_most=0)
    report.add(f"{title}price beyond a bound", found.price_beyond, "bp", at_most=1e-6)
    report.add(f"{title}level beyond a bound", found.level_beyond, "bp", at_most=1e-6)
    report.add(f"{title}a level below the one before it", found.disorder, "", at_most=0)


if __name__ == "__main__":
    run(
        f"What is learnt of each problem, {CONTRACTS} fresh contracts of its default domain, Monte Carlo labels only",
        measure,
        ("--seeds", {"type": int, "default": 1}),
        ("--seconds", {"type": int, "default": 60}),
        ("--recipe", {"default": "default"}),
        ("--process", {"default": "gbm"}),
        ("--kinds", {"nargs": "+", "default": list(KINDS)}),
        ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "laid over the recipe"}),
        ("--threads", {"type": int, "default": 2}),
    )
