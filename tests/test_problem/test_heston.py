"""Heston's model: the scheme against the oracle, the oracle against the literature, and what is learnt of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from smc.errors import ConfigError, NumericsError
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.models.numerical import Precision
from smc.prediction.evaluation import price_error
from smc.problem.oracles import heston as oracle
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.processes.heston import Heston, upper_tail
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.terminal import TerminalPrice
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import ProblemConfig
from smc.simulation.engine import Simulation
from tests.conftest import small_simulation, small_training

PUT, CALL = Problem(Heston(), EuropeanPut()), Problem(Heston(), EuropeanCall())

# Lewis's contract, as in QuantLib's test of Heston's model.
LEWIS = {"X0": 100.0, "K": 100.0, "T": 1.0, "r": 0.01, "d": 0.02, "v0": 0.04, "kappa": 4.0, "theta": 0.25, "xi": 1.0,
         "rho": -0.5}  # fmt: skip
LONG = {**LEWIS, "r": 0.0, "d": 0.0, "theta": 0.04, "T": 10.0, "kappa": 0.5, "rho": -0.9}
SHORT = {**LEWIS, "T": 0.01, "v0": 0.01}


def columns(**contract: float) -> Any:
    return PUT.schema.row(*(np.array([contract[name]]) for name in PUT.schema.names))


@pytest.mark.parametrize(
    ("contract", "option", "value", "digits"),
    [
        ({**LEWIS, "K": 80.0}, "call", 26.774758743998854, 4e-13),
        ({**LEWIS, "K": 80.0}, "put", 7.958878113256768, 4e-13),
        ({**LEWIS, "K": 120.0}, "call", 9.024913483457836, 4e-13),
        ({**LEWIS, "K": 120.0}, "put", 29.811026202682472, 4e-13),
        ({**SHORT, "K": 95.0}, "put", 4.61954855653851e-4, 1e-12),
        (SHORT, "call", 0.467782671512844, 1e-12),
        (LONG, "call", 13.08467013699236, 1e-12),
        ({**LONG, "K": 140.0}, "call", 0.2957744357980307, 1e-12),
    ],
)
def test_the_oracle_gives_published_prices_to_their_digits(
    contract: dict[str, float], option: Any, value: float, digits: float
) -> None:
    assert oracle.price(columns(**contract), option)[0] == pytest.approx(value, abs=digits)


def test_the_oracle_gives_published_sensitivities_and_quantiles() -> None:
    c = columns(**LEWIS)
    assert oracle.delta(c, "call")[0] == pytest.approx(0.5994713257500281, abs=1e-12)
    assert oracle.price_by_variance(c)[0] == pytest.approx(10.1792654044811, abs=1e-11)
    for p, value in ((0.01, 23.594354747655), (0.5, 94.073920478246), (0.95, 175.7615260565)):
        assert oracle.terminal_quantile(c, p)[0] == pytest.approx(value, abs=1e-9)


def test_a_put_is_a_call_by_parity_and_sensitivities_are_differences() -> None:
    table = SobolSampler({}, seed=3, schema=PUT.schema).sample(64)
    c = PUT.schema.row(*table.T)
    put, call = oracle.price(c, "put"), oracle.price(c, "call")
    np.testing.assert_allclose(call - put, c.X0 * np.exp(-c.d * c.T) - c.K * np.exp(-c.r * c.T), atol=1e-11)
    for name, slope in (("X0", oracle.delta(c, "put")), ("v0", oracle.price_by_variance(c))):
        step = 1e-4 * getattr(c, name)
        up, down = (c._replace(**{name: getattr(c, name) + sign * step}) for sign in (1, -1))
        by_difference = (oracle.price(up, "put") - oracle.price(down, "put")) / (2 * step)
        np.testing.assert_allclose(slope, by_difference, atol=1e-5 * (1 + np.abs(slope).max()))


def test_the_oracle_knows_what_is_certain_and_says_where_it_does_not_converge() -> None:
    for certain in ({"T": 0.0}, {"v0": 0.0, "theta": 0.0}):
        contract = {**LEWIS, "K": 90.0, **certain}
        forward = 100 * np.exp(-0.01 * contract["T"])
        worth = np.exp(-0.01 * contract["T"]) * (forward - 90)
        assert oracle.price(columns(**contract), "call")[0] == pytest.approx(worth, abs=1e-12)
        assert oracle.price(columns(**contract), "put")[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(NumericsError, match="a time to expiry or a variance is next to 0"):
        oracle.price(columns(**{**LEWIS, "T": 1e-9}), "call")


def test_the_oracle_answers_the_same_however_many_contracts_it_is_asked_about() -> None:
    table = SobolSampler({}, seed=8, schema=PUT.schema).sample(3000)  # some blocks of numbers
    assert oracle.HestonLaw.of(PUT.schema.row(*table.T)).reach().sum() > 2 << 20
    together = oracle.price(PUT.schema.row(*table.T), "put")
    for part in (slice(0, 5), slice(2990, 3000)):
        np.testing.assert_allclose(oracle.price(PUT.schema.row(*table[part].T), "put"), together[part], atol=1e-12)


def test_the_tail_of_the_normal_is_right_to_single_precision() -> None:
    z = np.linspace(-6, 6, 2001)
    found = np.array([upper_tail(float(x)) for x in z])
    np.testing.assert_allclose(found, ndtr(-z), rtol=1.3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param(Precision.float64, marks=pytest.mark.long), Precision.float32])
def test_simulated_prices_are_the_oracles(precision: Precision) -> None:
    table = SobolSampler({}, seed=5, schema=PUT.schema).sample(24)
    params = small_simulation(
        timesteps=64, network_size=256, batches_per_mc_run=64, dtype=precision, sampling="pseudorandom"
    )
    found = Simulation(PUT, params).price(table, 1 << 17)
    away = (found.price - oracle.price(PUT.schema.row(*table.T), "put")) / np.hypot(
        found.standard_error, 2e-5 * table[:, 0]
    )
    assert np.abs(away).max() < 4.5, away


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_forwards_are_exact_whatever_the_steps(steps: int) -> None:
    problem = Problem(Heston(), TerminalPrice())
    table = SobolSampler({}, seed=6, schema=problem.schema).sample(24)
    params = small_simulation(
        timesteps=steps, network_size=256, batches_per_mc_run=64, dtype="float64", sampling="pseudorandom"
    )
    found = Simulation(problem, params).price(table, 1 << 17)
    expected = problem.law(torch.from_numpy(table)).forward.numpy()
    assert (np.abs(found.price - expected) / found.standard_error).max() < 4.5


def test_features_are_the_moments_of_the_integrated_variance() -> None:
    table = torch.from_numpy(SobolSampler({}, seed=7, schema=PUT.schema).sample(32))
    c = PUT.schema.row(*table.unbind(dim=1))
    skew, varied, term, speed = Heston().features(c)
    s = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000 * c.T
    variance = c.theta + (c.v0 - c.theta) * (-c.kappa * s).exp()
    later = (1 - (-c.kappa * (c.T - s)).exp()) / c.kappa
    expected = (variance.mean(dim=0) * c.T).double()
    torch.testing.assert_close(expected.sqrt(), Heston().deviation(c, c.T), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        skew, c.rho * c.xi * c.T * (variance * later).mean(dim=0) / expected**1.5, rtol=1e-6, atol=1e-9
    )
    of_integral = (c.T * (variance * later * later).mean(dim=0)).sqrt()
    torch.testing.assert_close(varied, c.xi * of_integral / expected, rtol=1e-6, atol=1e-9)
    assert bool(term.isfinite().all() and speed.isfinite().all())
    nothing_today = c._replace(v0=0 * c.v0)
    assert all(bool(feature.isfinite().all()) for feature in Heston().features(nothing_today))


def test_it_is_learnt_like_any_other_and_goes_on_from_a_snapshot() -> None:
    params = small_simulation(timesteps=8)
    model = build_cvnn(params, CVNNConfig(hidden=(24, 24)), problem=PUT)
    config = ProblemConfig(process=Heston(), product=EuropeanPut(), sim_params=params)
    pricer = GbmCVNNPricer(GbmCVNNPricerConfig(cfg=config, domain_bounds={}, cvnn=model))
    pricer.train(small_training(200, batch_size=64))
    error = price_error(pricer, SobolSampler({}, seed=9, schema=PUT.schema).sample(512))
    assert (error.reference, error.noise) == ("Fourier inversion", None)
    assert error.rmse < 60
    again = GbmCVNNPricer(pricer.snapshot())
    one, two = pricer.train(small_training(2)), again.train(small_training(2))
    assert one.loss == two.loss


def test_what_no_contract_can_have_is_one_clear_error() -> None:
    simulation = Simulation(PUT, small_simulation())
    with pytest.raises(ConfigError, match=r"contracts\[0\].rho must be finite and at least -1 and at most 1, got 1.5"):
        simulation.payoffs([{**LEWIS, "rho": 1.5}])
    with pytest.raises(ConfigError, match=r"contracts\[0\].xi must be finite and above 0, got 0.0"):
        simulation.payoffs([{**LEWIS, "xi": 0.0}])
    with pytest.raises(ConfigError, match=r"domain_bounds\['rho'\]: upper bound must be at most 1, got 1.2"):
        SobolSampler({"rho": {"lower": 0.0, "upper": 1.2}}, seed=1, schema=PUT.schema)
    assert oracle_of(Problem(Heston(), ArithmeticAsianPut(dates=4))) is None
