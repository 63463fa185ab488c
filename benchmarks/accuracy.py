"""Accuracy of trained pricers on fresh contracts of the default domain, problem by problem, Monte Carlo labels alone.

.venv/bin/python -m benchmarks.accuracy [--problem heston/european_put correlated_gbm:assets=5/basket_put ...]
    [--seeds 3] [--seconds 60 600] [--recipe gpu] [--json FILE]
.venv/bin/python -m benchmarks.accuracy --ablation --seconds 60

A problem is PROCESS/PRODUCT, each a kind with its settings, if any. Every figure is the worst of the seeds. How many
batches fit into 85 % of the seconds is measured first, by training another pricer for a while; the schedule is laid
over that many, and what training then took is a row of the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import Report, run
from jobs.recipes import make_experiment, overlaid, read_yaml
from jobs.train import setting
from smc.learning.error_bars import LEVEL
from smc.learning.experiment import Experiment
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import Measure, coverage, evaluate
from smc.prediction.soundness import soundness
from smc.problem.sobol_sampler import SobolSampler

CONTRACTS = 4096
CHECKED = 100_000
PUT = "gbm/european_put"
# The standard error of so many paths is the floor that errors are compared with.
FLOOR_PATHS = 1e7

Bars = Mapping[str, float]
# At most, by device, seconds and problem. Prices in bp of spot, or of what the product names.
BARS: Mapping[tuple[str, int], Mapping[str, Bars]] = {
    ("cpu", 60): {
        PUT: {"price rmse": 0.08, "price maximum": 2, "W2, put rmse": 12, "CVaR97.5, put rmse": 3, "delta rmse": 7e-4},
        "heston/european_put": {
            "price rmse": 0.2, "price maximum": 4, "implied volatility rmse": 1.3, "W2, put rmse": 9,
        },
        "bates/european_put": {"price rmse": 0.3},
        "gbm/arithmetic_asian_put": {"price rmse": 0.05},
        "gbm/arithmetic_asian_call": {"price rmse": 0.05},
        "gbm/up_and_out_call": {"price rmse": 0.22, "W2 rmse": 20},
        "heston/up_and_out_call": {"price rmse": 0.8},
        "gbm/digital_put": {"price rmse": 3},
        "gbm/cliquet": {"price rmse": 2},
        "gbm/autocallable": {"price rmse": 2},
        "correlated_gbm:assets=5/basket_put": {"price rmse": 0.5},
    },
    ("cpu", 600): {
        "heston/european_put": {"price rmse": 0.08, "price maximum": 1.2, "implied volatility rmse": 0.6},
        "gbm/up_and_out_call": {"price rmse": 0.06},
    },
    ("cuda", 60): {
        PUT: {
            "price rmse": 0.08, "price maximum": 1.5, "W2, put rmse": 5, "CVaR97.5, put rmse": 2, "delta rmse": 4e-4,
            "gamma of its mean": 0.01, "vega of its mean": 0.01, "theta of its mean": 0.02, "rho of its mean": 0.02,
        },
        "heston/european_put": {
            "price rmse": 0.06, "price maximum": 1, "implied volatility rmse": 0.5, "delta rmse": 1e-4,
        },
        "gbm/arithmetic_asian_put": {"price rmse": 0.03},
        "gbm/arithmetic_asian_call": {"price rmse": 0.03},
        "gbm/up_and_out_call": {"price rmse": 0.05},
        "gbm/autocallable": {"price rmse": 0.3},
    },
    ("cuda", 600): {"heston/european_put": {"price rmse": 0.03}},
}  # fmt: skip
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
    """Train each problem with each seed for each time, and print what came of it."""
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {}
    for text in options.set:
        given = overlaid(given, setting(text))
    ablation = options.ablation is not None
    variants = {name: ABLATIONS[name] for name in options.ablation or ABLATIONS} if ablation else {"": {}}
    for problem in options.problem:
        for name, changes in variants.items():
            settings = overlaid(overlaid(problem_settings(problem), given), changes)
            device = "cuda" if make_experiment("accuracy", settings, recipe=options.recipe).num_gpus else "cpu"
            for seconds in options.seconds:
                bars = {} if ablation else BARS.get((device, seconds), {}).get(problem, {})
                title = f"{problem}{name and f', {name}'}, {seconds} s: "
                worst: dict[str, tuple[float, str]] = {}
                for seed in range(options.seeds):
                    pricer, batches, took = trained(settings, seconds, seed, options.recipe)
                    rows = {**dict(shown(pricer)), "training": (took, f"s, {batches:,} batches")}
                    if not ablation:
                        rows |= dict(must_hold(pricer))
                    if options.each and options.seeds > 1:
                        for row, (value, unit) in rows.items():
                            report.add(f"{title}seed {seed}: {row}", value, unit)
                    for row, found in rows.items():
                        worst[row] = max(worst.get(row, found), found, key=lambda each: badness(row, each[0]))
                limits = {**bars, "training": float(seconds)} if bars else {}
                for row, (value, unit) in worst.items():
                    report.add(f"{title}{row}", value, unit, at_most=limits.get(row, HOLD.get(row)))


def badness(row: str, value: float) -> float:
    """What the worst of several is judged by: error bars may hold too few contracts, or too many."""
    return abs(value - LEVEL) if row.startswith("within error bars") else value


def problem_settings(text: str) -> dict[str, Any]:
    """PROCESS/PRODUCT, each KIND or KIND:SETTING=VALUE,..., as settings of an experiment; those of the put are none."""
    if text == PUT:
        return {}
    parts = text.split("/")
    if len(parts) != 2:
        raise SystemExit(f"--problem {text!r}: expected PROCESS/PRODUCT, like heston/european_put")
    found = {}
    for role, part in zip(("process", "product"), parts, strict=True):
        kind, _, more = part.partition(":")
        pairs = (pair.partition("=") for pair in more.split(",") if pair)
        found[role] = {"kind": kind, **{key: read_yaml(value) for key, _, value in pairs}}
    return {"simulation": found}


def shown(pricer: GbmCVNNPricer) -> Iterator[tuple[str, tuple[float, str]]]:
    """What is printed of a pricer's errors: names, values and units."""
    fresh = SobolSampler(pricer.domain, seed=20_261_123, schema=pricer.problem.schema).sample(CONTRACTS)
    held = coverage(pricer, fresh)
    if held is not None:
        yield "within error bars of 95 %", (held.share, f"of {held.count:,} contracts")
        yield "error bar, median", (held.width, held.unit)
    for name, found in evaluate(pricer, fresh).items():
        yield f"{name} rmse", (found.rmse, unit_of(found))
        if name == "price":
            yield f"{name} maximum", (found.maximum, unit_of(found))
            yield f"{name} rmse over the floor", (found.rmse / floor(pricer, fresh[: found.count]), "")
        elif found.relative is not None:
            yield f"{name} of its mean", (found.relative, "")


def unit_of(found: Measure) -> str:
    """The unit of a measure, and what it was compared with if that is no oracle."""
    return found.unit if found.noise is None else f"{found.unit}, {found.compared}"


def floor(pricer: GbmCVNNPricer, contracts: np.ndarray) -> float:
    """Root mean square of the standard errors of 1e7 paths, in basis points. Payoffs deviate as learnt."""
    levels = pricer.predict_distribution(contracts).host_levels
    law = pricer.problem.law(torch.from_numpy(contracts))
    errors = levels.std(axis=1) / FLOOR_PATHS**0.5 / pricer.problem.product.notionals(law).numpy() * 1e4
    return float(np.sqrt(np.square(errors).mean()))


# What must hold whatever was learnt: names, and the most that is allowed.
HOLD = {
    f"NaN over {CHECKED:,} contracts": 0.0,
    "price beyond a bound": 0.05,
    "level beyond a bound": 0.05,
    "a level below the one before it": 0.0,
    "option falling in strike, at most": 0.05,
    "option concave in strike, at most": 0.05,
}


def must_hold(pricer: GbmCVNNPricer) -> Iterator[tuple[str, tuple[float, str]]]:
    """What must hold for any contract, over many random ones and the corners of the domain."""
    found = soundness(pricer, CHECKED)
    values = (float(found.wrong), found.price_beyond, found.level_beyond, found.disorder)
    for name, value, unit in zip(HOLD, values, ("", "bp", "bp", ""), strict=False):
        yield name, (value, unit)
    if pricer.problem.product.kind in ("european_put", "european_call"):
        slope, curvature = strike_shape(pricer)
        yield "option falling in strike, at most", (slope, "bp of spot")
        yield "option concave in strike, at most", (curvature, "bp of spot")


def strike_shape(pricer: GbmCVNNPricer) -> tuple[float, float]:
    """How far prices fall short of being monotone and convex in strike, 1 % of spot apart, in bp of spot.

    Puts rise with the strike and calls fall. The option that follows by parity is looked at, too.
    """
    schema = pricer.problem.schema
    base = SobolSampler(pricer.domain, seed=5, schema=schema).sample(1024)
    strikes = np.arange(50.0, 150.5, 1.0)
    table = np.repeat(base, len(strikes), axis=0)
    table[:, schema.column("X0")], table[:, schema.column("K")] = 100.0, np.tile(strikes, len(base))
    slope = curvature = 0.0
    for kind in pricer.predictor.price_kinds:
        way = -1 if (pricer.problem.product.option if kind == "learnt" else kind) == "call" else 1
        price = np.asarray(pricer.predict_price(table, kind)).reshape(len(base), -1)
        butterfly = price[:, 2:] - 2 * price[:, 1:-1] + price[:, :-2]
        slope = max(slope, float(-(way * np.diff(price, axis=1)).min()))
        curvature = max(curvature, float(-butterfly.min()))
    return slope * 100, curvature * 100


if __name__ == "__main__":
    run(
        f"Pricer accuracy over {CONTRACTS} fresh contracts of the default domain, Monte Carlo labels only",
        measure,
        ("--problem", {"nargs": "+", "default": [PUT], "metavar": "PROCESS/PRODUCT"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--seconds", {"type": int, "nargs": "+", "default": [60]}),
        ("--recipe", {"default": "default"}),
        ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "laid over the recipe"}),
        ("--threads", {"type": int, "default": 2}),
        ("--each", {"action": "store_true", "help": "print what each seed gave, not the worst alone"}),
        ("--ablation", {"nargs": "*", "choices": [*ABLATIONS], "help": "each choice undone in turn, or those named"}),
    )
