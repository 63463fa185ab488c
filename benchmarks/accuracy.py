"""Accuracy of a trained pricer against the closed form, on fresh contracts of the default domain.

.venv/bin/python -m benchmarks.accuracy [--seeds 3] [--seconds 60 20] [--recipe gpu] [--json FILE]
.venv/bin/python -m benchmarks.accuracy --ablation --seconds 60

How many batches fit into 85 % of the seconds is measured first, by training another pricer for a while; the schedule
is laid over that many, and what training then took is a row of the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import Report, run
from jobs.recipes import make_experiment, overlaid
from jobs.train import setting
from smc.learning.experiment import Experiment
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import evaluate
from smc.problem.problem import EUROPEAN_PUT
from smc.problem.sobol_sampler import SobolSampler

CONTRACTS = 8192
# Bars by device and seconds: measure, statistic, at most.
BARS: Mapping[tuple[str, int], Mapping[tuple[str, str], float]] = {
    ("cpu", 60): {
        ("price", "rmse"): 0.2,
        ("price", "maximum"): 2,
        ("W2, put", "rmse"): 12,
        ("CVaR97.5, put", "rmse"): 3,
        ("delta", "rmse"): 7e-4,
    },
    ("cpu", 20): {
        ("price", "rmse"): 0.7,
        ("price", "maximum"): 8,
        ("W2, put", "rmse"): 25,
        ("CVaR97.5, put", "rmse"): 10,
    },
    ("cuda", 60): {
        ("price", "rmse"): 0.08,
        ("price", "maximum"): 1.5,
        ("W2, put", "rmse"): 5,
        ("CVaR97.5, put", "rmse"): 2,
        ("delta", "rmse"): 4e-4,
        ("gamma", "relative"): 0.01,
        ("vega", "relative"): 0.01,
        ("theta", "relative"): 0.02,
        ("rho", "relative"): 0.02,
    },
    ("cuda", 10): {("price", "rmse"): 0.4},
}
# What is shown of a run, bar or no bar.
SHOWN = (
    ("price", "rmse"),
    ("price", "maximum"),
    ("implied volatility", "rmse"),
    ("W2, put", "rmse"),
    ("CVaR97.5, put", "rmse"),
    ("W2, call", "rmse"),
    ("CVaR97.5, call", "relative"),
    ("delta", "rmse"),
    ("gamma", "relative"),
    ("vega", "relative"),
    ("theta", "relative"),
    ("rho", "relative"),
)
# Each choice undone in turn: settings laid over the recipe.
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "the recipe": {},
    "Adam in place of SOAP": {"training": {"optimizer": "adam"}},
    "derivatives weigh 1.0": {"training": {"differential": 1.0}},
    "without derivatives as labels": {"training": {"differential": 0.0}},
    "neither SOAP nor derivatives": {"training": {"optimizer": "adam", "differential": 0.0}},
    "real network of equal size": {"network": {"numbers": "real", "hidden": [80, 80, 80]}},
    "cardioid": {"network": {"activation": "cardioid"}},
    "modReLU": {"network": {"activation": "modrelu"}},
    "pseudo-random paths": {"simulation": {"sim_params": {"sampling": "pseudorandom"}}},
    "every contract fresh, no replay": {"training": {"fresh_per_batch": 128}},
    "buffer of 4,096 contracts": {"simulation": {"sim_params": {"buffer_size": 4096}}},
    "batch of 32": {"training": {"batch_size": 32}},
    "constant learning rate": {"training": {"schedule": "constant", "learning_rate": 0.001}},
    "1,024 paths a contract": {"simulation": {"sim_params": {"batches_per_mc_run": 4}}},
}
REHEARSAL = 400
# Seconds that are not steps: scaling, the first replay of a graph.
START = 0.5


def trained(settings: Mapping[str, Any], seconds: float, seed: int, recipe: str) -> tuple[GbmCVNNPricer, int, float]:
    """A pricer trained for about so long, the batches it took and the seconds."""
    seeds = {"simulation": {"sim_params": {"mc_seed": seed}}, "network": {"seed": seed}}

    def experiment(batches: int) -> Experiment:
        return make_experiment("accuracy", settings, seeds, {"training": {"num_batches": batches}}, recipe=recipe)

    rehearsal, spent = experiment(REHEARSAL), {}
    GbmCVNNPricer(rehearsal.fresh()).train(rehearsal.training, logger=lambda r: spent.update({r.batch: r.seconds}))
    a_step = (spent[REHEARSAL] - spent[REHEARSAL // 2]) / (REHEARSAL - REHEARSAL // 2)
    real = experiment(max(REHEARSAL, int((0.85 * seconds - START) / a_step)))
    pricer = GbmCVNNPricer(real.fresh())
    started = time.perf_counter()
    pricer.train(real.training)
    return pricer, real.training.num_batches, time.perf_counter() - started


def measure(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {}
    for text in options.set:
        given = overlaid(given, setting(text))
    device = "cuda" if make_experiment("accuracy", given, recipe=options.recipe).num_gpus else "cpu"
    ablation = options.ablation is not None
    variants = {name: ABLATIONS[name] for name in options.ablation or ABLATIONS} if ablation else {"": {}}
    fresh = SobolSampler({}, seed=20_261_123).sample(CONTRACTS)
    for name, changes in variants.items():
        for seconds in options.seconds:
            bars = BARS.get((device, seconds), {}) if not ablation else {}
            for seed in range(options.seeds):
                pricer, batches, took = trained(overlaid(given, changes), seconds, seed, options.recipe)
                measures = evaluate(pricer, fresh)
                title = f"{name or f'{seconds} s'}, seed {seed}: "
                for what, statistic in SHOWN:
                    found, bar = measures[what], bars.get((what, statistic))
                    unit = "of its mean" if statistic == "relative" else found.unit
                    report.add(f"{title}{what} {statistic}", getattr(found, statistic), unit, at_most=bar)
                report.add(f"{title}training, {batches} batches", took, "s", at_most=seconds if bars else None)
                if not ablation:
                    soundness(report, title, pricer)


def soundness(report: Report, title: str, pricer: GbmCVNNPricer) -> None:
    """What must hold for any contract, over 100,000 random ones, those of the domain's corners among them."""
    bounds = np.array([[field.lower, field.upper] for field in EUROPEAN_PUT.schema])
    corners = np.array(np.meshgrid(*bounds)).reshape(6, -1).T
    inside = np.random.default_rng(1).uniform(bounds[:, 0], bounds[:, 1], (100_000 - len(corners), len(bounds)))
    contracts = np.concatenate([corners, inside])
    X0, K, T, r, d, _ = contracts.T
    put, call = (np.asarray(pricer.predict_price(contracts, kind)) for kind in ("put", "call"))
    lower, upper = np.maximum(K * np.exp(-r * T) - X0 * np.exp(-d * T), 0), K * np.exp(-r * T)
    outside = np.maximum(np.maximum(lower - put, put - upper), 0) / X0 * 1e4
    wrong = np.isnan(put).sum() + np.isnan(call).sum()
    crossing = 0.0
    for kind in ("put", "call"):
        levels = pricer.predict_distribution(contracts, kind).host_levels  # type: ignore[arg-type]
        wrong += np.isnan(levels).sum()
        crossing = max(crossing, float(-np.diff(levels, axis=1).min()), float(-levels.min()))
    wrong += sum(int(np.isnan(greek).sum()) for greek in pricer.predict_greeks(contracts))
    report.add(f"{title}NaN over 100,000 contracts", float(wrong), "", at_most=0)
    report.add(f"{title}beyond an arbitrage bound", float(outside.max()), "bp of spot", at_most=0.05)
    report.add(f"{title}a level below the one before it", max(0.0, crossing), "", at_most=0)
    slope, curvature = strike_shape(pricer)
    report.add(f"{title}put falling in strike, at most", slope, "bp of spot", at_most=0.05)
    report.add(f"{title}put concave in strike, at most", curvature, "bp of spot", at_most=0.05)


def strike_shape(pricer: GbmCVNNPricer) -> tuple[float, float]:
    """How far prices fall short of rising and of being convex in strike, 1 % of spot apart, in bp of spot."""
    base = SobolSampler({}, seed=5).sample(1024)
    strikes = np.arange(50.0, 150.5, 1.0)
    table = np.repeat(base, len(strikes), axis=0)
    spot, strike = (EUROPEAN_PUT.schema.column(name) for name in ("X0", "K"))
    table[:, spot], table[:, strike] = 100.0, np.tile(strikes, len(base))
    put = np.asarray(pricer.predict_price(table)).reshape(len(base), -1)
    butterfly = put[:, 2:] - 2 * put[:, 1:-1] + put[:, :-2]
    return max(0.0, float(-np.diff(put, axis=1).min())) * 100, max(0.0, float(-butterfly.min())) * 100


if __name__ == "__main__":
    run(
        f"Pricer accuracy over {CONTRACTS} fresh contracts of the default domain, Monte Carlo labels only",
        measure,
        ("--seeds", {"type": int, "default": 3}),
        ("--seconds", {"type": int, "nargs": "+", "default": [60, 20]}),
        ("--recipe", {"default": "default"}),
        ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "laid over the recipe"}),
        ("--threads", {"type": int, "default": 2}),
        ("--ablation", {"nargs": "*", "choices": [*ABLATIONS], "help": "each choice undone in turn, or those named"}),
    )
