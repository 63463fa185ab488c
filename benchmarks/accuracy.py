"""Accuracy of a trained pricer against the closed form, on fresh contracts of the default domain.

.venv/bin/python -m benchmarks.accuracy [--seeds 3] [--batches 6000] [--json FILE]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.reporting import Report, run
from jobs.recipes import make_experiment
from smc import black_scholes
from smc.gbm_trainer import GbmCVNNPricer
from smc.sobol_sampler import SobolSampler

CONTRACTS = 8192


def measure(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    fresh = SobolSampler({}, seed=20_261_123).sample(CONTRACTS)
    basis = 1e4 / fresh[:, 0]
    for seed in range(options.seeds):
        experiment = make_experiment(
            "accuracy",
            {
                "simulation": {"sim_params": {"mc_seed": seed}},
                "network": {"seed": seed},
                "training": {"num_batches": options.batches, "batch_size": options.batch_size},
            },
        )
        pricer = GbmCVNNPricer(experiment.fresh())
        started = time.perf_counter()
        pricer.train(experiment.training)
        seconds = time.perf_counter() - started
        error = np.abs(pricer.predict_price(fresh) - black_scholes.price(fresh)) * basis
        distribution = pricer.predict_distribution(fresh)
        exact = black_scholes.payoff_bin_averages(fresh, distribution.levels.shape[1])
        w2 = np.sqrt(np.square(distribution.levels - exact).mean(axis=1)) * basis
        tail = (distribution.cvar(0.975) - black_scholes.cvar(fresh, 0.975)) * basis
        delta = pricer.predict_greeks(fresh).delta - black_scholes.greeks(fresh).delta

        def rms(values: np.ndarray) -> float:
            return float(np.sqrt(np.square(values).mean()))

        name = f"seed {seed}, {options.batches} batches of {options.batch_size}: "
        report.add(name + "price RMSE", rms(error), "bp of spot", at_most=2.0)
        report.add(name + "price maximum", float(error.max()), "bp of spot")
        report.add(name + "W2", rms(w2), "bp of spot")
        report.add(name + "CVaR97.5", rms(tail), "bp of spot")
        report.add(name + "delta RMSE", rms(delta), "")
        report.add(name + "training", seconds, "s")


if __name__ == "__main__":
    run(
        f"Pricer accuracy over {CONTRACTS} fresh contracts of DEFAULT_DOMAIN, Monte Carlo labels only",
        measure,
        ("--seeds", {"type": int, "default": 3}),
        ("--batches", {"type": int, "default": 6000}),
        ("--batch-size", {"type": int, "default": 32}),
        ("--threads", {"type": int, "default": 1}),
    )
