"""Derivatives as labels: they are those of the closed form, and training on them helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.learning.labels import Examples, ExampleSource
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.learning.scale import features, intrinsic, unit_of_price
from smc.problem.contracts import resolve_domain
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, BlackScholesConfig, SimulationParams
from tests.conftest import small_config, small_simulation, small_training

DOMAIN = resolve_domain({})


def source(*, normalize: bool = False, **changes: object) -> ExampleSource:
    params = SimulationParams(timesteps=4, network_size=32, batches_per_mc_run=2048, mc_seed=5, dtype="float64")
    config = BlackScholesConfig(sim_params=params.model_copy(update=changes), normalize_forwards=normalize)
    return ExampleSource(BlackScholes(config), DOMAIN, differential=True)


def test_labels_are_the_derivatives_of_the_closed_form() -> None:
    makes = source()
    examples, value, slope = labels_and_truth(makes)
    # 65,536 quasi-random paths, and up to a few units of slope.
    torch.testing.assert_close(examples.targets[:, 0], value, atol=1e-3, rtol=0)
    torch.testing.assert_close(examples.targets[:, 1], slope, atol=3e-3, rtol=3e-3)


def test_normalised_forwards_have_them_too() -> None:
    # Forwards match exactly, so what is in the money has an exact price and slope, and all is less noisy.
    errors = []
    for normalize in (False, True):
        examples, value, slope = labels_and_truth(source(normalize=normalize, sampling="pseudorandom"))
        found = torch.stack([examples.targets[:, 0] - value, examples.targets[:, 1] - slope])[:, :, 0, 0]
        errors.append(found.square().mean(dim=1).sqrt())
    assert bool((errors[1] < 0.75 * errors[0]).all()), errors


def labels_and_truth(makes: ExampleSource) -> tuple[Examples, torch.Tensor, torch.Tensor]:
    contracts = makes.contracts(100, 64)
    examples = makes.simulate(contracts, torch.tensor(100))
    direction = makes._directions(100, contracts.table)

    def scaled(table: torch.Tensor) -> torch.Tensor:
        levels = torch.from_numpy(black_scholes.payoff_bin_averages(table.numpy(), 32))
        spectrum = torch.view_as_real(torch.fft.rfft(levels / unit_of_price(table)[:, None], norm="forward")).clone()
        spectrum[:, 0, 0] -= intrinsic(table)
        return spectrum

    step = 1e-5 * direction
    slope = (scaled(contracts.table + step) - scaled(contracts.table - step)) / 2e-5
    moved = [features(contracts.table + sign * step, DOMAIN) for sign in (1, -1)]
    torch.testing.assert_close(examples.inputs[:, 1], (moved[0] - moved[1]) / 2e-5, atol=1e-6, rtol=1e-6)
    return examples, scaled(contracts.table), slope


def test_a_direction_is_a_function_of_seed_and_index() -> None:
    whole, part = source().contracts(0, 2048).inputs, source().contracts(1500, 7).inputs
    assert torch.equal(whole[1500:1507], part)
    directions = source()._directions(0, source().contracts(0, 2048).table)
    assert bool((directions[:, 1] == 0).all())
    others = directions[:, [0, 2, 3, 4, 5]]
    assert abs(torch.corrcoef(others.T) - torch.eye(5)).max() < 0.1
    assert not torch.equal(source(mc_seed=6).contracts(0, 7).inputs[:, 1], whole[:7, 1])


def test_derivatives_help_where_labels_are_noisy() -> None:
    params = small_simulation(network_size=32, batches_per_mc_run=32, buffer_size=1000, sampling="pseudorandom")
    contracts = SobolSampler({}, seed=3).sample(2048)
    errors = []
    for differential in (0.0, 1.0):
        model = build_cvnn(params, CVNNConfig(hidden=(32, 32)))
        pricer = GbmCVNNPricer(GbmCVNNPricerConfig(BlackScholesConfig(sim_params=params), {}, model))
        pricer.train(TrainingConfig(num_batches=600, batch_size=32, learning_rate=0.01, differential=differential))
        delta = pricer.predict_greeks(contracts).delta - black_scholes.greeks(contracts).delta
        price = (pricer.predict_price(contracts) - black_scholes.price(contracts)) / contracts[:, 0] * 1e4
        errors.append([float(np.sqrt(np.square(error).mean())) for error in (price, delta)])
    assert errors[1][0] < errors[0][0] / 2
    assert errors[1][1] < errors[0][1] / 2


def test_only_the_log_scheme_has_them() -> None:
    config = small_config()
    euler = BlackScholesConfig(sim_params=config.cfg.sim_params, simulate_log_return=False)
    pricer = GbmCVNNPricer(replace(config, cfg=euler))
    with pytest.raises(ConfigError, match="differential labels need simulate_log_return=True"):
        pricer.train(small_training(1, differential=0.5))
    pricer.train(small_training(1))
