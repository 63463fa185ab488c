"""How far a scheme's steps put prices off, over contracts of the default domain, against the problem's oracle.

.venv/bin/python -m benchmarks.bias [--contracts N] [--paths N] [--json OUT]

What is told is the root mean square of the error without the share that simulation noise has in it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.reporting import Report, run
from smc.models.numerical import Precision
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.processes.heston import Heston
from smc.problem.products.european import EuropeanPut
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

PROBLEM = Problem(Heston(), EuropeanPut())
STEPS = (8, 16, 32, 64, 128)
# So many payoffs are held at a time.
AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}
# Errors are told apart by these ranges of kappa T.
CLASSES = ((0.0, 1.0), (1.0, 4.0), (4.0, 12.0))


def measure(report: Report, options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contracts = options.contracts or (4096 if device == "cuda" else 64)
    paths = options.paths or (1 << 23 if device == "cuda" else 1 << 18)
    table = SobolSampler({}, seed=11, schema=PROBLEM.schema).sample(contracts)
    oracle = oracle_of(PROBLEM)
    assert oracle is not None
    exact, spot = oracle.price(table), table[:, 0]
    columns = PROBLEM.schema.row(*table.T)
    speed = columns.kappa * columns.T
    print(f"{PROBLEM.title}, {contracts} contracts, {paths:,} paths each on {device}")
    for steps in STEPS:
        params = SimulationParams(
            timesteps=steps, network_size=2, batches_per_mc_run=paths // 2, mc_seed=steps, sampling="pseudorandom",
            dtype=Precision.float32 if device == "cuda" else Precision.float64,
        )  # fmt: skip
        simulation, rows = Simulation(PROBLEM, params, device), max(1, AT_ONCE[device] // paths)
        mean, noise = np.empty(contracts), np.empty(contracts)
        for start in range(0, contracts, rows):
            part = slice(start, start + rows)
            payoffs = simulation.payoffs(table[part], offset=start).double()
            mean[part] = payoffs.mean(dim=1).cpu().numpy()
            noise[part] = (payoffs.std(dim=1) / paths**0.5).cpu().numpy()
        error, own = 1e4 * (mean - exact) / spot, 1e4 * noise / spot
        report.add(f"{steps} steps", rms(error, own), "bp of spot")
        for low, high in CLASSES:
            chosen = (speed >= low) & (speed < high)
            report.add(
                f"{steps} steps, kappa T from {low:g} to {high:g}", rms(error[chosen], own[chosen]), "bp of spot"
            )
    report.add("noise of a price", float(np.sqrt(np.square(own).mean())), "bp of spot")


def rms(error: np.ndarray, noise: np.ndarray) -> float:
    return float(np.sqrt(max(np.square(error).mean() - np.square(noise).mean(), 0.0)))


if __name__ == "__main__":
    run(
        "Bias of a scheme against the oracle",
        measure,
        ("--contracts", {"type": int, "help": "4096 on a GPU and 64 on a CPU if left out"}),
        ("--paths", {"type": int, "help": "of each contract, a power of two"}),
    )
