"""How far a scheme's steps put prices off, over contracts of the default domain, against the problem's oracle.

.venv/bin/python -m benchmarks.bias [--processes KIND ...] [--contracts N] [--paths N] [--between] [--json OUT]

With --between it is what looks at prices between the steps, against four times as many steps.

What is told is the root mean square of the error without the share that simulation noise has in it: of the mean payoff,
and, where process and product allow it, of the conditional estimator, each of whose calls takes 2^14 paths.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import Report, run
from smc.models.numerical import Precision
from smc.problem.conditional import is_conditional
from smc.problem.contracts import resolve_domain
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem, process_of, product_of
from smc.problem.products.european import EuropeanPut
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

KINDS = ("heston", "bates", "cev")
BETWEEN = ("heston", "lifted_rough_heston")
LOOKING = ("floating_lookback_put", "up_and_out_call")
STEPS = (8, 16, 32, 64, 128)
ALL_THE_TIME = {"monitoring": "continuous"}
# So many payoffs are held at a time, and so many paths share the coefficients of a regression.
AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
REGRESSED = 1 << 14
# Paths of a label of the size of the design's, whose error is told too.
LABEL = 1024
# The bars of the default number of steps, in basis points of spot.
PLAIN, CONDITIONAL = 1.0, 0.25


def measure(report: Report, options: argparse.Namespace) -> None:
    for kind in BETWEEN if options.between else ():
        for product in LOOKING:
            looking(report, Problem(process_of({"kind": kind}), product_of(ALL_THE_TIME | {"kind": product})), options)
    for kind in () if options.between else options.processes:
        of_process(report, Problem(process_of({"kind": kind}), EuropeanPut()), options)


def of_process(report: Report, problem: Problem, options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contracts = options.contracts or (4096 if device == "cuda" else 64)
    paths = options.paths or (1 << 22 if device == "cuda" else 1 << 18)
    table = SobolSampler({}, seed=11, schema=problem.schema).sample(contracts)
    oracle = oracle_of(problem)
    assert oracle is not None
    exact, basis = oracle.price(table), 1e4 / table[:, 0]
    usual = problem.default_steps(resolve_domain({}, problem.schema))
    print(f"{problem.title}, {contracts} contracts, {paths:,} paths each on {device}; default steps {usual}")
    for steps in sorted({*STEPS, usual}):
        sizes: dict[str, Any] = {
            "timesteps": steps, "network_size": 2, "mc_seed": steps, "sampling": "pseudorandom",
            "dtype": Precision.float32 if device == "cuda" else Precision.float64,
        }  # fmt: skip
        name = f"{problem.process.kind}, {steps} steps" + (" (default)" if steps == usual else "")
        mean, noise = plain(problem, table, paths, sizes, device)
        error, own = basis * (mean - exact), basis * noise
        report.add(f"{name}: mean payoff", rms(error, own), "bp of spot", at_most=PLAIN if steps == usual else None)
        found = conditional(problem, table, paths, sizes, device)
        if found is None:
            continue
        error, own = basis * (found[0] - exact), basis * found[1]
        bar = CONDITIONAL if steps == usual else None
        report.add(f"{name}: conditional, regressed", rms(error, own), "bp of spot", at_most=bar)
    if is_conditional(problem) and device == "cpu":
        of_labels(report, problem, table, exact)
    report.add(f"{problem.process.kind}: noise of a mean payoff", float(np.sqrt(np.square(basis * noise).mean())), "bp")


def looking(report: Report, problem: Problem, options: argparse.Namespace) -> None:
    """What is looked at all the time: the default number of steps and a third of it against four times as many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = options.paths or (1 << 22 if device == "cuda" else 1 << 16)
    table = SobolSampler({}, seed=11, schema=problem.schema).sample(options.contracts or (512 if paths > 1e6 else 24))
    usual = problem.default_steps(resolve_domain({}, problem.schema))
    found = {}
    for steps in (4 * usual, usual // 3, usual):
        sizes: dict[str, Any] = {"timesteps": steps, "network_size": 2, "mc_seed": steps, "sampling": "pseudorandom"}
        mean, noise = conditional(problem, table, paths, sizes, device) or plain(problem, table, paths, sizes, device)
        found[steps] = 1e4 * mean / table[:, 0], 1e4 * noise / table[:, 0]
    exact, own = found.pop(4 * usual)
    for steps, (mean, noise) in found.items():
        name = f"{problem.name}, all the time, {steps} steps" + (" (default)" if steps == usual else "")
        report.add(name, rms(mean - exact, np.hypot(noise, own)), "bp of spot")


def of_labels(report: Report, problem: Problem, table: np.ndarray, exact: np.ndarray) -> None:
    """How far prices of a label's size are off, by either estimator and either sampling."""
    for sampling in ("pseudorandom", "sobol"):
        params = SimulationParams(
            timesteps=32, network_size=2, batches_per_mc_run=LABEL // 2, mc_seed=1, sampling=sampling
        )
        simulation = Simulation(problem, params, conditional=True)
        mean = simulation.payoffs(table).double().mean(dim=1).numpy()
        (found,) = simulation.simulate_priced([torch.from_numpy(table)], torch.tensor(0))
        for what, prices in (("mean payoff", mean), ("conditional, regressed", found.prices.numpy())):
            error = float(np.sqrt(np.square(1e4 * (prices - exact) / table[:, 0]).mean()))
            report.add(f"{problem.process.kind}, {LABEL:,} paths, {sampling}: {what}", error, "bp of spot")


def plain(problem: Problem, table: np.ndarray, paths: int, sizes: dict[str, Any], device: str) -> Any:
    """Mean payoffs and their standard errors."""
    simulation = Simulation(problem, SimulationParams(batches_per_mc_run=paths // 2, **sizes), device)
    mean, noise, rows = np.empty(len(table)), np.empty(len(table)), max(1, AT_ONCE[device] // paths)
    for start in range(0, len(table), rows):
        part = slice(start, start + rows)
        payoffs = simulation.payoffs(table[part], offset=start)
        mean[part] = payoffs.mean(dim=1, dtype=torch.float64).cpu().numpy()
        noise[part] = (payoffs.double().std(dim=1) / paths**0.5).cpu().numpy()
    return mean, noise


def conditional(problem: Problem, table: np.ndarray, paths: int, sizes: dict[str, Any], device: str) -> Any:
    """Means of regressed prices, and their standard errors; None where there is no such estimator."""
    simulation = Simulation(
        problem, SimulationParams(batches_per_mc_run=REGRESSED // 2, **sizes), device, conditional=True
    )
    if not simulation.conditional:
        return None
    mean, noise, count = np.empty(len(table)), np.empty(len(table)), max(8, paths // REGRESSED // 8)
    for row, contract in enumerate(table):
        many = torch.from_numpy(np.tile(contract, (count, 1))).to(simulation.device)
        first = torch.tensor(row * count, dtype=torch.int64, device=simulation.device)
        (found,) = simulation.simulate_priced([many], first)
        mean[row], noise[row] = float(found.prices.mean()), float(found.prices.std()) / count**0.5
    return mean, noise


def rms(error: np.ndarray, noise: np.ndarray) -> float:
    return float(np.sqrt(max(np.square(error).mean() - np.square(noise).mean(), 0.0)))


if __name__ == "__main__":
    run(
        "Bias of a scheme against the oracle",
        measure,
        (
            "--processes",
            {"nargs": "+", "default": KINDS, "help": f"kinds of processes; {', '.join(KINDS)} if left out"},
        ),
        ("--contracts", {"type": int, "help": "4096 on a GPU and 64 on a CPU if left out"}),
        ("--paths", {"type": int, "help": "of each contract, a power of two"}),
        ("--between", {"action": "store_true", "help": "what looks at prices between the steps"}),
    )
