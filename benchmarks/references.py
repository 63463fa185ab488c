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
from smc.learning.exercise import with_policy
from smc.models.numerical import Precision
from smc.prediction.duality import upper_bound
from smc.problem.oracles import heston as heston_oracle
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem, product_of
from smc.problem.process import Process
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.basket import BasketCall, BasketPut
from smc.problem.products.bermudan import BermudanMaxCall, BermudanOption, BermudanPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.extremes import BestOfCall
from smc.problem.products.geometric_asian import GeometricAsianCall, GeometricAsianPut
from smc.problem.products.spread import SpreadCall, SpreadPut
from smc.problem.products.terminal import TerminalPrice
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

# A scheme's steps may put a simulated value off by this share of the spot, beside three standard errors.
BIAS = 1e-4
# A field is moved by this share of itself for a derivative, on the same random numbers.
SHARE = 1e-3
GREEKS = {"delta": "delta", "dprice_dv0": "vega"}
PATHS = {"cpu": 10_000_000, "cuda": 1_000_000_000}
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}


# Dates on which something is looked at that is looked at all the time, or averaged over time.
ALWAYS = 512
# A policy of exercise is learned for contracts whose numbers are within this share of the row's; of a number that is 0,
# up to so much.
AROUND, AROUND_NOTHING = 0.15, 0.05
# Paths of an upper bound, and inner paths of each.
DUAL = 4096, 512


class NotComputed(Exception):
    """Why a row is not computed."""


@dataclass(frozen=True)
class Row:
    """A row as a problem of the library: what is asked of which contract."""

    problem: Problem
    contract: Mapping[str, float]
    quantity: str

    @property
    def spot(self) -> float:
        return self.contract[self.problem.process.fields[0].name]

    @property
    def table(self) -> np.ndarray:
        names = self.problem.schema.names
        if missing := [name for name in names if name not in self.contract]:
            raise NotComputed(f"the row does not give {', '.join(missing)}")
        return np.array([[self.contract[name] for name in names]])


class Params:
    """The parameters of a row, each of which has to be asked for."""

    def __init__(self, text: str) -> None:
        self._left = dict(part.partition("=")[::2] for part in text.split(";"))

    def text(self, name: str) -> str:
        if name not in self._left:
            raise NotComputed(f"the row does not give {name}")
        return self._left.pop(name)

    def number(self, name: str, otherwise: float | None = None) -> float:
        if otherwise is not None and name not in self._left:
            return otherwise
        (value,) = self._numbers(name, 1)
        return value

    def has(self, name: str) -> bool:
        return name in self._left

    def count(self, name: str) -> int:
        """How many numbers a parameter gives."""
        text = self._left[name]
        times, _, _ = text.rpartition("x")
        return int(times) if times else text.count(",") + 1

    def each(self, name: str, count: int) -> list[float]:
        """One number for each asset: all of them, `4x100`, or one for all."""
        found = self._numbers(name, count)
        return found * count if len(found) == 1 else found

    def _numbers(self, name: str, count: int) -> list[float]:
        text = self.text(name)
        times, _, value = text.rpartition("x")
        try:
            found = [float(value)] * int(times) if times else [float(part) for part in text.split(",")]
        except ValueError:
            raise NotComputed(f"{name}={text} is no number") from None
        if len(found) not in (1, count):
            raise NotComputed(f"{name}={text} gives {len(found)} numbers, and not {count}")
        return found

    def check_all_read(self) -> None:
        if self._left:
            raise NotComputed(f"nothing here reads {', '.join(self._left)}")


Given = tuple[Process, dict[str, float]]


def one_asset(params: Params) -> dict[str, float]:
    names = {"X0": "S", "r": "r", "d": "q", "T": "T"}
    return {ours: params.number(theirs) for ours, theirs in names.items()}


def of_gbm(params: Params) -> Given:
    return GeometricBrownianMotion(), one_asset(params) | {"v": params.number("sigma")}


def of_variance(params: Params) -> dict[str, float]:
    same = {name: params.number(name) for name in ("v0", "kappa", "theta", "rho")}
    return one_asset(params) | same | {"xi": params.number("sigma")}


def of_heston(params: Params) -> Given:
    return Heston(), of_variance(params)


def of_jumps(params: Params) -> dict[str, float]:
    names = {"intensity": "lam", "jump_mean": "muJ", "jump_deviation": "deltaJ"}
    return {ours: params.number(theirs) for ours, theirs in names.items()}


def of_bates(params: Params) -> Given:
    return Bates(), of_variance(params) | of_jumps(params)


def of_merton(params: Params) -> Given:
    """Bates's model with a variance that is certain."""
    contract = one_asset(params)
    if (total := params.number("total_vol", 0.0)) > 0:  # Haug's parameters: jumps have a share of the variance
        intensity, share = params.number("lam"), params.number("gamma_share")
        deviation = total * math.sqrt(share / intensity)
        variance = total * total * (1 - share)
        jumps = {"intensity": intensity, "jump_mean": -deviation * deviation / 2, "jump_deviation": deviation}
    else:
        variance, jumps = params.number("sigma") ** 2, of_jumps(params)
    certain = {"v0": variance, "theta": variance, "kappa": 1.0, "xi": 0.0, "rho": 0.0}
    return Bates(), contract | certain | jumps


def of_cev(params: Params) -> Given:
    contract, beta, text = one_asset(params), params.number("beta"), params.text("sigma_abs")
    factor, _, power = text.partition("*S^")
    try:
        if float(power) != beta:
            raise NotComputed(f"sigma_abs={text} has not the exponent {beta}")
        volatility = float(factor) * contract["X0"] ** (beta - 1)
    except ValueError:
        raise NotComputed(f"sigma_abs={text} is not of the form a*S^b") from None
    return ConstantElasticity(), contract | {"beta": beta, "v": volatility}


def of_several(params: Params) -> Given:
    """Equal correlations, as partial ones: rho / (1 + m rho), given m assets. S, or S1, S2, ...; and the like."""
    count = int(params.number("assets", 0)) or (params.count("S") if params.has("S") else 2)
    process, rho = CorrelatedGBM(n_assets=count), params.number("rho")
    contract = {"r": params.number("r"), "T": params.number("T")}
    for names, theirs in ((process.spots, "S"), (process.dividends, "q"), (process.volatilities, "sigma")):
        if params.has(theirs):
            values = params.each(theirs, count)
        else:
            values = [params.number(f"{theirs}{i}") for i in range(1, count + 1)]
        contract |= dict(zip(names, values, strict=True))
    given = [rho / (1 + m * rho) for i in range(count) for m in range(i)]
    return process, contract | dict(zip(process.rhos, given, strict=True))


def of_rough_heston(params: Params) -> Given:
    contract = of_variance(params)
    return LiftedRoughHeston(hurst=params.number("hurst")), contract


PROCESSES: Mapping[str, Callable[[Params], Given]] = {
    "gbm": of_gbm, "heston": of_heston, "bates": of_bates, "merton": of_merton, "cev_local_vol_beta0.5": of_cev,
    "gbm_corr": of_several, "rough_heston": of_rough_heston,
}  # fmt: skip


def european(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"] = params.number("K")
    return EuropeanCall() if kind.endswith("call") else EuropeanPut()


def terminal(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"] = contract["X0"]  # which nothing is paid by
    return TerminalPrice()


def asian(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"], call = params.number("K"), "_call" in kind
    if "_geom" in kind:
        average = GeometricAsianCall if call else GeometricAsianPut
    else:
        average = ArithmeticAsianCall if call else ArithmeticAsianPut
    if "_cont_" in kind:
        return average(over="time", dates=ALWAYS)
    dates = int(params.number("fixings"))
    each = contract["T"] / dates
    first = params.number("first", each)
    if first == 0:
        return average(over="today and dates", dates=dates - 1)
    if abs(first - each) > 1e-9:
        raise NotComputed("an average whose dates are not equally spaced")
    return average(dates=dates)


def barrier(kind: str, params: Params, contract: dict[str, float]) -> Product:
    """Kinds like barrier_up_out_call_cont."""
    _, way, what, option, watched = kind.split("_")
    contract |= {"K": params.number("K"), "H": params.number("H") / contract["X0"]}
    settings: dict[str, Any] = {"kind": f"{way}_and_{what}_{option}", "rebate": params.number("rebate", 0.0)}
    return product_of(settings | watching(watched, params))


def double_barrier(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract |= {
        "K": params.number("K"),
        "L": params.number("L") / contract["X0"],
        "H": params.number("U") / contract["X0"],
    }
    option, watched = kind.split("_")[-2:]
    return product_of({"kind": f"double_knock_out_{option}"} | watching(watched, params))


def lookback(kind: str, params: Params, contract: dict[str, float]) -> Product:
    """Kinds like lookback_float_call_cont."""
    _, strike, option, watched = kind.split("_")
    highest = (strike == "fixed") == (option == "call")
    contract["M"] = params.number("max" if highest else "min") / contract["X0"]
    if strike == "fixed":
        contract["K"] = params.number("K")
    name = f"{'' if strike == 'fixed' else 'floating_'}lookback_{option}"
    return product_of({"kind": name} | watching(watched, params))


def watching(watched: str, params: Params) -> dict[str, Any]:
    if watched == "cont":
        return {"monitoring": "continuous", "dates": ALWAYS}
    return {"dates": int(params.number("monitorings"))}


def spread(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"] = params.number("K")
    return SpreadCall() if kind.endswith("call") else SpreadPut()


def of_the_best(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"] = params.number("K")
    return BestOfCall(n_assets=sum(name.startswith("X") for name in contract))


def bermudan(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"], dates = params.number("K"), int(params.number("exercises"))
    if "_max_call" in kind:
        return BermudanMaxCall(dates=dates, n_assets=sum(name.startswith("X") for name in contract))
    return BermudanPut(dates=dates)


def note(kind: str, params: Params, contract: dict[str, float]) -> Product:
    """Coupons that are paid with the call, for all dates so far: `coupon=8*k memory` on a nominal of 100."""
    nominal, (coupon, memory) = params.number("notional"), params.text("coupon").split("*k ")
    spot, terms = contract["X0"], params.text("redemption")
    level, low = params.number("call_level") / spot, params.number("knock_in_at_T")
    if memory != "memory" or terms != f"{nominal:g} if S_T>={low:g} else S_T" or nominal != spot:
        raise NotComputed("a note on other terms")
    contract |= {"K": spot, "call_level": level, "coupon_level": level}
    contract |= {"protection": low / spot, "coupon": float(coupon) / nominal}
    dates, years = params.text("obs"), round(contract["T"])
    if dates not in (f"1..{years}", ",".join(str(year) for year in range(1, years + 1))):
        raise NotComputed(f"dates at {dates}")
    return Autocallable(dates=years, nominal=nominal)


def average_basket(kind: str, params: Params, contract: dict[str, float]) -> Product:
    contract["K"], count = params.number("K"), sum(name.startswith("X") for name in contract)
    basket = BasketCall if "_call" in kind else BasketPut
    return basket(n_assets=count, weights=tuple(params.each("w", count)))


PRODUCTS: Mapping[str, Callable[[str, Params, dict[str, float]], Product]] = {
    "european_call": european, "european_put": european, "terminal_spot": terminal, "asian_": asian,
    "barrier_": barrier, "double_barrier_": double_barrier, "lookback_": lookback, "autocallable": note,
    "basket_": average_basket, "spread_": spread, "max_call_": of_the_best, "bermudan_": bermudan,
}  # fmt: skip
"""By what a product's name begins with."""
# How often an average is taken, which its dates say too.
OFTEN = ("_monthly", "_weekly", "_daily", "_annual", "_50_per_year")


def row_of(line: Mapping[str, str]) -> Row:
    kind = line["product"]
    for often in OFTEN:
        kind = kind.removesuffix(often)
    make = next((make for begins, make in PRODUCTS.items() if kind.startswith(begins)), None)
    if line["process"] not in PROCESSES:
        raise NotComputed(f"there is no process {line['process']}")
    if make is None:
        raise NotComputed(f"there is no product {kind}")
    params = Params(line["params"])
    process, contract = PROCESSES[line["process"]](params)
    product = make(kind, params, contract)
    params.check_all_read()
    problem = Problem(process, product)
    if isinstance(product, BermudanOption):
        problem = with_policy(problem, {name: around(value) for name, value in contract.items()})
    return Row(problem, contract, line["quantity"])


def around(value: float) -> dict[str, float]:
    """The bounds of a domain about a contract's number, for which a policy is learned."""
    reach = AROUND * abs(value) or AROUND_NOTHING
    return {"lower": value - (reach if value else 0.0), "upper": value + reach}


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
        p, many = float(row.quantity.partition("=")[2]), max(2, min(calls, 16))
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
    problem, table = row.problem, row.table
    if row.quantity.startswith("quantile_p=") and isinstance(problem.process, Heston):
        p = float(row.quantity.partition("=")[2])
        return float(heston_oracle.terminal_quantile(problem.schema.row(*table.T), p)[0])
    oracle = oracle_of(problem)
    if oracle is None:
        return None
    if row.quantity == "price":
        return float(oracle.price(table)[0])
    if row.quantity in GREEKS and oracle.greeks is not None:
        return float(getattr(oracle.greeks(table), GREEKS[row.quantity])[0])
    return None


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
    value, digits = float(line["value"]), max(float(line["uncertainty"].split()[0]), last_place(line["value"]))
    steps, spot = steps_of(row, least), row.spot
    mean, error = simulated(row, paths, steps, device, int(line["id"]))
    allowed = 3 * math.hypot(error, digits) + (0.0 if row.problem.process.exact else BIAS * spot)
    known = exact(row)
    if isinstance(row.problem.product, BermudanOption):
        return found_between(row, value, digits, mean, error, steps, known)
    # Floating point ends at some 1e-13 of the spot, whatever is printed behind it.
    right = None if known is None else abs(known - value) <= max(digits, 1e-12 * spot)
    return {
        "value": value, "simulated": mean, "error": error, "steps": steps,
        "simulation_holds": abs(mean - value) <= allowed, "oracle": known, "oracle_holds": right,
    }  # fmt: skip


def last_place(text: str) -> float:
    """Half of the last digit that is printed."""
    mantissa, _, power = text.lower().partition("e")
    return 0.5 * 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))


def found_between(
    row: Row, value: float, digits: float, mean: float, error: float, steps: int, known: float | None
) -> dict[str, Any]:
    """Of what is exercised early the simulation is a lower bound, and duality gives an upper one."""
    upper = upper_bound(row.problem, row.table, paths=DUAL[0], inner=DUAL[1])
    top, apart = float(upper.price[0]), float(upper.standard_error[0])
    holds = mean - 3 * math.hypot(error, digits) <= value <= top + 3 * math.hypot(apart, digits)
    right = None if known is None else abs(known - value) <= max(digits, 1e-12 * row.spot)
    return {
        "value": value, "simulated": mean, "error": error, "steps": steps, "simulation_holds": holds, "oracle": known,
        "oracle_holds": right, "upper": top, "upper_error": apart,
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
    if "upper" in found:
        return (
            f"{name:<64} {value:<14.10g} between {found['simulated']:.7g} +- {found['error']:.1g} and "
            f"{found['upper']:.7g} +- {found['upper_error']:.1g} {'holds' if found['simulation_holds'] else 'IS OFF'}; "
            f"{oracle}"
        )
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
