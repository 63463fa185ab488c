"""What is exact and what is biased, and by how much, before any network: the figures of docs/numerics.md.

.venv/bin/python -m benchmarks.numerics [--json FILE]
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.reporting import Report, run
from smc.prediction.distribution import PayoffDistribution
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, BlackScholesConfig, SimulationParams
from smc.simulation.levels import quantile_levels, reflected_levels

Array = npt.NDArray[np.float64]

LEVELS = 256
SCHEMES = {
    "pseudo-random": {"sampling": "pseudorandom"},
    "pseudo-random, normalised forwards": {"sampling": "pseudorandom", "normalize_forwards": True},
    "Sobol": {"sampling": "sobol"},
}
# One in the middle of the domain, one of little volatility, one far in the money with much.
REPEATED = np.array([[100, 100, 1, 0.03, 0.01, 0.3], [100, 102, 0.3, 0.02, 0, 0.1], [60, 110, 2, 0.05, 0.03, 0.7]])


def puts(contracts: Array, paths: int, timesteps: int = 16, *, log: bool = True, **changes: object) -> Array:
    """Simulated discounted payoffs in float64. Shapes: (n, 6) -> (n, paths)."""
    normalize = bool(changes.pop("normalize_forwards", False))
    params = SimulationParams(
        timesteps=timesteps, network_size=LEVELS, batches_per_mc_run=paths // LEVELS, mc_seed=3, dtype="float64"
    )
    config = BlackScholesConfig(
        sim_params=params.model_copy(update=changes), simulate_log_return=log, normalize_forwards=normalize
    )
    return np.asarray(BlackScholes(config).discounted_puts(contracts))


def levels_of(payoffs: Array) -> Array:
    return quantile_levels(torch.from_numpy(payoffs), LEVELS).numpy()


def rms(errors: Array) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def noise(report: Report) -> None:
    """How far one contract's labels are from the truth."""
    contracts = SobolSampler({}, seed=4).sample(512)
    basis = 1e4 / contracts[:, 0]
    price, averages = black_scholes.price(contracts), black_scholes.payoff_bin_averages(contracts, LEVELS)
    for name, scheme in SCHEMES.items():
        payoffs = puts(contracts, 4096, **scheme)
        found = np.sqrt(np.square(levels_of(payoffs) - averages).mean(axis=1))
        report.add(f"4,096 paths, {name}: price RMSE", rms((payoffs.mean(axis=1) - price) * basis), "bp of spot")
        report.add(f"4,096 paths, {name}: W2 RMS", rms(found * basis), "bp of spot")


def bias(report: Report) -> None:
    """What is left of the labels' error when it is averaged over repeats, as the network does."""
    repeats, rounds = 512, 8
    for name, scheme in SCHEMES.items():
        price, levels, spread = np.zeros(3), np.zeros((3, LEVELS)), np.zeros(3)
        for k, contract in enumerate(REPEATED):
            payoffs = puts(np.repeat(contract[None], repeats * rounds, axis=0), 4096, timesteps=1, **scheme)
            basis = 1e4 / contract[0]
            exact = black_scholes.payoff_bin_averages(contract, LEVELS)[0]
            levels[k] = (levels_of(payoffs).mean(axis=0) - exact) * basis
            means = payoffs.mean(axis=1)
            price[k] = (means.mean() - exact.mean()) * basis
            spread[k] = means.std() / np.sqrt(len(means)) * basis
        title = f"4,096 paths, {name}, mean of {repeats * rounds:,}"
        report.add(f"{title}: price", rms(price), "bp of spot")
        report.add("  one standard error of that", rms(spread), "bp of spot")
        report.add(f"{title}: W2", rms(levels), "bp of spot")
        report.add("  the highest level, largest", float(np.abs(levels[:, -1]).max()), "bp of spot")


def schemes(report: Report) -> None:
    """The time grid: none matters to the log scheme, Euler converges with order 1."""
    contracts = SobolSampler({}, seed=4).sample(64)
    basis, price = 1e4 / contracts[:, 0], black_scholes.price(contracts)
    for log, steps in ((True, 1), (True, 16), (False, 8), (False, 16), (False, 64)):
        found = puts(contracts, 65_536, steps, log=log, sampling="sobol").mean(axis=1)
        name = "log-Euler" if log else "Euler"
        report.add(f"{name}, {steps} steps, 65,536 Sobol paths: price RMSE", rms((found - price) * basis), "bp of spot")


def grid(report: Report) -> None:
    """What 256 exact levels do not say."""
    contracts = SobolSampler({}, seed=4).sample(4096)
    basis = 1e4 / contracts[:, 0]
    exact = PayoffDistribution(black_scholes.payoff_bin_averages(contracts, LEVELS))
    fine = PayoffDistribution(black_scholes.payoff_bin_averages(contracts, 64 * LEVELS))
    off = np.abs(exact.mean - black_scholes.price(contracts)) * basis
    report.add("256 exact levels: mean, largest error", float(off.max()), "bp of spot")
    narrow = (exact.std - fine.std) * basis
    report.add("256 exact levels: standard deviation, RMS error", rms(narrow), "bp of spot")
    report.add("  that error's share of it", rms(narrow) / rms(fine.std * basis), "")
    for u in (0.95, 0.975, 0.99, 0.995):
        tail = (exact.cvar(u) - black_scholes.cvar(contracts, u)) * basis
        report.add(f"256 exact levels: CVaR{100 * u:g} RMSE", rms(tail), "bp of spot")
        at = (exact.var(u) - black_scholes.payoff_quantile(contracts, u)[:, 0]) * basis
        report.add(f"256 exact levels: VaR{100 * u:g} RMSE", rms(at), "bp of spot")
    X0, K, T, r, d, v = contracts.T
    reflected = np.square(X0 * np.exp((r - d - v**2 / 2) * T)) / K
    mirror = np.stack([X0, reflected, T, r, d, v], axis=1)
    given = (black_scholes.payoff_bin_averages(mirror, LEVELS), K, reflected, np.exp(-r * T), v * np.sqrt(T))
    call = reflected_levels(*(torch.from_numpy(values) for values in given)).numpy()
    wanted = black_scholes.payoff_bin_averages(contracts, LEVELS, "call")
    report.add("call reflected from exact put levels: W2 RMS",
               rms(np.sqrt(np.square(call - wanted).mean(axis=1)) * basis), "bp of spot")  # fmt: skip
    report.add("  its highest level, RMS error", rms(call[:, -1] - wanted[:, -1]) / rms(wanted[:, -1]), "of its size")


def measure(report: Report, options: argparse.Namespace) -> None:
    for part in (noise, bias, schemes, grid):
        part(report)


if __name__ == "__main__":
    run(f"Labels and levels without a network, {LEVELS} levels, float64", measure)
