"""What only a GPU can show: the fused kernel, the training step on CuPy, and two trainers on one card."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from smc import black_scholes
from smc.checkpoint import Snapshot, decode, encode, restore
from smc.gbm import BlackScholes, BlackScholesConfig
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig, StepReport, TrainingConfig
from smc.sobol_sampler import SobolSampler
from smc.spectrum import quantile_levels, quantile_spectrum
from smc.spectrum_cuda import put_levels
from smc.storage import AsyncBlockchainModelStore
from tests.conftest import small_config, small_simulation, small_training

pytestmark = pytest.mark.gpu

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
@pytest.mark.parametrize("paths", [32, 96, 1000, 8192, 12_000, 131_072])
@pytest.mark.parametrize(
    "kind", ["log-normal", "narrow", "wide", "tied", "equal", "above the strike", "at zero", "one far out"]
)
def test_levels_by_ranks_are_those_of_a_sort(kind: str, paths: int, dtype: torch.dtype) -> None:
    prices = price_rows(kind, paths, dtype)
    strike = torch.tensor([100, 100, 50, 1e-3, 1e6], dtype=dtype)
    scale = torch.tensor([1, 0.9, 2, 1, 1e-3], dtype=dtype)
    size = paths // 8 if paths % 8 == 0 else paths // 4
    wanted = quantile_levels((strike[:, None] - prices).clamp(min=0) * scale[:, None], size)
    got = put_levels(prices.cuda(), strike.cuda(), scale.cuda(), size)
    torch.testing.assert_close(got.cpu(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-6)
    assert torch.equal(got, put_levels(prices.cuda(), strike.cuda(), scale.cuda(), size))


def test_a_price_that_is_no_number_shows_in_the_levels() -> None:
    prices = torch.full((1, 64), 90.0, device="cuda")
    prices[0, 3] = torch.nan
    one = torch.ones(1, device="cuda")
    assert put_levels(prices, 100 * one, one, 8).isnan().any()


def test_training_on_the_gpu_resumes_bit_for_bit_and_its_checkpoint_opens_on_the_cpu() -> None:
    whole = GbmCVNNPricer(small_config("cuda"))
    whole.train(small_training(60))
    half = GbmCVNNPricer(small_config("cuda"))
    middle: list[GbmCVNNPricerConfig] = []

    def keep(report: StepReport) -> None:
        if report.step == 50:
            middle.append(half.snapshot())

    half.train(small_training(60), logger=keep)
    data = encode(Snapshot.of(middle[0]))
    template = small_config("cuda")
    resumed = GbmCVNNPricer(restore(decode(data), template.cvnn, template))
    resumed.train(small_training(10))
    assert encode(Snapshot.of(resumed.snapshot())) == encode(Snapshot.of(whole.snapshot()))
    on_cpu = GbmCVNNPricer(restore(decode(encode(Snapshot.of(whole.snapshot())))))
    assert on_cpu.device.type == "cpu"
    np.testing.assert_allclose(on_cpu.predict_price(CONTRACTS), whole.predict_price(CONTRACTS), atol=2e-3)
    assert whole.snapshot().torch_cuda_rng_states


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
