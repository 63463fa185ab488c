from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from smc.problem.oracles import black_scholes as bs
from smc.problem.sobol_sampler import SobolSampler

CONTRACTS = SobolSampler({}, seed=11).sample(64)


def test_the_price_of_a_textbook_contract() -> None:
    # Hull, Options, Futures and Other Derivatives, example 15.6: call 4.76, put 0.81.
    contract = [42, 40, 0.5, 0.10, 0.0, 0.20]
    assert bs.price(contract, "call")[0] == pytest.approx(4.759, abs=1e-3)
    assert bs.price(contract, "put")[0] == pytest.approx(0.808, abs=1e-3)


def test_the_price_is_the_integral_of_the_payoff() -> None:
    for X0, K, T, r, d, v in CONTRACTS[:8]:
        forward, w = X0 * np.exp((r - d) * T), v * np.sqrt(T)

        def payoff(z: float, forward: float = forward, w: float = w, K: float = K) -> float:
            return max(K - forward * np.exp(w * z - w * w / 2), 0.0) * float(stats.norm.pdf(z))

        strike = (np.log(K / forward) + w * w / 2) / w
        value, _ = integrate.quad(payoff, -12, strike)
        assert bs.price([X0, K, T, r, d, v])[0] == pytest.approx(np.exp(-r * T) * value, rel=1e-7, abs=1e-9)


def test_put_call_parity() -> None:
    X0, K, T, r, d, _ = CONTRACTS.T
    parity = bs.price(CONTRACTS, "call") - bs.price(CONTRACTS, "put")
    np.testing.assert_allclose(parity, X0 * np.exp(-d * T) - K * np.exp(-r * T), atol=1e-10)


@pytest.mark.parametrize("kind", ["put", "call"])
def test_greeks_are_the_derivatives_of_the_price(kind: bs.OptionKind) -> None:
    def shifted(column: int, step: float) -> np.ndarray:
        moved = CONTRACTS.copy()
        moved[:, column] += step
        return bs.price(moved, kind)

    def slope(column: int, h: float = 1e-5) -> np.ndarray:
        return (shifted(column, h) - shifted(column, -h)) / (2 * h)

    greeks = bs.greeks(CONTRACTS, kind)
    np.testing.assert_allclose(greeks.delta, slope(0), atol=1e-7)
    np.testing.assert_allclose(greeks.vega, slope(5), atol=1e-5)
    np.testing.assert_allclose(greeks.theta, -slope(2), atol=1e-5)
    np.testing.assert_allclose(greeks.rho, slope(3), atol=1e-5)
    h = 1e-3
    curvature = (shifted(0, h) - 2 * bs.price(CONTRACTS, kind) + shifted(0, -h)) / h**2
    np.testing.assert_allclose(greeks.gamma, curvature, atol=1e-5)


@pytest.mark.parametrize("kind", ["put", "call"])
def test_bin_averages_are_integrals_of_the_quantile_function(kind: bs.OptionKind) -> None:
    bins = 16
    averages = bs.payoff_bin_averages(CONTRACTS[:6], bins, kind)
    fine = (np.arange(bins * 4096) + 0.5) / (bins * 4096)
    quantiles = bs.payoff_quantile(CONTRACTS[:6], fine, kind).reshape(6, bins, -1).mean(axis=2)
    np.testing.assert_allclose(averages, quantiles, rtol=1e-4, atol=5e-3)
    assert np.all(np.diff(averages, axis=1) >= 0)
    np.testing.assert_allclose(averages.mean(axis=1), bs.price(CONTRACTS[:6], kind), rtol=1e-12)


@pytest.mark.parametrize("kind", ["put", "call"])
def test_cvar_is_the_mean_of_the_tail(kind: bs.OptionKind) -> None:
    fine = 0.975 + 0.025 * (np.arange(200_000) + 0.5) / 200_000
    tail = bs.payoff_quantile(CONTRACTS[:6], fine, kind).mean(axis=1)
    np.testing.assert_allclose(bs.cvar(CONTRACTS[:6], 0.975, kind), tail, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("T", "v"), [(0.0, 0.2), (1.0, 0.0), (0.0, 0.0)])
def test_without_time_or_volatility_the_payoff_is_certain(T: float, v: float) -> None:
    rows = np.array([[100, 120, T, 0.05, 0.02, v], [120, 100, T, 0.05, 0.02, v]])
    put = np.maximum(rows[:, 1] * np.exp(-0.05 * T) - rows[:, 0] * np.exp(-0.02 * T), 0)
    np.testing.assert_allclose(bs.price(rows), put, atol=1e-12)
    np.testing.assert_allclose(bs.payoff_bin_averages(rows, 4), np.repeat(put[:, None], 4, 1), atol=1e-12)
    np.testing.assert_allclose(bs.cvar(rows, 0.9), put, atol=1e-12)
    np.testing.assert_allclose(
        bs.cvar(rows, 0.9, "call"), put + rows[:, 0] * np.exp(-0.02 * T) - rows[:, 1] * np.exp(-0.05 * T), atol=1e-12
    )
    greeks = bs.greeks(rows)
    assert all(np.isfinite(values).all() for values in greeks)
    assert greeks.delta[0] == pytest.approx(-np.exp(-0.02 * T))
    assert greeks.gamma.tolist() == [0, 0]
