from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smc.errors import ConfigError
from smc.prediction.distribution import PayoffDistribution
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, BlackScholesConfig
from smc.simulation.levels import (
    bin_weights,
    levels_from_spectrum,
    quantile_levels,
    quantile_spectrum,
    reflected_levels,
    valid_levels,
)
from tests.conftest import small_simulation

samples = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.just(24)), elements=st.floats(0, 200, width=32))


@given(samples, st.sampled_from([2, 3, 8, 12, 24]))
def test_the_spectrum_inverts_to_sorted_block_means(payoffs: np.ndarray, size: int) -> None:
    spectrum = quantile_spectrum(torch.from_numpy(payoffs), size)
    assert spectrum.shape == (len(payoffs), size // 2 + 1)
    expected = np.sort(payoffs, axis=1).reshape(len(payoffs), size, -1).mean(axis=2)
    np.testing.assert_allclose(levels_from_spectrum(spectrum, size).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(spectrum[:, 0].real.numpy(), payoffs.mean(axis=1), atol=1e-10)


@given(samples, samples, st.sampled_from([2, 3, 8, 12, 24]))
def test_weighted_bins_measure_the_wasserstein_distance(a: np.ndarray, b: np.ndarray, size: int) -> None:
    a, b = torch.from_numpy(a[:1]), torch.from_numpy(b[:1])
    difference = quantile_spectrum(a, size) - quantile_spectrum(b, size)
    squared = (difference.abs().square() * bin_weights(size)).sum()
    direct = (quantile_levels(a, size) - quantile_levels(b, size)).square().mean()
    assert float(squared) == pytest.approx(float(direct), rel=1e-9, abs=1e-9)


def test_simulated_levels_are_the_closed_form_bin_averages() -> None:
    contracts = SobolSampler({}, seed=5).sample(16)
    params = small_simulation(network_size=64, batches_per_mc_run=256, dtype="float64")
    payoffs = BlackScholes(BlackScholesConfig(sim_params=params)).discounted_puts(contracts)
    exact = black_scholes.payoff_bin_averages(contracts, 64)
    assert np.abs(quantile_levels(payoffs, 64).numpy() - exact).max() < 0.02


def test_payoffs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 payoffs cannot be averaged into 4"):
        quantile_levels(torch.zeros(1, 10), 4)


levels = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 40)), elements=st.floats(-20, 150))


@settings(max_examples=200)
@given(levels, st.floats(-5, 120), st.floats(1, 100))
def test_any_levels_become_a_valid_distribution_with_the_price_as_mean(
    raw: np.ndarray, price: float, upper: float
) -> None:
    prices, uppers = np.full(len(raw), price), np.full(len(raw), upper)
    valid = PayoffDistribution.from_levels(raw, prices, uppers)
    assert np.all(np.diff(valid.levels, axis=1) >= -1e-9)
    assert valid.levels.min() >= -1e-9
    assert valid.levels.max() <= upper + 1e-9
    np.testing.assert_allclose(valid.mean, np.clip(prices, 0, uppers), atol=1e-8)


def test_statistics_of_an_exact_distribution() -> None:
    contracts = SobolSampler({}, seed=6).sample(24)
    exact = PayoffDistribution(black_scholes.payoff_bin_averages(contracts, 1024))
    np.testing.assert_allclose(exact.mean, black_scholes.price(contracts), rtol=1e-9)
    u = np.array([0.3, 0.9, 0.99])
    np.testing.assert_allclose(exact.quantile(u), black_scholes.payoff_quantile(contracts, u), atol=0.02)
    np.testing.assert_allclose(exact.var(0.9), exact.quantile(0.9)[:, 0])
    np.testing.assert_allclose(exact.cvar(0.975), black_scholes.cvar(contracts, 0.975), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(exact.cvar(0.0), exact.mean)
    np.testing.assert_allclose(exact.cvar(1.0), exact.levels[:, -1])
    np.testing.assert_allclose(exact.expectation(np.square), np.square(exact.std) + np.square(exact.mean))


def test_the_cdf_inverts_the_quantile_function() -> None:
    contracts = np.array([[100, 110, 1.0, 0.02, 0.0, 0.25]])
    exact = PayoffDistribution(black_scholes.payoff_bin_averages(contracts, 512))
    u = np.array([0.5, 0.7, 0.95])
    np.testing.assert_allclose(exact.cdf(exact.quantile(u)[0])[0], u, atol=2e-3)
    atom = 1 - np.exp(0) * float((black_scholes.payoff_quantile(contracts, np.linspace(0, 1, 100001)) > 0).mean())
    assert exact.cdf(0.0)[0, 0] == pytest.approx(atom, abs=2 / 512)
    assert exact.cdf([-1.0, 1e9])[0].tolist() == [0.0, 1.0]


def test_levels_outside_zero_and_one_are_refused() -> None:
    some = PayoffDistribution(np.ones((1, 4)))
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ConfigError, match="probability levels"):
            some.quantile(bad)


def test_a_calls_levels_are_its_puts_reflected() -> None:
    contracts = SobolSampler({}, seed=8).sample(512)
    X0, K, T, r, d, v = contracts.T
    reflected = np.square(X0 * np.exp((r - d - v * v / 2) * T)) / K
    puts = contracts.copy()
    puts[:, 1] = reflected
    terms = (K, reflected, np.exp(-r * T), v * np.sqrt(T))
    levels = reflected_levels(
        torch.from_numpy(black_scholes.payoff_bin_averages(puts, 256)), *(torch.from_numpy(t) for t in terms)
    )
    exact = black_scholes.payoff_bin_averages(contracts, 256, "call")
    w2 = np.sqrt(np.square(levels.numpy() - exact).mean(axis=1)) / X0 * 1e4
    assert np.sqrt(np.square(w2).mean()) < 1.0  # the slice that the strike cuts in two
    assert np.all(np.diff(levels, axis=1) >= 0)


def test_a_payoff_without_bound_is_shifted_onto_its_price() -> None:
    levels = torch.tensor([[-1.0, 0.5, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    price = torch.tensor([1.0, 0.25, 100.0], dtype=torch.float64)
    valid = valid_levels(levels, price, torch.full((3,), torch.inf, dtype=torch.float64))
    torch.testing.assert_close(valid.mean(dim=1), price)
    assert valid.min() >= 0
    torch.testing.assert_close(valid[2], levels[2] + 97.5)
