"""What only a GPU can show: the fused kernel, the training step on CuPy, and two trainers on one card."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from jobs.mps import CONTROL
from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.errors import NumericsError
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.learning.step import _AHEAD, TrainingStep
from smc.prediction import predictor as prediction
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.reporting.training_tensorboard import TensorBoardLogger
from smc.serving.client import InferenceClient
from smc.simulation.cuda import Kernel
from smc.simulation.engine import BlackScholes, BlackScholesConfig
from smc.simulation.levels import quantile_levels, quantile_spectrum, shortfall_spectrum_and_slope
from smc.simulation.levels_cuda import shortfall_levels
from smc.simulation.skeleton import NORMALS_SOURCE
from smc.storage import AsyncBlockchainModelStore, commit_snapshot
from smc.storage.objects import MemoryObjectStore
from tests.conftest import free_port, small_config, small_simulation, small_training
from tests.event_files import events
from tests.test_snapshots import snapshots_that_differ

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
CONTRACTS = SobolSampler({}, seed=41).sample(64)


def engine(device: str, **changes: Any) -> BlackScholes:
    dynamics = {k: changes.pop(k) for k in ("simulate_log_return", "normalize_forwards") if k in changes}
    return BlackScholes(BlackScholesConfig(sim_params=small_simulation(**changes), **dynamics), device)


def standard_scores(payoffs: torch.Tensor, exact: np.ndarray, exact_error: np.ndarray | float = 0.0) -> np.ndarray:
    mean = payoffs.double().mean(dim=1).cpu().numpy()
    error = payoffs.double().std(dim=1).cpu().numpy() / np.sqrt(payoffs.shape[1])
    return (mean - exact) / np.sqrt(np.maximum(error, 1e-6) ** 2 + np.square(exact_error))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_euler_is_within_four_standard_errors_of_the_closed_form(dtype: str) -> None:
    simulated = engine("cuda", dtype=dtype, network_size=1000, batches_per_mc_run=1000, timesteps=16)
    z = standard_scores(simulated.discounted_puts(CONTRACTS), black_scholes.price(CONTRACTS))
    print(f"{dtype} log-Euler: max |z| {np.abs(z).max():.2f} over {len(z)} contracts")
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_euler_is_within_four_standard_errors_of_an_independent_reference(dtype: str) -> None:
    steps, paths = 8, 1_000_000
    simulated = engine(
        "cuda", dtype=dtype, network_size=1000, batches_per_mc_run=1000, timesteps=steps, simulate_log_return=False
    )
    payoffs = simulated.discounted_puts(CONTRACTS)
    generator = torch.Generator("cuda").manual_seed(2026)
    reference, error = [], []
    for X0, K, T, r, d, v in CONTRACTS:
        price = torch.full((paths,), X0, dtype=torch.float64, device="cuda")
        dt = T / steps
        for _ in range(steps):
            z = torch.randn(paths, dtype=torch.float64, device="cuda", generator=generator)
            price = (price + price * ((r - d) * dt + v * dt**0.5 * z)).abs()
        payoff = np.exp(-r * T) * (K - price).clamp(min=0)
        reference.append(float(payoff.mean()))
        error.append(float(payoff.std()) / paths**0.5)
    z = standard_scores(payoffs, np.array(reference), np.array(error))
    print(f"{dtype} Euler: max |z| {np.abs(z).max():.2f} over {len(z)} contracts")
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("log_return", [True, False])
def test_gpu_and_cpu_agree_in_distribution(dtype: str, log_return: bool) -> None:
    common: dict[str, Any] = {
        "dtype": dtype,
        "network_size": 1000,
        "batches_per_mc_run": 1000,
        "timesteps": 4,
        "simulate_log_return": log_return,
        "sampling": "pseudorandom",
    }
    on_gpu = engine("cuda", mc_seed=1, **common).terminal_prices(CONTRACTS[:1])[0].cpu().numpy()
    on_cpu = engine("cpu", mc_seed=2, **common).terminal_prices(CONTRACTS[:1])[0].numpy()
    assert stats.ks_2samp(on_gpu, on_cpu).pvalue > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("log_return", [True, False])
@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("steps", [1, 6, 7])
def test_gpu_and_cpu_simulate_the_same_paths(dtype: str, log_return: bool, sampling: str, steps: int) -> None:
    common: dict[str, Any] = {
        "dtype": dtype,
        "simulate_log_return": log_return,
        "sampling": sampling,
        "timesteps": steps,
        "skip": 2**32 - 3,
    }
    on_gpu = engine("cuda", **common).terminal_prices(CONTRACTS[:8]).cpu()
    on_cpu = engine("cpu", **common).terminal_prices(CONTRACTS[:8])
    # Absolute too: one Euler step may end next to zero, where nothing is relatively exact.
    rtol, atol = (2e-5, 2e-3) if dtype == "float32" else (1e-11, 1e-10)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=rtol, atol=atol)


def test_a_contract_is_the_same_in_every_batch_and_block_size() -> None:
    whole = engine("cuda").terminal_prices(CONTRACTS)
    assert torch.equal(engine("cuda", threads_per_block=256, skip=10).terminal_prices(CONTRACTS[10:]), whole[10:])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("log_return", [True, False])
def test_the_largest_block_and_more_contracts_than_a_grid_holds(dtype: str, sampling: str, log_return: bool) -> None:
    common: dict[str, Any] = {
        "dtype": dtype, "sampling": sampling, "simulate_log_return": log_return, "timesteps": 2, "network_size": 2,
        "batches_per_mc_run": 1,
    }  # fmt: skip
    contracts = SobolSampler({}, seed=4).sample(70_000)
    whole = engine("cuda", threads_per_block=1024, **common).terminal_prices(contracts)
    some = engine("cuda", threads_per_block=32, skip=65_530, **common).terminal_prices(contracts[65_530:65_540])
    assert torch.equal(whole[65_530:65_540], some)


def test_normalised_forwards_have_the_forward_as_their_mean() -> None:
    X0, _, T, r, d, _ = CONTRACTS.T
    terminal = engine("cuda", normalize_forwards=True, dtype="float64").terminal_prices(CONTRACTS)
    np.testing.assert_allclose(terminal.mean(dim=1).cpu().numpy(), X0 * np.exp((r - d) * T), rtol=1e-12)


def test_the_spectrum_is_the_same_on_both_devices() -> None:
    payoffs = engine("cuda", dtype="float64").discounted_puts(CONTRACTS)
    torch.testing.assert_close(quantile_spectrum(payoffs, 32).cpu(), quantile_spectrum(payoffs.cpu(), 32))


def price_rows(kind: str, paths: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(paths)
    z = torch.randn(5, paths, dtype=torch.float64, generator=generator)
    rows = {
        "log-normal": 100 * torch.exp(0.2 * z),
        "narrow": 100 * torch.exp(1e-6 * z),
        "wide": 100 * torch.exp(3.0 * z),
        "tied": torch.round(100 * torch.exp(0.2 * z)),
        "equal": torch.full_like(z, 80.0),
        "above the strike": 100 + z.abs(),
        "at zero": torch.where(z < 0, 0.0, 100 * torch.exp(z)),
        "one far out": torch.where(torch.arange(paths) == 7, 1e-30, 90 + z.abs()),
    }[kind]
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("paths", "size"),
    [(32, 32), (96, 32), (1000, 125), (8192, 1024), (12_000, 40), (12_000, 12_000), (131_072, 1024), (131_072, 2)],
)
@pytest.mark.parametrize(
    "kind", ["log-normal", "narrow", "wide", "tied", "equal", "above the strike", "at zero", "one far out"]
)
def test_levels_by_ranks_are_those_of_a_sort(kind: str, paths: int, size: int, dtype: torch.dtype) -> None:
    prices = price_rows(kind, paths, dtype)
    strike = torch.tensor([100, 100, 50, 1e-3, 1e6], dtype=dtype)
    scale = torch.tensor([1, 0.9, 2, 1, 1e-3], dtype=dtype)
    wanted = quantile_levels((strike[:, None] - prices).clamp(min=0) * scale[:, None], size)
    (got,) = shortfall_levels(prices.cuda(), strike.cuda(), scale.cuda(), size)
    torch.testing.assert_close(got.cpu(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)
    assert torch.equal(got, shortfall_levels(prices.cuda(), strike.cuda(), scale.cuda(), size)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("paths", "size"), [(96, 32), (8192, 256), (131_072, 256), (2_000_000, 250)])
@pytest.mark.parametrize("normalized", [False, True])
def test_slopes_by_ranks_are_those_of_a_sort(normalized: bool, paths: int, size: int, dtype: torch.dtype) -> None:
    prices = price_rows("log-normal", paths, dtype)
    generator = torch.Generator().manual_seed(3)
    strike = torch.tensor([100, 120, 50, 1e-3, 1e6], dtype=dtype)
    scale = torch.tensor([1, 0.9, 2, 1, 1e-3], dtype=dtype)
    d_scale, a, b = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype)
    wanted = shortfall_spectrum_and_slope(prices, strike, scale, d_scale, (a, b), size, normalized=normalized)
    given = [values.cuda() for values in (prices, strike, scale, d_scale, a, b)]
    got = shortfall_spectrum_and_slope(*given[:4], (given[4], given[5]), size, normalized=normalized)
    for found, value in zip(got, wanted, strict=True):
        size_of_all = value.abs().amax(dim=1, keepdim=True)
        error = (found.cpu() - value).abs() / size_of_all.clamp(min=torch.finfo(dtype).tiny)
        assert float(error.max()) < (2e-5 if dtype == torch.float32 else 1e-12)


def test_a_price_that_is_no_number_shows_in_the_levels() -> None:
    prices = torch.full((1, 64), 90.0, device="cuda")
    prices[0, 3] = torch.nan
    one = torch.ones(1, device="cuda")
    assert shortfall_levels(prices, 100 * one, one, 8).isnan().any()


# Writes every word and every normal that the path kernel would draw, at the same counters.
DUMP = r"""
extern "C" __global__ void dump(
    const u64 stream, const u64 seed, const int paths, const int blocks, u32* words, real* z)
{
    const int path = blockIdx.x * blockDim.x + threadIdx.x, block = blockIdx.y;
    if (path >= paths) return;
    u32 c0 = path, c1 = block, c2 = (u32)stream, c3 = (u32)(stream >> 32);
    philox4x32_10(c0, c1, c2, c3, (u32)seed, (u32)(seed >> 32));
    const u64 at = (u64)block * paths + path;
    if (words) { words[4 * at] = c0; words[4 * at + 1] = c1; words[4 * at + 2] = c2; words[4 * at + 3] = c3; }
    if (z) {
        real n[PER_BLOCK];
        normals(c0, c1, c2, c3, n);
        for (int i = 0; i < PER_BLOCK; ++i) z[((u64)block * PER_BLOCK + i) * paths + path] = n[i];
    }
}
"""


def drawn_normals(stream: int, paths: int, blocks: int, double: bool = False) -> torch.Tensor:
    """Shapes: -> (steps, paths)."""
    kernel = Kernel(NORMALS_SOURCE + DUMP, "dump", DOUBLE=int(double))
    dtype = torch.float64 if double else torch.float32
    z = torch.empty((blocks * (2 if double else 4), paths), dtype=dtype, device="cuda")
    nothing = z.new_empty(0)
    sizes = (np.uint64(stream), np.uint64(7), np.int32(paths), np.int32(blocks))
    kernel((-(-paths // 256), blocks), 256, (*sizes, nothing, z))
    return z


def test_a_billion_normals_have_the_moments_the_distribution_and_the_tails_of_normals() -> None:
    per_call, blocks, calls = 1 << 20, 16, 15
    count = per_call * blocks * 4 * calls
    assert count >= 1_000_000_000
    moments = torch.zeros(6, dtype=torch.float64, device="cuda")
    edges = torch.linspace(-6, 6, 4801, device="cuda", dtype=torch.float32)
    below = torch.zeros(len(edges), dtype=torch.int64, device="cuda")
    tails = dict.fromkeys((3.0, 4.0, 5.0, 5.5, 6.0), 0)
    for call in range(calls):
        z = drawn_normals(call, per_call, blocks).view(-1)
        histogram = torch.bincount(torch.bucketize(z, edges), minlength=len(edges) + 1)
        below += histogram.cumsum(0)[:-1]
        for t in tails:
            tails[t] += int((z.abs() > t).sum())
        power = torch.ones_like(z, dtype=torch.float64)
        for k in range(6):
            power *= z
            moments[k] += power.sum()
    # Standard errors of the first six moments: sqrt((E z^2k - (E z^k)^2) / n).
    exact, variance = np.array([0, 1, 0, 3, 0, 15]), np.array([1, 2, 15, 96, 945, 10170])
    score = (moments.cpu().numpy() / count - exact) / np.sqrt(variance / count)
    distance = np.abs(below.cpu().numpy() / count - stats.norm.cdf(edges.cpu().double().numpy())).max()
    expected = {t: 2 * count * stats.norm.sf(t) for t in tails}
    print(f"{count:,} normals: moments {np.round(score, 2)} standard errors off, KS {distance * count**0.5:.2f}")
    print("tails: " + ", ".join(f"|z| > {t:g}: {tails[t]:,} of {expected[t]:,.1f}" for t in tails))
    assert np.abs(score).max() < 4
    assert distance * np.sqrt(count) < 1.95  # p = 1e-3
    for t, seen in tails.items():
        assert abs(seen - expected[t]) < 4 * np.sqrt(expected[t]) + 1, (t, seen, expected[t])


def test_no_two_contracts_paths_or_steps_share_their_random_words() -> None:
    kernel = Kernel(NORMALS_SOURCE + DUMP, "dump", DOUBLE=0)
    paths, blocks = 4096, 25
    seen = []
    for stream in (0, 1, 2, 31, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40):
        words = torch.empty((blocks * paths, 4), dtype=torch.int32, device="cuda")
        sizes = (np.uint64(stream), np.uint64(7), np.int32(paths), np.int32(blocks))
        kernel((paths // 256, blocks), 256, (*sizes, words, torch.empty(0, device="cuda")))
        seen.append(words.view(torch.int64)[:, 0])
    every = torch.cat(seen)
    assert len(every.unique()) == len(every)


def test_neighbouring_contracts_paths_and_steps_are_uncorrelated() -> None:
    a, b = (drawn_normals(stream, 1 << 20, 25).double() for stream in (4, 5))
    pairs = {
        "contracts": (a, b),
        "paths": (a[:, :-1], a[:, 1:]),
        "steps": (a[:-1], a[1:]),
        "steps of next contracts": (a[:-1], b[1:]),
        "squares of steps": (a[:-1].square() - 1, a[1:].square() - 1),
    }
    for name, (x, y) in pairs.items():
        score = float((x * y).mean() / (x.std() * y.std())) * x.numel() ** 0.5
        assert abs(score) < 4.5, (name, score)


def test_float64_log_euler_is_within_four_standard_errors_of_the_closed_form_at_1e9_paths() -> None:
    contracts = CONTRACTS[:3]
    simulated = engine("cuda", dtype="float64", network_size=1024, batches_per_mc_run=1 << 16, timesteps=4)
    total = torch.zeros(2, len(contracts), dtype=torch.float64, device="cuda")
    for call in range(15):
        for i, contract in enumerate(contracts):
            payoffs = simulated.discounted_puts(contract, offset=3 * call + i)[0]
            total[:, i] += torch.stack([payoffs.sum(), payoffs.square().sum()])
    count = 15 * 1024 * (1 << 16)
    assert count >= 1_000_000_000
    mean, square = (total / count).cpu().numpy()
    z = (mean - black_scholes.price(contracts)) / np.sqrt((square - mean**2) / count)
    print(f"float64 log-Euler, {count:,} paths a contract: {np.round(z, 2)} standard errors off")
    assert np.abs(z).max() < 4


def losses_of(
    training: TrainingConfig, *, eager: bool = False, log_return: bool = True, **changes: Any
) -> tuple[list[float], GbmCVNNPricer]:
    config = small_config("cuda", **changes)
    dynamics = config.cfg.model_copy(update={"simulate_log_return": log_return})
    pricer = GbmCVNNPricer(replace(config, cfg=dynamics))
    found: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        if eager:
            patch.setattr(TrainingStep, "_captured", lambda self: None)
        read = TrainingStep.losses
        patch.setattr(TrainingStep, "losses", lambda self, through: found.extend(new := read(self, through)) or new)
        pricer.train(training)
    return found, pricer


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({}, {}),
        ({"dtype": "float64"}, {}),
        ({"sampling": "sobol"}, {}),
        ({"sampling": "sobol", "log_return": False}, {}),
        ({"buffer_size": 96}, {"fresh_per_batch": 5}),
        ({"dtype": "float64"}, {"differential": 0.5}),
        ({}, {"optimizer": "adam"}),
    ],
    ids=["default", "float64", "sobol", "sobol-euler", "replay", "derivatives", "adam"],
)
def test_the_graphs_losses_are_the_eager_ones(
    changes: dict[str, Any], training: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = small_training(200, **training)
    captured, one = losses_of(config, **changes)
    assert "eagerly" not in caplog.text
    eager, two = losses_of(config, eager=True, **changes)
    assert len(captured) == len(eager) == 200
    np.testing.assert_allclose(captured, eager, rtol=1e-4 if changes.get("dtype") != "float64" else 1e-10)
    np.testing.assert_allclose(one.predict_price(CONTRACTS), two.predict_price(CONTRACTS), rtol=1e-4, atol=1e-4)


LOG_SCHEMES = ("pseudorandom", "sobol", "normalised")


@pytest.mark.parametrize(
    ("dynamics", "training"),
    [
        *itertools.product((*LOG_SCHEMES, "sobol-euler"), ({}, {"fresh_per_batch": 5})),
        *itertools.product(LOG_SCHEMES, ({"fresh_per_batch": 5, "differential": 0.5},)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ahead", [1 << 15, 256])
def test_a_run_resumed_mid_graph_is_bit_for_bit_the_same(
    dynamics: str, training: dict[str, Any], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_AHEAD, "cuda", ahead)  # windows that end in the middle of the run, too

    def config() -> GbmCVNNPricerConfig:
        sampling = "sobol" if dynamics.startswith("sobol") else "pseudorandom"
        built = small_config("cuda", buffer_size=96, sampling=sampling)
        changes = {"simulate_log_return": dynamics != "sobol-euler", "normalize_forwards": dynamics == "normalised"}
        return replace(built, cfg=built.cfg.model_copy(update=changes))

    whole = GbmCVNNPricer(config())
    whole.train(small_training(130, **training))
    first = GbmCVNNPricer(config())
    first.train(small_training(130, **training), logger=lambda report: first.stop())  # told of step 50 at step 100
    second = GbmCVNNPricer(first.snapshot())
    left = 130 - first.progress.step
    assert 0 < left < 130
    second.train(small_training(left, **training))
    assert encode(Snapshot.of(second.snapshot())) == encode(Snapshot.of(whole.snapshot()))


def test_a_model_that_cannot_be_captured_trains_eagerly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Peeking(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, real: torch.Tensor, imag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert float(real.abs().max()) < 1e6  # reads the device: no graph can hold that
            return self.inner(functional.dropout(real, 1e-9), imag)

    plain = GbmCVNNPricer(small_config("cuda"))
    plain.train(small_training(60))
    config = small_config("cuda")
    peeking = GbmCVNNPricer(replace(config, cvnn=Peeking(config.cvnn)))
    result = peeking.train(small_training(60))
    assert caplog.text.count("Training steps run eagerly: it cannot be captured as a CUDA graph (CUDA error: ") == 1
    assert "not permitted when stream is capturing" in caplog.text
    assert result.batches == 60
    torch.randn(3, device="cuda")  # the generator is none the worse
    np.testing.assert_allclose(peeking.predict_price(CONTRACTS), plain.predict_price(CONTRACTS), rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_no_number_ends_training_on_the_gpu() -> None:
    pricer = GbmCVNNPricer(small_config("cuda"))
    with pytest.raises(NumericsError, match="the loss is"):
        pricer.train(small_training(200, learning_rate=1e30, schedule="constant"))
    assert pricer.progress.step <= 60


def test_training_on_the_gpu_resumes_bit_for_bit_and_its_checkpoint_opens_on_the_cpu() -> None:
    whole = GbmCVNNPricer(small_config("cuda"))
    whole.train(small_training(130))
    half = GbmCVNNPricer(small_config("cuda"))
    middle: list[GbmCVNNPricerConfig] = []
    half.train(small_training(130), logger=lambda report: middle.append(half.snapshot()))
    data = encode(Snapshot.of(middle[0]))
    template = small_config("cuda")
    resumed = GbmCVNNPricer(restore(decode(data), template.cvnn, template))
    left = 130 - middle[0].global_step
    assert 0 < left < 130
    resumed.train(small_training(left))
    assert encode(Snapshot.of(resumed.snapshot())) == encode(Snapshot.of(whole.snapshot()))
    on_cpu = GbmCVNNPricer(restore(decode(encode(Snapshot.of(whole.snapshot())))))
    assert on_cpu.device.type == "cpu"
    np.testing.assert_allclose(on_cpu.predict_price(CONTRACTS), whole.predict_price(CONTRACTS), atol=2e-3)
    assert whole.snapshot().torch_cuda_rng_states


@pytest.mark.parametrize("count", [2, 300, 70_000])
def test_prediction_by_graph_equals_prediction_eagerly(count: int, caplog: pytest.LogCaptureFixture) -> None:
    pricer = GbmCVNNPricer(small_config("cuda"))
    pricer.train(small_training(60))
    contracts = SobolSampler({}, seed=3).sample(count)
    contracts[0, 2] = 0.0
    table = torch.from_numpy(contracts).cuda()
    prices, levels = pricer.predict_price(table), pricer.predict_distribution(table).levels
    assert prices.is_cuda
    assert levels.is_cuda
    assert not caplog.text
    np.testing.assert_array_equal(prices.cpu().numpy(), pricer.predict_price(contracts))
    pricer.train(small_training(20))  # in place: the graphs read the new weights

    def answers() -> tuple[np.ndarray, ...]:
        distributions = (pricer.predict_distribution(contracts, kind).levels for kind in ("put", "call"))
        return pricer.predict_price(contracts, "call"), *distributions

    captured = answers()
    pricer.predictor._capturable = False
    eager = answers()
    for one, other in zip(captured[:2], eager[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # The graph pads the last chunk, and a matrix product of another number of rows rounds otherwise. Reflection
    # carries that over by the square of the price, so that a call's highest level shows it.
    whole = count // prediction._CHUNK * prediction._CHUNK
    np.testing.assert_array_equal(captured[2][:whole], eager[2][:whole])
    assert np.abs(captured[2] - eager[2]).mean(axis=1).max() < 0.05
    assert not np.array_equal(prices.cpu().numpy(), pricer.predict_price(contracts))


def test_a_gpu_trained_pricer_prices_within_a_few_basis_points() -> None:
    pricer = GbmCVNNPricer(small_config("cuda", network_size=256, batches_per_mc_run=64))
    pricer.train(TrainingConfig(num_batches=1500, batch_size=64, learning_rate=0.01))
    error = (pricer.predict_price(CONTRACTS) - black_scholes.price(CONTRACTS)) / CONTRACTS[:, 0] * 1e4
    assert np.sqrt(np.square(error).mean()) < 10
    assert np.all(np.diff(pricer.predict_distribution(CONTRACTS).levels, axis=1) >= -1e-9)


@pytest.mark.timeout(300)
def test_a_sweep_of_two_experiments_on_half_a_gpu_each_commits_to_one_ledger(
    on_moto: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    from jobs import sweep

    path = tmp_path / "sweep.yaml"
    path.write_text(
        "recipe: tiny\ndefaults: {num_gpus: 0.5}\nexperiments: {one: , two: {training: {batch_size: 32}}}\n"
    )
    try:
        assert sweep.main([str(path), "--ledger", on_moto]) == 0, capfd.readouterr()
    finally:
        ray.shutdown()
    print(capfd.readouterr().out)

    async def check() -> None:
        async with AsyncBlockchainModelStore(on_moto) as store:
            versions = await store.list_versions()
            assert (await store.verify(blobs=True)).ok
            assert sorted(v.experiment for v in versions) == ["one"] * 3 + ["two"] * 3
            snapshot = decode(await store.load_checkpoint(versions[-1]))
            assert any(name.startswith("rng.cuda.") for name in snapshot.tensors)

    asyncio.run(check())


@pytest.mark.timeout(300)
# Real MPS is begun by nvidia-cuda-mps-control, which comes with NVIDIA's driver and in no package that `make` could
# install. Where a GPU's driver has it, as the H100's that this is run on, nothing is skipped. Where it is missing there
# is no MPS to be a client of: `jobs.node --mps` refuses, and tests/test_jobs/test_mps.py tests that on every machine.
@pytest.mark.skipif(
    shutil.which(CONTROL) is None, reason=f"needs real MPS, whose {CONTROL} only NVIDIA's driver brings: not on PATH"
)
def test_actors_of_a_node_with_mps_are_its_clients_together(tmp_path: Path) -> None:
    import ray

    @ray.remote(num_gpus=0.5, num_cpus=0)
    class OnGpu:
        def pipe(self) -> str | None:
            assert torch.ones(8, device="cuda").sum().item() == 8
            return os.environ.get("CUDA_MPS_PIPE_DIRECTORY")

    port = free_port()
    head = ["ray.scripts.scripts", "start", "--head", f"--port={port}", "--include-dashboard=false", "--num-gpus=1"]
    command = [sys.executable, "-m", "jobs.node", "--mps", "--", sys.executable, "-m", *head, "--block"]
    with (tmp_path / "node.log").open("w") as log:
        node = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while True:
            assert node.poll() is None, (tmp_path / "node.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "node.log").read_text()
            with suppress(ConnectionError):
                ray.init(f"127.0.0.1:{port}", log_to_driver=False)
                break
            time.sleep(0.5)
        actors = [OnGpu.remote() for _ in range(2)]
        pipe, same = ray.get([actor.pipe.remote() for actor in actors])
        assert pipe == same
        assert Path(pipe).is_dir()
        (server,) = asked_of_mps(pipe, "get_server_list")
        assert len(asked_of_mps(pipe, f"get_client_list {server}")) == 2
    finally:
        ray.shutdown()
        node.send_signal(signal.SIGTERM)
        try:
            status = node.wait(60)
        finally:
            node.kill()
    assert status == 0, (tmp_path / "node.log").read_text()
    assert not Path(pipe).exists()


def asked_of_mps(pipe: str, question: str) -> list[str]:
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipe}
    return subprocess.run(
        [CONTROL], env=environment, input=f"{question}\n", capture_output=True, text=True, timeout=20, check=True
    ).stdout.split()


def test_a_thousand_snapshots_equal_synchronous_saves_while_training_goes_on() -> None:
    assert snapshots_that_differ("cuda", 1000) == []


def test_models_are_served_on_the_gpu_and_swapped_beside_predictions(caplog: pytest.LogCaptureFixture) -> None:
    pricer = GbmCVNNPricer(small_config("cuda"))
    pricer.train(small_training(5))
    state = pricer.snapshot()
    contracts = torch.from_numpy(CONTRACTS).cuda()
    objects = MemoryObjectStore()
    prices: dict[int, np.ndarray] = {}
    store = AsyncBlockchainModelStore("memory", objects=objects)

    async def commit() -> int:
        with torch.no_grad():
            next(state.cvnn.parameters()).add_(0.01)
        expected = GbmCVNNPricer(replace(state, cvnn=copy.deepcopy(state.cvnn))).predict_price(contracts)
        async with store.another() as own:
            version = await commit_snapshot(own, state, "m")
        assert isinstance(expected, torch.Tensor)
        prices[version.counter] = expected.cpu().numpy()
        return version.counter

    asyncio.run(commit())
    stop = threading.Event()
    seen: list[tuple[int, np.ndarray]] = []
    with InferenceClient(store, device="cuda", poll_seconds=0.01) as client:

        def ask() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    served = client.current
                    price = served.predict_price(contracts)
                    assert isinstance(price, torch.Tensor)
                    seen.append((served.version.counter, price.cpu().numpy()))

        with ThreadPoolExecutor(2) as threads:
            callers = [threads.submit(ask) for _ in range(2)]
            try:
                for _ in range(20):
                    counter = asyncio.run(commit())
                    deadline = time.monotonic() + 20
                    while client.current.version.counter != counter:
                        assert time.monotonic() < deadline, client.status
                        time.sleep(0.01)
            finally:
                stop.set()
            for caller in callers:
                caller.result()
    assert "eagerly" not in caplog.text
    for counter, price in seen:
        np.testing.assert_allclose(price, prices[counter], rtol=1e-6)
    assert len({counter for counter, _ in seen}) > 15


def test_tensorboard_gets_gradients_of_steps_that_are_graphs(tmp_path: Path) -> None:
    pricer = GbmCVNNPricer(small_config("cuda"))
    with TensorBoardLogger(tmp_path, pricer.model, every=50, histograms_every=100) as logger:
        pricer.train(small_training(500), logger=logger)
    found = events(tmp_path)
    norms = list(found["train/gradient_norm"].values())
    assert len(norms) >= 5
    assert all(np.isfinite(norm) and norm > 0 for norm in norms)
    assert any(name.startswith("gradients/") for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dropout", "batch norm", "spectral norm", "counting", "nested"])
def test_a_captured_prediction_is_of_evaluation_mode_and_changes_nothing(name: str) -> None:
    from tests.test_modules import CONTRACTS as SOME
    from tests.test_modules import MIDDLES, Net, everything, same

    pricer = GbmCVNNPricer(replace(small_config("cuda"), cvnn=Net(MIDDLES[name]()).cuda()))
    pricer.train(small_training(60))
    before, random = everything(pricer.model), torch.cuda.get_rng_state()
    prices = pricer.predict_price(SOME)
    for _ in range(3):
        assert np.array_equal(pricer.predict_price(SOME), prices)
        pricer.predict_distribution(SOME, "call")
        pricer.predict_greeks(SOME)
    assert same(everything(pricer.model), before)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    with torch.no_grad():
        pricer.model.eval()
    assert np.allclose(pricer.predict_price(SOME), prices, rtol=1e-6)


@pytest.mark.gpu
def test_a_logger_on_a_gpu_changes_nothing() -> None:
    def trained(**arguments: Any) -> bytes:
        pricer = GbmCVNNPricer(small_config("cuda"))
        pricer.train(small_training(120), **arguments)
        return encode(Snapshot.of(pricer.snapshot()))

    def draws(report: Any) -> None:
        torch.rand(5, device="cuda")
        torch.rand(5)

    def fails(report: Any) -> None:
        raise OSError("full")

    assert trained(logger=[draws, fails]) == trained()
