"""Prices from the law of the price given the path of the variance: unbiased, less noisy, and off by a switch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.learning.labels import ExampleSource
from smc.models.numerical import Precision
from smc.problem.conditional import ConditionallyLogNormal, is_conditional
from smc.problem.contracts import resolve_domain
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.processes.bates import Bates
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.cash_or_nothing import CashOrNothingCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation import paths
from smc.simulation.config import ProblemConfig
from smc.simulation.engine import Simulation, engine_of
from smc.simulation.regression import regressed_prices
from tests.conftest import small_simulation

HESTON = Problem(Heston(), EuropeanPut())


def table_of(problem: Problem, count: int = 16) -> Any:
    return SobolSampler({}, seed=4, schema=problem.schema).sample(count)


def sizes(**changes: Any) -> dict[str, Any]:
    given = {"seed": 9, "paths": 4096, "steps": 16, "precision": Precision.float64, "sampling": "pseudorandom"}
    return given | changes


def test_it_is_declared_by_process_and_product_and_never_assumed() -> None:
    assert is_conditional(HESTON)
    assert is_conditional(Problem(Bates(), DigitalPut()))
    assert is_conditional(Problem(LiftedRoughHeston(), CashOrNothingCall()))
    assert not is_conditional(Problem(Heston(), ArithmeticAsianPut(dates=4)))
    assert not is_conditional(Problem(GeometricBrownianMotion(), EuropeanPut()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        HESTON,
        Problem(Bates(), CashOrNothingCall(cash=3.0)),
        Problem(LiftedRoughHeston(factors=3), EuropeanCall()),
    ],
    ids=lambda problem: problem.name,
)
def test_it_is_the_plain_estimators_mean_with_less_noise(problem: Problem) -> None:
    table = table_of(problem)
    plain = paths.simulate(problem, table, 0, **sizes(paths=1 << 14))
    (outer,) = paths.simulate_priced(problem, [table], 10**6, **sizes(paths=1 << 14))
    payoffs, given, root = outer[:, 0], outer[:, 1], 128
    rare = 1e-6 * problem.product.notionals(problem.law(torch.from_numpy(table))).numpy()  # of what no path may pay
    # Payoffs over outer paths, and what is expected given them, have the mean of payoffs over whole paths.
    for one, other in ((payoffs, plain), (given, plain), (given, payoffs)):
        error = np.hypot(one.std(axis=1), other.std(axis=1)) / root + rare
        assert (np.abs(one.mean(axis=1) - other.mean(axis=1)) / error).max() < 4.5
    assert (given.std(axis=1) < plain.std(axis=1) + rare).all()
    # A regressed price is where the mean is, and much nearer to itself on other paths.
    prices = np.array(
        [
            regressed_prices(torch.from_numpy(paths.simulate_priced(problem, [table], 1000 * i, **sizes())[0])).numpy()
            for i in range(16)
        ]
    )
    # The regression takes off most of the bias of 16 steps, which the mean payoff has: some basis points of spot.
    noise = np.hypot(plain.std(axis=1) / root, prices.std(axis=0) / 4) + rare
    bias = (300 if problem.product.lipschitz else 3000) * rare
    assert (np.maximum(np.abs(prices.mean(axis=0) - plain.mean(axis=1)) - bias, 0) / noise).max() < 4.5
    assert np.median(prices.std(axis=0) * 64 / (plain.std(axis=1) + rare)) < (0.3 if problem.product.lipschitz else 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Heston(), Bates()], ids=lambda p: p.kind)
def test_controls_have_no_mean_where_steps_are_fine(process: Any) -> None:
    problem = Problem(process, EuropeanPut())
    (outer,) = paths.simulate_priced(problem, [table_of(problem)], 0, **sizes(steps=128, paths=1 << 13))
    controls = outer[:, 2:]
    deviations = controls.std(axis=2)
    deviations[:, 3:] = 1.0  # of the number of jumps, which may be none on all of the paths
    away = controls.mean(axis=2) / (deviations / np.sqrt(1 << 13))
    assert np.abs(away).max() < 5.0, away


@pytest.mark.slow
def test_estimating_the_coefficients_on_the_same_paths_has_a_bias_that_is_nothing() -> None:
    problem, steps = HESTON, 64
    table = table_of(problem, 6)
    oracle = oracle_of(problem)
    assert oracle is not None
    count = 128
    prices = np.array(
        [
            regressed_prices(
                torch.from_numpy(
                    paths.simulate_priced(
                        problem, [np.tile(contract, (count, 1))], count * row, **sizes(paths=1024, steps=steps)
                    )[0]
                )
            ).numpy()
            for row, contract in enumerate(table)
        ]
    )
    bias = 1e4 * (prices.mean(axis=1) - oracle.price(table)) / table[:, 0]
    error = 1e4 * prices.std(axis=1) / np.sqrt(count) / table[:, 0]
    # That of 64 time steps is in it, too.
    assert (np.abs(bias) < 0.1 + 4 * error).all(), bias


def test_a_price_is_least_squares_and_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(3)
    controls = rng.normal(size=(5, 3, 500)) + 0.1
    expected = 7 + controls.sum(axis=1) + 0.1 * rng.normal(size=(5, 500))
    outputs = torch.from_numpy(np.concatenate([np.zeros((5, 1, 500)), expected[:, None], controls], axis=1))
    prices = regressed_prices(outputs)
    for row in range(5):
        design = np.column_stack([np.ones(500), controls[row].T])
        intercept = np.linalg.lstsq(design, expected[row], rcond=None)[0][0]
        assert float(prices[row]) == pytest.approx(intercept, abs=1e-10)
        assert torch.equal(regressed_prices(outputs[row : row + 1].clone()), prices[row : row + 1])
    assert regressed_prices(outputs[:0].clone()).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_control_that_others_explain_or_that_stands_still_is_left_out(count: int) -> None:
    rng = np.random.default_rng(4)
    one = rng.normal(size=400) + 0.05
    rows = [np.zeros(400), 2 + one + 0.01 * rng.normal(size=400), one, *[2 * one, 0 * one][:count]]
    assert float(regressed_prices(torch.from_numpy(np.array([rows])))[0]) == pytest.approx(2, abs=0.01)
    without = torch.from_numpy(np.array([rows[:2]]))
    assert float(regressed_prices(without)[0]) == pytest.approx(float(rows[1].mean()), abs=1e-12)


@pytest.mark.slow
def test_labels_take_it_for_the_price_alone_unless_it_is_switched_off() -> None:
    params = small_simulation(timesteps=8, network_size=32, batches_per_mc_run=8)
    domain = resolve_domain({}, HESTON.schema)
    config = ProblemConfig(process=Heston(), product=EuropeanPut(), sim_params=params)
    assert config.conditional
    on, off = (engine_of(config.model_copy(update={"conditional": switch})) for switch in (True, False))
    assert isinstance(on, Simulation)
    assert isinstance(off, Simulation)
    assert (on.conditional, off.conditional) == (True, False)
    sources = [ExampleSource(engine, domain, differential=True) for engine in (on, off)]
    contracts, first = sources[0].contracts(0, 8), torch.tensor(0)
    ours, plain = (source.simulate(contracts, first).targets for source in sources)
    here, there = on.simulate_priced([contracts.table, contracts.moved], first)
    anchor, moved_anchor, scale, d_scale = contracts.terms.T
    torch.testing.assert_close(ours[:, 0, 0, 0], (here.prices * scale).float() - anchor)
    slope = (there.prices - here.prices) * 2**9 * scale + here.prices * d_scale
    torch.testing.assert_close(ours[:, 1, 0, 0], slope.float() - moved_anchor, atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours, plain)
    # Both are of the same contracts, and near each other.
    assert float((ours - plain)[:, 0].abs().mean()) < 0.1


@pytest.mark.slow
def test_a_derivative_of_the_price_is_the_oracles() -> None:
    params = small_simulation(timesteps=32, network_size=64, batches_per_mc_run=32, dtype="float64")
    engine = Simulation(HESTON, params, conditional=True)
    table = torch.from_numpy(table_of(HESTON))
    moved = table.clone()
    moved[:, 0] *= 1 + 2**-9
    here, there = engine.simulate_priced([table, moved], torch.tensor(3))
    oracle = oracle_of(HESTON)
    assert oracle is not None
    exact = oracle.price(moved.numpy()) - oracle.price(table.numpy())
    np.testing.assert_allclose((there.prices - here.prices).numpy(), exact, atol=2e-3 * 2**-9 * 100)


def test_the_mean_of_the_controls_needs_no_step_between_speeds_of_either_sign() -> None:
    from smc.problem.processes.heston import expected_integral

    # The series ends where kappa T is 0.001.
    around = [expected_integral(1.5, 0.09, 2e-4 * number, 0.02) for number in range(-8, 9)]
    assert np.abs(np.diff(around, 2)).max() < 2e-8
    t = (np.arange(200_000) + 0.5) / 200_000 * 1.5
    variance = 0.02 / -0.7 + (0.09 - 0.02 / -0.7) * np.exp(0.7 * t)
    assert expected_integral(1.5, 0.09, -0.7, 0.02) == pytest.approx(variance.mean() * 1.5, rel=1e-9)


@pytest.mark.slow
def test_a_variance_that_hardly_varies_gives_the_price_that_it_has_without() -> None:
    problem = Problem(Bates(), EuropeanPut())
    names = problem.schema.names
    contract = dict.fromkeys(names, 0.0) | {
        "X0": 100,
        "K": 100,
        "T": 2,
        "r": 0.02,
        "v0": 0.16,
        "kappa": 6,
        "theta": 0.01,
    }
    oracle = oracle_of(problem)
    assert oracle is not None
    for xi, rho, paths_ in (
        (0.0, 0.0, 3000),
        (1e-4, -0.7, 4096),
        (1e-3, -0.7, 4096),
        (1e-2, -0.7, 4096),
        (0.1, 1e-6, 1000),
    ):
        table = np.array([[{**contract, "xi": xi, "rho": rho}[name] for name in names]])
        for precision in Precision:
            given = sizes(steps=48, paths=paths_, precision=precision)
            (outer,) = paths.simulate_priced(problem, [table], 0, **given)
            # A trapezoidal rule of 48 steps is off by a basis point of spot.
            error = max(0.02, 4 * outer[0, 1].std() / np.sqrt(paths_))
            assert abs(float(regressed_prices(torch.from_numpy(outer))[0]) - oracle.price(table)[0]) < error


class Capped(EuropeanPut):
    """Pays otherwise, and says nothing of what that is worth."""

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        return min(k[1] * max(k[0] - spot, 0.0), 5.0)


class Faster(Heston):
    """Moves otherwise, and says nothing of the outer path."""

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return (state[0], state[1])


def test_a_class_that_changes_one_half_alone_has_no_other() -> None:
    for problem in (Problem(Heston(), Capped()), Problem(Faster(), EuropeanPut())):
        assert not is_conditional(problem)
        simulation = Simulation(problem, small_simulation(), conditional=True)
        assert not simulation.conditional
        with pytest.raises(ConfigError, match="is simulated without a law of the price given the outer path"):
            simulation.simulate_priced([torch.from_numpy(table_of(problem, 1))], torch.tensor(0))


class Wrong(Heston):
    """Gives no variance."""

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return (k[8],)


class Shrinking(Heston):
    """Loses a part of its state on the way."""

    def outer_step(
        self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]
    ) -> tuple[float, ...]:
        return (state[0], state[1])

    def given(self, state: tuple[float, ...], finals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return super().given(state, finals, k)


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (Wrong(), r"Wrong.given gives one number: it must give mean and variance, and then controls"),
        (Shrinking(), r"Shrinking.outer_step gives 2 numbers, and outer_start 3"),
    ],
)
def test_a_half_that_is_wrong_is_one_clear_error(process: ConditionallyLogNormal, message: str) -> None:
    problem = Problem(process, EuropeanPut())
    with pytest.raises(ConfigError, match=message):
        paths.simulate_priced(problem, [table_of(problem)], 0, **sizes(paths=64))
