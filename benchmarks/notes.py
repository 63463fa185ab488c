"""Autocallable notes: price, delta and vega against quadrature, and what brings them, each choice undone in turn.

.venv/bin/python -m benchmarks.notes [--recipe gpu] [--seconds 600] [--ablation-seconds 60] [--json FILE]

Under geometric Brownian motion; with --heston also under Heston's model, against a simulation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import trained
from benchmarks.reporting import Report, run
from jobs.recipes import overlaid
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import price_error
from smc.problem.law import Law
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem, register
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.products.autocallable import Autocallable
from smc.problem.sobol_sampler import SobolSampler

CONTRACTS = 4096


@register
class WithoutAnchor(Autocallable):
    """The same note, whose guess of a price is nothing."""

    kind: ClassVar[str] = "autocallable_without_anchor"

    def anchor(self, law: Law) -> Tensor:
        """Nothing."""
        return 0 * law.spot

    def features(self, law: Law) -> tuple[Tensor, ...]:
        """Those that are no guess of the price."""
        return super().features(law)[:2]


# Each choice undone in turn: settings laid over the recipe.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "the recipe": {},
    "without derivatives as labels": {"training": {"differential": 0.0}},
    "payoffs averaged, and so without derivatives": {
        "simulation": {"conditional": False}, "training": {"differential": 0.0},
    },
    "without a guess of the price": {"simulation": {"product": {"kind": "autocallable_without_anchor"}}},
}  # fmt: skip
# At most, of 10 minutes of an H100: price in bp of nominal, others as a share of their mean over the domain.
BARS = {"price": 1.0, "delta": 0.005, "vega": 0.02}


def measure(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    runs = [("the recipe", options.seconds, True)]
    runs += [(name, options.ablation_seconds, False) for name in VARIANTS]
    for name, seconds, barred in runs:
        if not seconds:
            continue
        given = overlaid({"simulation": {"product": {"kind": "autocallable"}}}, VARIANTS[name])
        pricer, batches, took = trained(given, seconds, 0, options.recipe)
        title = f"{name}, {seconds} s: "
        compared(report, title, pricer, barred)
        report.add(f"{title}training, {batches} batches", took, "s")
    if options.heston:
        given = {"simulation": {"process": {"kind": "heston"}, "product": {"kind": "autocallable"}}}
        pricer, batches, took = trained(given, options.heston, 0, options.recipe)
        table = SobolSampler(pricer.domain, seed=20_261_123, schema=pricer.problem.schema).sample(CONTRACTS)
        found = price_error(pricer, table)
        report.add(f"Heston, {options.heston} s: price rmse", found.rmse, f"{found.unit}, {found.compared}")
        report.add(f"Heston, {options.heston} s: training, {batches} batches", took, "s")


def compared(report: Report, title: str, pricer: GbmCVNNPricer, barred: bool) -> None:
    exact = oracle_of(Problem(GeometricBrownianMotion(), Autocallable()))
    assert exact is not None
    assert exact.greeks is not None
    table = SobolSampler(pricer.domain, seed=20_261_123, schema=pricer.problem.schema).sample(CONTRACTS)
    price = np.asarray(pricer.predict_price(table)) - exact.price(table)
    bar = BARS if barred else {}
    report.add(f"{title}price rmse", rms(price) * 100, "bp of nominal", at_most=bar.get("price"))
    report.add(f"{title}price maximum", float(np.abs(price).max()) * 100, "bp of nominal")
    known, found = exact.greeks(table), pricer.predict_greeks(table)
    for name, ours, theirs in zip(known._fields, found, known, strict=True):
        share = rms(ours - theirs) / float(np.abs(theirs).mean())
        report.add(f"{title}{name} rmse", share, "of its mean", at_most=bar.get(name))


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


if __name__ == "__main__":
    run(
        f"Autocallable notes on 4 dates, {CONTRACTS} fresh contracts of the default domain, Monte Carlo labels only",
        measure,
        ("--recipe", {"default": "default"}),
        ("--seconds", {"type": int, "default": 600}),
        ("--ablation-seconds", {"type": int, "default": 60}),
        ("--heston", {"type": int, "default": 0, "metavar": "SECONDS"}),
        ("--threads", {"type": int, "default": 2}),
    )
