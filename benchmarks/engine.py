"""Path kernel and target chain on a GPU; the CPU engine beside a textbook's on a CPU.

.venv/bin/python -m benchmarks.engine [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import time
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.reporting import Report, captured, gpu_seconds, run
from smc.models.numerical import Precision
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.products.terminal import TerminalPrice
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, BlackScholesConfig, SimulationParams
from smc.simulation.levels import shortfall_spectrum
from smc.simulation.linking import link

STEPS = 100


def engine(device: str, network_size: int, batches: int, *, log_return: bool = True, **changes: Any) -> BlackScholes:
    params = SimulationParams(
        timesteps=STEPS, network_size=network_size, batches_per_mc_run=batches, mc_seed=1, **changes
    )
    return BlackScholes(BlackScholesConfig(sim_params=params, simulate_log_return=log_return), device)


def chain(
    simulated: BlackScholes, table: torch.Tensor, first: torch.Tensor, strike: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return shortfall_spectrum(simulated.simulate(table, first), strike, scale, 1024)


def on_gpu(report: Report) -> None:
    sampler = SobolSampler({}, seed=1)
    first = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = torch.empty(1 << 28, device="cuda")
    normal = noise.numel() / gpu_seconds(noise.normal_)
    del noise
    report.add("torch normal_, float32", normal / 1e9, "G normals/s")
    for n, batches in ((256, 128), (32, 8)):
        size = f"{n} x {1024 * batches} x {STEPS}"
        table = torch.from_numpy(sampler.sample(n)).cuda()
        path_steps = n * 1024 * batches * STEPS
        times = {}
        strike, scale = table[:, 1].float(), torch.ones(n, device="cuda")
        for scheme, bar in (("log-Euler", 1.1), ("Euler", 1.0)):
            simulated = engine("cuda", 1024, batches, log_return=scheme == "log-Euler")
            times[scheme] = gpu_seconds(captured(partial(simulated.simulate, table, first)))
            rate = path_steps / times[scheme]
            report.add(f"paths, {scheme}, {size}", rate / 1e12, "T path-steps/s", at_least=bar if n == 256 else None)
            if n == 256:
                report.add(f"paths, {scheme}, against normal_", rate / normal, "x", at_least=2.3)
        simulated = engine("cuda", 1024, batches)
        whole = gpu_seconds(captured(partial(chain, simulated, table, first, strike, scale)))
        report.add(f"target chain, {size}", whole * 1e3, "ms", at_most=None if n == 256 else 0.10)
        ratio = whole / times["log-Euler"]
        report.add(f"target chain against the paths alone, {size}", ratio, "x", at_most=2.0 if n == 256 else None)
        prices = simulated.simulate(table, first)
        seconds = gpu_seconds(partial(prices.sort, dim=1), repeats=5)
        report.add(f"torch.sort of the prices alone, {size}", seconds * 1e3, "ms")
    fast = engine("cuda", 1024, 128, sampling="sobol")
    table = torch.from_numpy(sampler.sample(256)).cuda()
    seconds = gpu_seconds(captured(partial(fast.simulate, table, first)))
    report.add("Sobol end points, log-Euler, 256 x 131072", 256 * 131072 / seconds / 1e9, "G paths/s")
    roofline(report)


def roofline(report: Report) -> None:
    """What the loop's instructions allow if one is issued a clock and scheduler, and how near that comes."""
    import cupy

    device = cupy.cuda.Device()
    lanes = device.attributes["MultiProcessorCount"] * 128 * device.attributes["ClockRate"] * 1e3
    table = torch.from_numpy(SobolSampler({}, seed=1).sample(256)).cuda()
    first = torch.zeros((), dtype=torch.int64, device="cuda")
    for log_return, scheme in ((True, "log-Euler"), (False, "Euler")):
        simulated = engine("cuda", 1024, 128, log_return=log_return)
        rate = 256 * 131072 * STEPS / gpu_seconds(captured(partial(simulated.simulate, table, first)))
        try:
            per_step = _instructions_per_step("log" if log_return else "euler")
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            print(f"roofline: no disassembly here ({error!r})")
            return
        bound = lanes / per_step
        report.add(f"{scheme}: instructions a path-step, from the SASS", per_step, "")
        report.add(f"{scheme}: rate they bound at the highest clock", bound / 1e12, "T path-steps/s")
        report.add(f"{scheme}: achieved share of it", 100 * rate / bound, "%")


def _instructions_per_step(scheme: Literal["log", "euler"]) -> float:
    problem = Problem(GeometricBrownianMotion(scheme=scheme), TerminalPrice())
    kernel = link(problem, Precision.float32, "pseudorandom", torch.device("cuda", 0), every_step=False)
    sass = ["cuobjdump", "-sass", kernel.cubin]
    out = subprocess.run(sass, capture_output=True, text=True, check=True).stdout
    body = out[out.index("Function : pseudorandom") :].split("Function :")[1]
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
    address = [int(a, 16) for a, _ in lines]
    loops = []
    for i, (_, text) in enumerate(lines):
        target = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address[i]:
            loops.append((address.index(int(target[1], 16)), i))
    start, end = max(loops, key=lambda loop: sum("MUFU.LG2" in t for _, t in lines[loop[0] : loop[1]]))
    inner = [text for _, text in lines[start : end + 1]]
    if os.environ.get("SMC_SHOW_SASS"):
        print("\n".join(inner))
    return len(inner) / (2 * sum("MUFU.LG2" in text for text in inner))


def textbook(contract: np.ndarray, paths: int, rng: np.random.Generator) -> np.ndarray:
    """One contract as a textbook simulates it: a matrix of normals, a loop over the steps, a sort."""
    X0, K, T, r, d, v = contract
    dt = T / STEPS
    log_price = np.full(paths, np.log(X0))
    for _ in range(STEPS):
        log_price += (r - d - 0.5 * v * v) * dt + v * np.sqrt(dt) * rng.standard_normal(paths)
    payoff = np.exp(-r * T) * np.maximum(K - np.exp(log_price), 0.0)
    return np.fft.rfft(np.sort(payoff).reshape(1024, -1).mean(axis=1), norm="forward")


def on_cpu(report: Report) -> None:
    contracts = SobolSampler({}, seed=1).sample(32)
    table, first = torch.from_numpy(contracts), torch.zeros((), dtype=torch.int64)
    strike, scale = table[:, 1].float(), torch.exp(-table[:, 3] * table[:, 2]).float()
    engines = {name: engine("cpu", 1024, 8, sampling=name) for name in ("pseudorandom", "sobol")}
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {"textbook": [], "pseudorandom": [], "sobol": []}
    for _ in range(7):
        started = time.perf_counter()
        for contract in contracts[:8]:
            textbook(contract, 8192, rng)
        seconds["textbook"].append((time.perf_counter() - started) / 8)
        for name, simulated in engines.items():
            started = time.perf_counter()
            shortfall_spectrum(simulated.simulate(table, first), strike, scale, 1024)
            seconds[name].append((time.perf_counter() - started) / 32)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    report.add(
        "CPU, default (Sobol) sampling: contracts/s against a textbook's", median["textbook"] / median["sobol"], "x",
        at_least=3,
    )  # fmt: skip
    report.add("CPU, pseudo-random: contracts/s against a textbook's", median["textbook"] / median["pseudorandom"], "x")


def measure(report: Report, options: argparse.Namespace) -> None:
    if torch.cuda.is_available():
        on_gpu(report)
    if not options.gpu_only:
        on_cpu(report)


if __name__ == "__main__":
    run(
        "Simulation and target chain, 1024 levels, 100 steps, float32",
        measure,
        ("--gpu-only", {"action": "store_true", "help": "leave the CPU's part out"}),
    )
