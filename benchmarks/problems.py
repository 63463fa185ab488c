"""Paths of every process and product: rates on a GPU and on a CPU, beside a textbook's loop, and both engines compared.

.venv/bin/python -m benchmarks.problems [--rates-only] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import Report, captured, gpu_seconds, run
from smc.models.numerical import Precision
from smc.problem.conditional import is_conditional
from smc.problem.problem import Problem
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM, OneFactorGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import UpAndOutCall
from smc.problem.products.basket import BasketPut
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.simulation import linking, paths
from smc.simulation.levels import payoff_spectrum
from smc.simulation.regression import regressed_prices

STEPS = 100
GBM = GeometricBrownianMotion()
BASKET = BasketPut(n_assets=5)
# The least T path-steps a second on an H100, 256 contracts x 131,072 paths x 100 steps; of several assets each counts.
PROBLEMS = {
    "European put": (Problem(GBM, EuropeanPut()), 1.05),
    "European call": (Problem(GBM, EuropeanCall()), 1.05),
    "digital put": (Problem(GBM, DigitalPut()), None),
    "arithmetic Asian put": (Problem(GBM, ArithmeticAsianPut(dates=STEPS)), 0.90),
    "up-and-out call": (Problem(GBM, UpAndOutCall(dates=STEPS)), 0.95),
    "arithmetic Asian put, 20 dates": (Problem(GBM, ArithmeticAsianPut(dates=20)), None),
    "Heston, European call": (Problem(Heston(), EuropeanCall()), 0.20),
    "Heston, arithmetic Asian put": (Problem(Heston(), ArithmeticAsianPut(dates=STEPS)), None),
    "Heston, up-and-out call": (Problem(Heston(), UpAndOutCall(dates=STEPS)), None),
    "autocallable, 4 dates": (Problem(GBM, Autocallable(dates=4)), None),
    "autocallable, 20 dates": (Problem(GBM, Autocallable(dates=20)), None),
    "Heston, autocallable, 4 dates": (Problem(Heston(), Autocallable(dates=4)), None),
    "Heston, autocallable, 20 dates": (Problem(Heston(), Autocallable(dates=20)), None),
    "up-and-out call, always watched": (Problem(GBM, UpAndOutCall(dates=STEPS, monitoring="continuous")), None),
    "Bates, European call": (Problem(Bates(), EuropeanCall()), 0.15),
    "CEV, European call": (Problem(ConstantElasticity(), EuropeanCall()), 0.40),
    "one factor, basket of 5": (Problem(OneFactorGBM(n_assets=5), BASKET), 0.20),
    "5 correlated assets, basket": (Problem(CorrelatedGBM(n_assets=5), BASKET), 0.20),
    "rough Heston, 5 factors, European call": (Problem(LiftedRoughHeston(), EuropeanCall()), 0.067),
}


def contracts(problem: Problem, count: int) -> np.ndarray:
    """Uniform over the default domain. Shapes: -> (count, fields)."""
    uniform = np.random.default_rng(1).random((count, len(problem.schema)))
    lower, upper = (np.array([getattr(f, end) for f in problem.schema]) for end in ("lower", "upper"))
    return np.asarray(lower + (upper - lower) * uniform)


def on_gpu(report: Report) -> None:
    first = torch.zeros((), dtype=torch.int64, device="cuda")
    european: dict[tuple[str, int], float] = {}  # seconds from paths to spectrum, by process and size
    for name, (problem, bar) in PROBLEMS.items():
        started = time.perf_counter()
        kernel = linking.link(problem, Precision.float32, "pseudorandom", first.device, every_step=True)
        linked = time.perf_counter() - started
        registers = f"{kernel.raw.num_regs} registers, {kernel.raw.local_size_bytes} bytes of local memory"
        for n, count in ((256, 131_072), (32, 8192)):
            table = torch.from_numpy(contracts(problem, n)).cuda()
            work = partial(
                linking.simulate, problem, table, first, seed=1, paths=count, steps=STEPS,
                precision=Precision.float32, sampling="pseudorandom",
            )  # fmt: skip
            seconds = gpu_seconds(captured(work))
            rate = problem.process.assets * n * count * STEPS / seconds / 1e12
            report.add(f"{name}, {n} x {count} x {STEPS}", rate, "T path-steps/s", at_least=bar if n == 256 else None)
            if n == 256:
                instructions(report, name, problem, kernel)
            if is_conditional(problem):
                expected = gpu_seconds(captured(partial(priced, problem, table, first, count)))
                report.add(f"{name}, {n} x {count}: paths and expected payoffs, of the paths", expected / seconds, "x")
            scale = torch.ones(n, device="cuda")

            def chain(work: Callable[[], torch.Tensor] = work, scale: torch.Tensor = scale) -> torch.Tensor:
                return payoff_spectrum(work(), scale, 1024)

            whole = gpu_seconds(captured(chain))
            ratio, key = whole / seconds, (problem.process.kind, n)
            if isinstance(problem.product, EuropeanCall):
                european[key] = whole
            elif key in european and problem.product.dates:
                share = european[key] / whole
                watched = problem.product.continuous
                report.add(f"{name}, {n} x {count}: to the spectrum, of a European call's speed", share, "x",
                           at_least=0.85 if n == 256 and not watched else None)  # fmt: skip
            report.add(f"{name}, {n} x {count}: paths to spectrum, of the paths alone", ratio, "x",
                       at_most=1.6 if n == 256 else None)  # fmt: skip
        print(f"{name}: linked in {linked:.2f} s, {registers}")


def priced(problem: Problem, table: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    (outputs,) = linking.simulate_priced(
        problem, [table], first, seed=1, paths=count, steps=STEPS, precision=Precision.float32, sampling="pseudorandom"
    )
    return regressed_prices(outputs)


def instructions(report: Report, name: str, problem: Problem, kernel: linking.LinkedKernel) -> None:
    """Machine instructions of a step: those of the loop over steps, by the normals that it draws."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        return
    text = subprocess.run([tool, "--dump-sass", kernel.cubin], capture_output=True, text=True, check=True).stdout
    function = text.partition("Function : pseudorandom")[2].partition("Function :")[0]
    lines = [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", function)]
    loops = []
    for at, code in lines:
        jump = re.search(r"BRA\S*\s+(?:\S+,\s*)?`?\(?(0x[0-9a-f]+)", code)
        if jump and int(jump[1], 16) < at:
            loops.append([inner for address, inner in lines if int(jump[1], 16) <= address <= at])
    body = max(loops, key=lambda loop: (sum("MUFU.SIN" in code for code in loop), -len(loop)), default=[])
    blocks = sum("MUFU.SIN" in code for code in body) / 2  # a block makes two pairs of normals
    if not blocks:
        print(f"{name}: no loop over steps is found")
        return
    steps = blocks * 4 / problem.process.normals
    special = sum("MUFU" in code for code in body) / steps
    report.add(f"{name}: instructions a step", len(body) / steps, f"of which {special:.1f} are special functions")


def quantlib(report: Report, ours: float) -> None:
    """Heston's model by QuantLib's own engine: the same scheme, one path after the other, on one core."""
    if importlib.util.find_spec("QuantLib") is None:
        return
    import QuantLib as ql  # noqa: N813  # as its own documentation writes it

    today, count = ql.Date(1, 1, 2026), 20_000
    ql.Settings.instance().evaluationDate = today
    flat = [ql.YieldTermStructureHandle(ql.FlatForward(today, rate, ql.Actual365Fixed())) for rate in (0.03, 0.01)]
    spot = ql.QuoteHandle(ql.SimpleQuote(100.0))
    scheme = ql.HestonProcess.QuadraticExponentialMartingale
    process = ql.HestonProcess(flat[0], flat[1], spot, 0.04, 2.0, 0.05, 0.5, -0.7, scheme)
    exercise = ql.EuropeanExercise(today + ql.Period(1, ql.Years))

    def work() -> None:
        option = ql.VanillaOption(ql.PlainVanillaPayoff(ql.Option.Call, 100.0), exercise)
        engine = ql.MCEuropeanHestonEngine(process, "PseudoRandom", timeSteps=STEPS, requiredSamples=count, seed=1)
        option.setPricingEngine(engine)
        option.NPV()

    theirs = count * STEPS / median(work, 3) / 1e6
    report.add(f"QuantLib {ql.__version__}, Heston, a core", theirs, "M path-steps/s")
    report.add("Heston, European call, a core: of QuantLib's", ours / theirs, "x", at_least=20.0)


def both(report: Report) -> None:
    """The same paths on CPU and GPU, up to the rounding of the elementary functions."""
    for name, (problem, _) in PROBLEMS.items():
        table = contracts(problem, 8)
        for precision in Precision:
            for sampling in ("pseudorandom", "sobol"):
                sizes: dict[str, Any] = {
                    "seed": 5, "paths": 4096, "steps": STEPS, "precision": precision, "sampling": sampling,
                }  # fmt: skip
                here = paths.simulate(problem, table, 7, **sizes)
                first = torch.tensor(7, dtype=torch.int64, device="cuda")
                there = linking.simulate(problem, torch.from_numpy(table).cuda(), first, **sizes).cpu().numpy()
                apart = np.abs(here - there) / table[:, :1]
                # A path beside a barrier or a strike may fall on the other side of it.
                share = float(np.mean(apart > (2e-4 if precision is Precision.float32 else 1e-10)))
                report.add(f"{name}, {precision}, {sampling}: paths that differ", 100 * share, "%", at_most=0.1)


def on_cpu(report: Report) -> None:
    torch.set_num_threads(2)
    count, n = 8192, 64

    def textbook(table: np.ndarray, average: bool) -> None:
        rng = np.random.default_rng(1)
        for X0, K, T, r, d, v in table:
            dt, price, total = T / STEPS, np.full(count, X0), np.zeros(count)
            for _ in range(STEPS):
                price = price * np.exp((r - d - 0.5 * v * v) * dt + v * math.sqrt(dt) * rng.standard_normal(count))
                if average:
                    total += price
            np.maximum(K - (total / STEPS if average else price), 0).mean()

    plain = contracts(PROBLEMS["European put"][0], n)
    base = {average: 4 * median(partial(textbook, plain[: n // 4], average), 3) for average in (False, True)}
    report.add("a textbook's loop, European", n * count * STEPS / base[False] / 1e6, "M path-steps/s")
    for name, (problem, _) in PROBLEMS.items():
        table = contracts(problem, n)
        for sampling in ("pseudorandom", "sobol"):
            started = time.perf_counter()
            work = partial(
                paths.simulate, problem, table, 0, seed=1, paths=count, steps=STEPS, precision=Precision.float32,
                sampling=sampling,
            )  # fmt: skip
            work()
            compiled = time.perf_counter() - started
            seconds = median(work, 7)
            looks = problem.product.dates > 0
            bar = {(False, "pseudorandom"): 5.0, (True, "pseudorandom"): 6.0}.get((looks, str(sampling)))
            if not problem.process.log_normal:  # the textbook's loop is of another model
                rate = n * count * STEPS / seconds / 1e6 / torch.get_num_threads()
                least = 100.0 if sampling == "pseudorandom" else None
                least = least if type(problem.process) is Heston else None
                report.add(f"{name}, {sampling}, a core", rate, "M path-steps/s", at_least=least)
                if name == "Heston, European call" and sampling == "pseudorandom":
                    quantlib(report, rate)
                continue
            report.add(f"{name}, {sampling}", n * count * STEPS / seconds / 1e6, "M path-steps/s")
            report.add(f"{name}, {sampling}, of the textbook's contracts a second", base[looks] / seconds, "x",
                       at_least=bar)  # fmt: skip
            if sampling == "pseudorandom":
                report.add(f"{name}: first call, compilation included where it was not kept", compiled, "s", at_most=15)


def median(work: Callable[[], object], repeats: int) -> float:
    spans = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        spans.append(time.perf_counter() - started)
    return statistics.median(spans)


def measure(report: Report, options: argparse.Namespace) -> None:
    if torch.cuda.is_available():
        on_gpu(report)
        if not options.rates_only:
            both(report)
    else:
        on_cpu(report)


if __name__ == "__main__":
    run(
        "Paths of problems, float32",
        measure,
        ("--rates-only", {"action": "store_true", "help": "on a GPU do not compile for the CPU, to compare"}),
    )
