"""Learned distributions of some products, each beside what it is compared with: docs/products.png.

.venv/bin/python -m benchmarks.product_pictures [--seconds 20] [--out docs/products.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.accuracy import trained
from benchmarks.reporting import Report, run
from smc.prediction.evaluation import distance, evaluate
from smc.problem.sobol_sampler import SobolSampler
from smc.reporting.pictures import draw_quantiles

SHOWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gbm", "arithmetic_asian_call", {}),
    ("gbm", "up_and_out_call", {}),
    ("gbm", "down_and_in_put", {"monitoring": "continuous"}),
    ("gbm", "floating_lookback_put", {"monitoring": "continuous"}),
    ("gbm", "cliquet", {}),
    ("gbm", "autocallable", {}),
    ("gbm", "bermudan_put", {}),
    ("heston", "autocallable", {}),
    ("correlated_gbm", "worst_of_put", {}),
)
COLUMNS = 3
CONTRACTS = 256


def measure(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(2)
    rows = -(-len(SHOWN) // COLUMNS)
    drawn = Figure(figsize=(5.2 * COLUMNS, 4.2 * rows), layout="constrained")
    for axes, (process, product, settings) in zip(drawn.subplots(rows, COLUMNS).flat, SHOWN, strict=True):
        given = {"simulation": {"process": {"kind": process}, "product": {"kind": product} | settings}}
        pricer, batches, took = trained(given, options.seconds, 0, "default")
        sample = SobolSampler(pricer.domain, seed=20_261_123, schema=pricer.problem.schema).sample(CONTRACTS)
        measures = evaluate(pricer, sample)
        away, price = distance(measures), measures["price"]
        title = f"{product} under {process}, {options.seconds} s: "
        report.add(f"{title}price rmse", price.rmse, f"{price.unit}, {price.compared}")
        report.add(f"{title}W2 rmse", away.rmse, f"{away.unit}, {away.compared}")
        report.add(f"{title}training, {batches} batches", took, "s")
        contract = sample[away.ranks["median"]]
        levels = pricer.predict_distribution(contract[None]).host_levels[0]
        draw_quantiles(axes, contract, levels, pricer.problem)
        told = "\n".join(wrap(axes.get_title(), 64))
        axes.set_title(f"{pricer.problem.title}\n{told}", fontsize=8)
    drawn.savefig(options.out, dpi=70)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    run(
        "Distributions of products, learnt and compared",
        measure,
        ("--seconds", {"type": int, "default": 20}),
        ("--out", {"type": Path, "default": Path("docs/products.png")}),
    )
