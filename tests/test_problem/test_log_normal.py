"""Digitals, discrete barriers and averages by recursion: against published digits, parity, limits, and simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smc.errors import ConfigError
from smc.gbm import Simulation, SimulationParams
from smc.problem.oracles import black_scholes
from smc.problem.oracles.log_normal import price
from smc.problem.problem import Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.barrier import DownAndOutCall, UpAndOutCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanPut
from smc.problem.sobol_sampler import SobolSampler
from tests.test_problem.test_paths import reference_rows

GBM = GeometricBrownianMotion()


def drawn(product: Product, count: int, seed: int = 4) -> np.ndarray:
    return SobolSampler({}, seed=seed, schema=Problem(GBM, product).schema).sample(count)


@pytest.mark.parametrize(("product", "contract", "value"), reference_rows())
def test_reference_values_to_the_digits_that_are_given(product: Product, contract: list[float], value: float) -> None:
    assert price(Problem(GBM, product), [contract])[0] == pytest.approx(value, abs=1.5e-10)


@pytest.mark.parametrize(
    "product",
    [
        DigitalPut(), ArithmeticAsianPut(dates=1), ArithmeticAsianPut(dates=2), ArithmeticAsianCall(dates=16),
        UpAndOutCall(dates=1), UpAndOutCall(dates=2), UpAndOutCall(dates=16), DownAndOutCall(dates=16),
    ],
    ids=lambda p: f"{p.kind} {p.dates}",
)  # fmt: skip
def test_simulation_agrees_over_the_domain(product: Product) -> None:
    contracts, problem = drawn(product, 60), Problem(GBM, product)
    exact = price(problem, contracts)
    # Contracts of which not nearly all or nearly none of the paths pay: else no error can be told from a sample.
    told = (exact > 0.05) & (exact < 0.9) if isinstance(product, DigitalPut) else exact > 1
    contracts, exact = contracts[told], exact[told]
    assert len(contracts) > 12
    params = SimulationParams(
        timesteps=max(1, product.dates), network_size=1024, batches_per_mc_run=4, mc_seed=2, sampling="pseudorandom"
    )
    estimate = Simulation(problem, params).price(contracts, paths=1 << 17)
    apart = np.abs(estimate.price - exact) / estimate.standard_error
    assert apart.max() < 5
    assert np.sqrt(np.square(apart).mean()) < 1.6


@pytest.mark.parametrize("dates", [1, 2, 3, 12, 100])
def test_call_and_put_on_an_average_differ_by_its_forward(dates: int) -> None:
    contracts = drawn(ArithmeticAsianPut(), 5)
    X0, K, T, r, d, _ = contracts.T
    times = np.arange(1, dates + 1)[None, :] / dates * T[:, None]
    forward = (X0[:, None] * np.exp((r - d)[:, None] * times)).mean(axis=1)
    call, put = (
        price(Problem(GBM, kind(dates=dates)), contracts) for kind in (ArithmeticAsianCall, ArithmeticAsianPut)
    )
    np.testing.assert_allclose(call - put, np.exp(-r * T) * (forward - K), atol=1e-9 * X0.max())


@pytest.mark.slow
def test_averages_of_one_date_and_barriers_out_of_reach_are_european() -> None:
    contracts = drawn(ArithmeticAsianPut(), 20)
    one = price(Problem(GBM, ArithmeticAsianPut(dates=1)), contracts)
    np.testing.assert_allclose(one, black_scholes.price(contracts), atol=1e-11)
    for product, ratio in ((UpAndOutCall(dates=16), 500.0), (DownAndOutCall(dates=16), 0.002)):
        table = np.insert(contracts, 2, ratio, axis=1)
        np.testing.assert_allclose(
            price(Problem(GBM, product), table), black_scholes.price(contracts, "call"), atol=1e-9
        )


@pytest.mark.parametrize("dates", [1, 4, 64])
def test_a_barrier_takes_value_away_with_every_date(dates: int) -> None:
    for kind in (UpAndOutCall, DownAndOutCall):
        contracts = drawn(kind(), 20)
        fewer, more = (price(Problem(GBM, kind(dates=n)), contracts) for n in (dates, 2 * dates))
        assert (more <= fewer + 1e-10).all()
        assert (more >= -1e-12).all()


@pytest.mark.parametrize(
    ("product", "contract", "value"),
    [
        (DigitalPut(), [100, 105, 0.0, 0.03, 0.01, 0.2], 1.0),
        (DigitalPut(), [100, 100, 0.0, 0.03, 0.01, 0.2], 0.0),
        (DigitalPut(), [100, 105, 1.0, 0.10, 0.0, 0.0], 0.0),
        (ArithmeticAsianPut(dates=4), [100, 105, 0.0, 0.03, 0.01, 0.2], 5.0),
        (ArithmeticAsianCall(dates=2), [100, 90, 2.0, 0.0, 0.0, 0.0], 10.0),
        (UpAndOutCall(dates=4), [100, 90, 1.05, 1.0, 0.10, 0.0, 0.0], 0.0),
        (UpAndOutCall(dates=4), [100, 90, 1.2, 1.0, 0.0, 0.0, 0.0], 10.0),
        (DownAndOutCall(dates=4), [100, 90, 0.95, 1.0, 0.0, 0.10, 0.0], 0.0),
    ],
)
def test_where_nothing_is_random_the_payoff_is_known(product: Product, contract: list[float], value: float) -> None:
    assert price(Problem(GBM, product), [contract])[0] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("product", [ArithmeticAsianPut(dates=16), UpAndOutCall(dates=16), DownAndOutCall(dates=16)])
def test_every_corner_of_the_domain_is_finite_and_within_its_bounds(product: Product) -> None:
    schema = Problem(GBM, product).schema
    ends = np.array([[field.lower, field.upper] for field in schema])
    corners = np.array(np.meshgrid(*ends)).reshape(len(schema), -1).T
    found = price(Problem(GBM, product), corners)
    assert np.isfinite(found).all()
    assert (found > -1e-10).all()
    assert (found <= np.maximum(corners[:, 0] * 1.2, corners[:, 1])).all()


def test_what_has_no_formula_is_named() -> None:
    for problem in (
        Problem(GBM, EuropeanPut()),
        Problem(GeometricBrownianMotion(), _Other()),
    ):
        with pytest.raises(ConfigError, match="there is no formula here for gbm x"):
            price(problem, [[100, 100, 1, 0, 0, 0.2]])


class _Other(DigitalPut):
    """A subclass pays something else, so that a formula of its parent's is not its own."""

    kind = "other_digital"

    def payoff(self, seen: Any, spot: float, k: Any) -> float:
        return 2 * k[1] if spot < k[0] else 0.0
