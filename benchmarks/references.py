"""Values from the literature against the simulation and the oracles: each row of a file, or why it cannot be computed.

.venv/bin/python -m benchmarks.references FILE.csv [--paths N] [--steps N] [--json OUT]

The file has the columns id, process, product, params (`name=value;...`), quantity, value and uncertainty.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import Report, run
from smc.models.numerical import Precision
from smc.problem.oracles import heston as heston_oracle
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.process import Process
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.barrier import DownAndOutCall
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.terminal import TerminalPrice
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

# A scheme's steps may put a simulated value off by this share of the spot, beside three standard errors.
BIAS = 1e-4
# A field is moved by this share of itself for a derivative, on the same random numbers.
SHARE = 1e-3
PATHS = {"cpu": 10_000_000, "cuda": 1_000_000_000}
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}


class NotComputed(Exception):
    """Why a row is not computed."""


@dataclass(frozen=True)
class Row:
    """A row as a problem of the library: what is asked of which contract."""

    problem: Problem
    contract: Mapping[str, float]
    quantity: str

    @property
    def table(self) -> np.ndarray:
        names = self.problem.schema.names
        if missing := [name for name in names if name not in self.contract]:
            raise NotComputed(f"the row does not give {', '.join(missing)}")
        return np.array([[self.contract[name] for name in names]])


def numbers(params: str) -> dict[str, float]:
    found = {}
    for part in params.split(";"):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise NotComputed(f"{part!r} is no number") from None
    return found


def process_of(kind: str, given: dict[str, float]) -> Process:
    if kind == "gbm":
        given["v"] = given.pop("sigma", math.nan)
        return GeometricBrownianMotion()
    if kind == "heston":
        given["xi"] = given.pop("sigma", math.nan)
        return Heston()
    raise NotComputed(f"there is no process {kind} yet")


def product_of(kind: str, given: dict[str, float]) -> Product:
    if kind in ("european_call", "european_put"):
        return EuropeanCall() if kind.endswith("call") else EuropeanPut()
    if kind == "terminal_spot":
        given["K"] = given["X0"]  # which nothing is paid by
        return TerminalPrice()
    if kind.startswith(("asian_arith_disc_", "asian_arith_fixed_")):
        dates = int(given.pop("fixings"))
        first = given.pop("first", given["T"] / dates)
        if abs(first - given["T"] / dates) > 1e-9:
            raise NotComputed("an average whose first date is today: dates here are equally spaced and end at expiry")
        return ArithmeticAsianCall(dates=dates) if "_call" in kind else ArithmeticAsianPut(dates=dates)
    if kind == "barrier_down_out_call_disc":
        if given.pop("rebate", 0.0):
            raise NotComputed("a rebate is not paid yet")
        given["H"] /= given["X0"]
        return DownAndOutCall(dates=int(given.pop("monitorings")))
    raise NotComputed(f"there is no product {kind} yet")


def row_of(line: Mapping[str, str]) -> Row:
    given = numbers(line["params"])
    for name, ours in (("S", "X0"), ("q", "d")):
        if name in given:
            given[ours] = given.pop(name)
    process = process_of(line["process"], given)
    return Row(Problem(process, product_of(line["product"], given)), given, line["quantity"])


def steps_of(row: Row, least: int) -> int:
    """Time steps: as many as the dates; of a scheme with a bias sixteen for each unit of kappa T, 64 a year."""
    dates = row.problem.product.dates
    if row.problem.process.exact:
        return max(1, dates)
    steps = max(least, math.ceil(max(64, 16 * row.contract.get("kappa", 1.0)) * row.contract["T"]))
    return dates * math.ceil(steps / dates) if dates else steps


def simulated(row: Row, paths: int, steps: int, device: str, seed: int) -> tuple[float, float]:
    """The value and its standard error."""
    rows = 8  # of the same contract, which the cores of a CPU share
    table, at_once = np.tile(row.table, (rows, 1)), min(paths, AT_ONCE[device]) // rows
    params = SimulationParams(
        timesteps=steps, network_size=2, batches_per_mc_run=at_once // 2, mc_seed=seed, sampling="pseudorandom",
        dtype=Precision.float32 if device == "cuda" else Precision.float64,
    )  # fmt: skip
    simulation, calls = Simulation(row.problem, params, device), math.ceil(paths / at_once / rows)

    def samples(number: int) -> torch.Tensor:
        if row.quantity == "price" or row.quantity.startswith("quantile"):
            return simulation.payoffs(table, offset=rows * number).double().flatten()
        name = {"delta": "X0", "dprice_dv0": "v0"}.get(row.quantity)
        if name is None:
            raise NotComputed(f"there is no quantity {row.quantity} yet")
        up, down, column = table.copy(), table.copy(), row.problem.schema.column(name)
        up[:, column] *= 1 + SHARE
        down[:, column] *= 1 - SHARE
        first = torch.tensor(rows * number, dtype=torch.int64, device=simulation.device)
        pair = simulation.simulate_pairs(*(torch.from_numpy(t).to(simulation.device) for t in (up, down)), first)
        return (pair[0] - pair[1]).double().flatten() / (2 * SHARE * table[0, column])

    if row.quantity.startswith("quantile_p="):
        p, many = float(row.quantity.partition("=")[2]), min(calls, 16)
        each = torch.stack([_quantile(samples(i), p) for i in range(many)])
        return float(each.mean()), float(each.std()) / math.sqrt(many)
    count, total, squares = 0, 0.0, 0.0
    for number in range(calls):
        values = samples(number)
        count += len(values)
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0) / count)


def _quantile(values: torch.Tensor, p: float) -> torch.Tensor:
    return values.kthvalue(max(1, round(p * len(values)))).values


def exact(row: Row) -> float | None:
    """The oracle's value; None where it does not tell this quantity."""
    contract, heston = row.problem.schema.row(*row.table.T), isinstance(row.problem.process, Heston)
    option: Any = row.problem.product.option
    of: dict[str, Callable[[], np.ndarray]] = {}
    if heston:
        of["delta"] = lambda: heston_oracle.delta(contract, option)
        of["dprice_dv0"] = lambda: heston_oracle.price_by_variance(contract)
        if row.quantity.startswith("quantile_p="):
            of[row.quantity] = lambda: heston_oracle.terminal_quantile(contract, float(row.quantity[11:]))
    oracle = oracle_of(row.problem)
    if oracle is not None:
        of["price"] = lambda: oracle.price(row.table)
    return float(of[row.quantity]()[0]) if row.quantity in of else None


def measure(report: Report, options: argparse.Namespace) -> None:
    if not options.file.is_file():
        raise SystemExit(f"error: there is no file {options.file}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = options.paths or PATHS[device]
    lines = list(csv.DictReader(options.file.read_text().splitlines()))
    print(f"{options.file.name}: {len(lines)} rows, {count:,} paths each on {device}", flush=True)
    for line in lines:
        found = {"id": line["id"], "problem": f"{line['process']} x {line['product']}", "quantity": line["quantity"]}
        try:
            found |= compared(line, count, options.steps, device)
        except NotComputed as reason:
            found["not_computed"] = str(reason)
        report.results.append(found)
        print(told(found), flush=True)
    for what in ("simulation", "oracle"):
        verdicts = [held for held in (row.get(f"{what}_holds") for row in report.results) if held is not None]
        print(f"{what}: {sum(verdicts)} of {len(verdicts)} hold")


def compared(line: Mapping[str, str], paths: int, least: int, device: str) -> dict[str, Any]:
    """One row: the value of the file, the simulated one and the oracle's, and whether each holds."""
    row = row_of(line)
    value, digits = float(line["value"]), float(line["uncertainty"].split()[0])
    steps, spot = steps_of(row, least), row.contract["X0"]
    mean, error = simulated(row, paths, steps, device, int(line["id"]))
    allowed = 3 * math.hypot(error, digits) + (0.0 if row.problem.process.exact else BIAS * spot)
    known = exact(row)
    # Floating point ends at some 1e-13 of the spot, whatever is printed behind it.
    right = None if known is None else abs(known - value) <= max(digits, 1e-12 * spot)
    return {
        "value": value, "simulated": mean, "error": error, "steps": steps,
        "simulation_holds": abs(mean - value) <= allowed, "oracle": known, "oracle_holds": right,
    }  # fmt: skip


def told(found: Mapping[str, Any]) -> str:
    name = f"{found['id']} {found['problem']}, {found['quantity']}"
    if "not_computed" in found:
        return f"{name:<64} not computed: {found['not_computed']}"
    value, known = found["value"], found["oracle"]
    oracle = "no oracle of it"
    if known is not None:
        oracle = f"oracle {known:.13g} {'holds' if found['oracle_holds'] else 'IS OFF'} ({known - value:+.0e})"
    away = (found["simulated"] - value) / found["error"]
    return (
        f"{name:<64} {value:<14.10g} {found['simulated']:.7g} +- {found['error']:.1g} by {found['steps']} steps "
        f"{'holds' if found['simulation_holds'] else 'IS OFF'} ({away:+.1f} s.e.); {oracle}"
    )


if __name__ == "__main__":
    run(
        "Values from the literature, simulated and by the oracles",
        measure,
        ("file", {"type": Path, "metavar": "FILE.csv"}),
        ("--paths", {"type": int, "help": "of each row; 1e7 on a CPU and 1e9 on a GPU if left out"}),
        ("--steps", {"type": int, "default": 64, "help": "least time steps of a scheme with a bias"}),
    )
