"""Problems that are learnt on a GPU: the linked kernel in the step's graph, and the labels of a CPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from smc.learning.labels import ExampleSource
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.problem.contracts import resolve_domain
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.barrier import UpAndOutCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanPut
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import ProblemConfig, SimulationParams
from smc.simulation.engine import Simulation
from smc.simulation.levels import payoff_spectrum, payoff_spectrum_and_slope, quantile_spectrum
from tests.conftest import small_training

pytestmark = pytest.mark.gpu
GBM = GeometricBrownianMotion()
PRODUCTS = (EuropeanPut(), DigitalPut(), ArithmeticAsianPut(dates=4), UpAndOutCall(dates=4))


def kind_of(product: Product) -> str:
    return product.kind


def pricer_of(product: Product, **changes: Any) -> GbmCVNNPricer:
    settings = {"timesteps": 4, "network_size": 64, "batches_per_mc_run": 64, "mc_seed": 7, **changes}
    params = SimulationParams(**settings)
    config = ProblemConfig(product=product, sim_params=params)
    model = build_cvnn(params, CVNNConfig(hidden=(32, 32)), config.problem).cuda()
    return GbmCVNNPricer(GbmCVNNPricerConfig(config, {}, model))


@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("product", PRODUCTS, ids=kind_of)
def test_labels_are_those_of_a_cpu(product: Product, differential: bool) -> None:
    if differential and not product.lipschitz:
        return
    problem = Problem(GBM, product)
    params = SimulationParams(
        timesteps=4, network_size=32, batches_per_mc_run=64, mc_seed=5, sampling="pseudorandom", dtype="float64"
    )
    domain, found = resolve_domain({}, problem.schema), []
    for device in ("cpu", "cuda"):
        source = ExampleSource(Simulation(problem, params, device), domain, differential=differential)
        examples = source.simulate(source.contracts(50, 40), torch.tensor(50, device=device))
        found.append([values.cpu() for values in examples])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("paths", [64, 4096, 131_072, 1 << 21])
def test_payoffs_with_slopes_become_the_levels_of_a_cpu(dtype: torch.dtype, paths: int) -> None:
    generator = torch.Generator().manual_seed(1)
    payoffs = torch.randn(3, paths, generator=generator, dtype=dtype).clamp(min=0)
    slopes = torch.randn(3, paths, generator=generator, dtype=dtype) * (payoffs > 0)
    slopes[:, ::7] = 1.5  # of payoffs of nothing too
    scale, d_scale = torch.tensor([1.0, 2.0, 0.5], dtype=dtype), torch.tensor([0.1, -1.0, 0.0], dtype=dtype)
    wanted = payoff_spectrum_and_slope(payoffs.clone(), slopes.clone(), scale, d_scale, 32)
    given = (x.cuda() for x in (payoffs, slopes, scale, d_scale))
    found = payoff_spectrum_and_slope(*given, 32)
    for here, there in zip(wanted, found, strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=2e-5 if dtype == torch.float32 else 1e-10, rtol=1e-4)


@pytest.mark.parametrize("product", PRODUCTS, ids=kind_of)
def test_a_problem_is_learnt_in_a_graph(product: Product, caplog: pytest.LogCaptureFixture) -> None:
    pricer = pricer_of(product)
    differential = 0.3 if product.lipschitz else 0.0
    with caplog.at_level(logging.WARNING):
        pricer.train(small_training(1200, batch_size=64, learning_rate=0.01, differential=differential))
    assert "eagerly" not in caplog.text
    contracts = SobolSampler({}, seed=3, schema=pricer.problem.schema).sample(256)
    oracle = oracle_of(pricer.problem)
    assert oracle is not None
    basis = 1e4 / product.notionals(pricer.problem.law(torch.from_numpy(contracts))).numpy()
    error = (np.asarray(pricer.predict_price(contracts)) - oracle.price(contracts)) * basis
    assert np.sqrt(np.square(error).mean()) < {"digital_put": 30}.get(product.kind, 8)
    on_device = torch.from_numpy(contracts).cuda()
    levels = pricer.predict_distribution(on_device).levels
    assert isinstance(levels, torch.Tensor)
    assert bool((levels.diff(dim=1) >= 0).all())
    certain = contracts.copy()
    certain[::2, pricer.problem.schema.column("T")] = 0.0
    price = pricer.predict_price(torch.from_numpy(certain).cuda())
    np.testing.assert_allclose(price.cpu().numpy()[::2], oracle.price(certain[::2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("product", [ArithmeticAsianPut(dates=4), UpAndOutCall(dates=4)], ids=kind_of)
def test_resumed_training_is_the_same_bit_for_bit(product: Product) -> None:
    differential = 0.3 if product.lipschitz else 0.0
    config = small_training(60, batch_size=32, differential=differential, fresh_per_batch=16)
    whole, part = pricer_of(product, buffer_size=128), pricer_of(product, buffer_size=128)
    whole.train(config)

    def stop(report: Any) -> None:
        part.stop()

    part.train(config, logger=stop)
    at = part.snapshot().global_step
    resumed = GbmCVNNPricer(part.snapshot())
    if at < 60:
        resumed.train(config.model_copy(update={"num_batches": 60 - at}))
    for here, there in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("paths", [64, 4096, 131_072])
def test_payoffs_that_crowd_at_their_ends_are_ranked(dtype: torch.dtype, paths: int) -> None:
    """Half pay nothing, a third the most there is: of a capped payoff, and of a digital one."""
    generator = torch.Generator().manual_seed(2)
    capped = (3 * torch.randn(4, paths, generator=generator, dtype=dtype)).clamp(0, 1)
    digital = (capped > 0.5).to(dtype)
    slopes = torch.randn(4, paths, generator=generator, dtype=dtype) * ((capped > 0) & (capped < 1))
    slopes[:, ::5] = torch.where(capped[:, ::5] > 0, -2.0, 0.0).to(dtype)  # of some of those that pay the most, too
    scale, d_scale = torch.ones(4, dtype=dtype), torch.full((4,), 0.5, dtype=dtype)
    for payoffs in (capped, digital, torch.zeros_like(capped)):
        slopes = torch.where(payoffs == 1, slopes.clamp(max=0), slopes) * (payoffs > 0)  # none rises at its cap
        wanted = quantile_spectrum(payoffs.clone(), 32)
        found = payoff_spectrum(payoffs.cuda(), scale.cuda(), 32)
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-6, rtol=1e-5)
        both = payoff_spectrum_and_slope(payoffs.clone(), slopes.clone(), scale, d_scale, 32)
        given = (x.cuda() for x in (payoffs.clone(), slopes.clone(), scale, d_scale))
        for here, there in zip(both, payoff_spectrum_and_slope(*given, 32), strict=True):
            torch.testing.assert_close(there.cpu(), here, atol=2e-5 if dtype == torch.float32 else 1e-10, rtol=1e-4)
