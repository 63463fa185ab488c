from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from smc.errors import ConfigError
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, BlackScholesConfig, SimulationParams
from smc.simulation.levels import quantile_spectrum
from tests.conftest import small_simulation

CONTRACTS = SobolSampler({}, seed=21).sample(32)


def engine(**changes: Any) -> BlackScholes:
    dynamics = {k: changes.pop(k) for k in ("simulate_log_return", "normalize_forwards") if k in changes}
    return BlackScholes(BlackScholesConfig(sim_params=small_simulation(**changes), **dynamics))


def exact_euler_mean(contracts: np.ndarray, steps: int) -> np.ndarray:
    """Mean of the Euler scheme, exact while no path crosses zero."""
    X0, _, T, r, d, _ = contracts.T
    return np.asarray(X0 * (1 + (r - d) * T / steps) ** steps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
def test_log_euler_prices_agree_with_the_closed_form(dtype: str, sampling: str) -> None:
    simulated = engine(dtype=dtype, sampling=sampling, network_size=256, batches_per_mc_run=64, timesteps=6)
    payoffs = simulated.discounted_puts(CONTRACTS).double()
    # A put so far out of the money that no path pays has no standard error to speak of.
    standard_error = np.maximum(payoffs.std(dim=1).numpy() / np.sqrt(payoffs.shape[1]), 1e-5)
    z = (payoffs.mean(dim=1).numpy() - black_scholes.price(CONTRACTS)) / standard_error
    assert np.abs(z).max() < 4
    if sampling == "sobol":  # a pseudo-random estimate would be 10 bp off
        error = payoffs.mean(dim=1).numpy() - black_scholes.price(CONTRACTS)
        assert np.sqrt(np.square(error / CONTRACTS[:, 0]).mean()) < 0.02e-4


@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_euler_has_the_bias_of_euler(sampling: str, dtype: str) -> None:
    simulated = engine(
        simulate_log_return=False, timesteps=4, network_size=256, batches_per_mc_run=64, sampling=sampling, dtype=dtype
    )
    terminal = simulated.terminal_prices(CONTRACTS).double()
    assert float(terminal.min()) >= 0
    standard_error = terminal.std(dim=1).numpy() / np.sqrt(terminal.shape[1])
    z = (terminal.mean(dim=1).numpy() - exact_euler_mean(CONTRACTS, 4)) / standard_error
    assert np.abs(z).max() < 4


def test_more_euler_steps_come_closer_to_the_closed_form() -> None:
    def bias(steps: int) -> float:
        simulated = engine(
            simulate_log_return=False, timesteps=steps, network_size=256, batches_per_mc_run=16, sampling="sobol"
        )
        error = simulated.discounted_puts(CONTRACTS).double().mean(dim=1).numpy() - black_scholes.price(CONTRACTS)
        return float(np.abs(error / CONTRACTS[:, 0]).mean())

    assert bias(32) < 0.3 * bias(2)


def test_normalised_forwards_have_the_forward_as_their_mean() -> None:
    simulated = engine(normalize_forwards=True, dtype="float64")
    assert simulated.sampling == "pseudorandom"
    X0, _, T, r, d, _ = CONTRACTS.T
    terminal = simulated.terminal_prices(CONTRACTS)
    np.testing.assert_allclose(terminal.mean(dim=1).numpy(), X0 * np.exp((r - d) * T), rtol=1e-12)
    plain = engine(dtype="float64", sampling="pseudorandom").terminal_prices(CONTRACTS)
    np.testing.assert_allclose((terminal / plain).std(dim=1).numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("log_return", [True, False])
@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_contract_is_the_same_in_every_batch_bit_for_bit(log_return: bool, sampling: str, dtype: str) -> None:
    simulated = engine(
        simulate_log_return=log_return, sampling=sampling, dtype=dtype, timesteps=7, batches_per_mc_run=5
    )
    whole = quantile_spectrum(simulated.discounted_puts(CONTRACTS), 32)
    for start, stop in ((0, 1), (1, 4), (4, 32)):
        part = quantile_spectrum(simulated.discounted_puts(CONTRACTS[start:stop], offset=start), 32)
        assert torch.equal(part, whole[start:stop])


def test_skip_moves_along_the_stream() -> None:
    whole = engine().terminal_prices(CONTRACTS)
    assert torch.equal(engine(skip=10).terminal_prices(CONTRACTS[10:]), whole[10:])


def test_streams_of_contracts_paths_and_steps_are_independent() -> None:
    same = np.repeat(CONTRACTS[:1], 400, axis=0)
    log_returns = np.log(engine(sampling="pseudorandom", timesteps=1).terminal_prices(same).double().numpy())
    standard = (log_returns - log_returns.mean()) / log_returns.std()
    assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-4
    paths = np.corrcoef(standard.T)
    assert np.abs(paths - np.eye(256)).max() < 6 / np.sqrt(400)
    contracts = np.corrcoef(standard)
    assert np.abs(contracts - np.eye(400)).max() < 6 / np.sqrt(256)


def test_steps_add_their_variance() -> None:
    # Shared counters between steps would make the sum too wide.
    same = np.repeat(CONTRACTS[:1], 200, axis=0)
    for steps in (1, 5, 8):
        log_returns = np.log(engine(sampling="pseudorandom", timesteps=steps).terminal_prices(same).double().numpy())
        w = CONTRACTS[0, 5] * np.sqrt(CONTRACTS[0, 2])
        assert log_returns.std() / w == pytest.approx(1, abs=4 / np.sqrt(2 * log_returns.size))


def test_seeds_differ() -> None:
    assert not torch.equal(engine(mc_seed=1).terminal_prices(CONTRACTS), engine(mc_seed=2).terminal_prices(CONTRACTS))


def test_certain_contracts_end_at_the_forward() -> None:
    rows = np.array([[100, 90, 0.0, 0.05, 0.0, 0.3], [100, 90, 2.0, 0.05, 0.01, 0.0]])
    terminal = engine(dtype="float64").terminal_prices(rows).numpy()
    np.testing.assert_allclose(terminal[0], 100)
    np.testing.assert_allclose(terminal[1], 100 * np.exp(0.04 * 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads_per_block": 100}, "threads_per_block"),
        ({"timesteps": 0}, "timesteps"),
        ({"network_size": 1}, "network_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"mc_seed": -1}, "mc_seed"),
        ({"sampling": "halton"}, "sampling"),
        ({"network_size": 2**20, "batches_per_mc_run": 2**12}, r"below 2\^31"),
        ({"paths": 7}, "paths"),
    ],
)
def test_bad_simulation_parameters_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_simulation(**changes)


def test_sobol_with_normalised_forwards_is_refused() -> None:
    with pytest.raises(ValidationError, match="makes prices worse"):
        BlackScholesConfig(sim_params=small_simulation(sampling="sobol"), normalize_forwards=True)


def test_a_missing_gpu_is_an_error_and_never_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        BlackScholes(BlackScholesConfig(sim_params=small_simulation()), "cuda")


def test_an_unsupported_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 'cpu' and 'cuda'"):
        BlackScholes(BlackScholesConfig(sim_params=small_simulation()), "meta")


def test_the_seeds_parameters_are_accepted() -> None:
    params = SimulationParams(
        timesteps=100,
        network_size=1024,
        batches_per_mc_run=8,
        threads_per_block=256,
        mc_seed=42,
        buffer_size=10000,
        skip=0,
        dtype="float32",  # type: ignore[arg-type]
    )
    assert (params.paths, params.bins) == (8192, 513)
