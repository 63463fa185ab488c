"""When to exercise: policies that are learned, kept, and bounded from above."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from jobs.outcome import ExperimentOutcome
from jobs.recipes import make_experiment
from jobs.sweep import errors
from smc.checkpoint.file import Snapshot, decode, encode, read_metadata, restore
from smc.checkpoint.tensor_header import parse_header
from smc.errors import ConfigError
from smc.learning import exercise
from smc.learning.exercise import with_policy
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.duality import has_upper_bound, upper_bound
from smc.prediction.soundness import evaluated
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.products.bermudan import BermudanCall, BermudanMaxCall, BermudanPut
from smc.problem.products.european import EuropeanPut
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation
from tests.conftest import small_training

PUT = Problem(GeometricBrownianMotion(), BermudanPut(dates=4))
NARROW = {"X0": {"lower": 80, "upper": 120}, "K": {"lower": 90, "upper": 110}, "v": {"lower": 0.15, "upper": 0.4}}


@cache
def learned() -> Problem:
    return with_policy(PUT, NARROW, seed=3)


def contract_of(problem: Problem, **values: float) -> np.ndarray:
    known = {"X0": 100, "K": 100, "T": 1, "r": 0.06, "d": 0.02, "v": 0.25} | values
    return np.array([[known[name] for name in problem.schema.names]], dtype=np.float64)


def lower_bound(problem: Problem, table: np.ndarray, paths: int = 1 << 18) -> Any:
    params = SimulationParams(timesteps=problem.product.dates, network_size=64, batches_per_mc_run=64, mc_seed=9)
    return Simulation(problem, params).price(table, paths)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is learned in a moment, and is none of the best."""
    for name, value in (("_CONTRACTS", 256), ("_PATHS", 8), ("_ROUNDS", 2), ("_STEPS", 20), ("_UNITS", 4)):
        monkeypatch.setattr(exercise, name, value)


def test_without_a_policy_nothing_is_simulated() -> None:
    with pytest.raises(ConfigError, match=r"bermudan_put has no policy of exercise: smc.learning.exercise.with_policy"):
        Simulation(PUT, SimulationParams(timesteps=4, network_size=2, batches_per_mc_run=1, mc_seed=1))


def test_a_policy_is_a_function_of_problem_domain_and_seed(few: None) -> None:
    one, again, other = (with_policy(PUT, NARROW, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert with_policy(one, {}) is one
    european = Problem(GeometricBrownianMotion(), EuropeanPut())
    assert with_policy(european) is european
    state = torch.get_rng_state()
    with_policy(PUT, NARROW, seed=5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.long
def test_lower_and_upper_bound_hold_the_value_and_are_near_it() -> None:
    problem, oracle = learned(), oracle_of(learned())
    assert oracle is not None
    for values in ({}, {"X0": 85, "r": 0.08}, {"X0": 115, "v": 0.4, "T": 2}):
        table = contract_of(problem, **values)
        exact, below, above = oracle.price(table)[0], lower_bound(problem, table), upper_bound(problem, table)
        assert exact - 0.01 < below.price[0] + 4 * below.standard_error[0]
        assert below.price[0] - 4 * below.standard_error[0] < exact
        assert exact < above.price[0] + 4 * above.standard_error[0]
        assert above.price[0] - 4 * above.standard_error[0] < exact + 0.15


@pytest.mark.long
def test_a_call_without_dividends_is_kept_and_a_put_deep_in_the_money_is_not() -> None:
    call = with_policy(Problem(GeometricBrownianMotion(), BermudanCall(dates=4)), NARROW)
    table = contract_of(call, d=0.0)
    exact = oracle_of(Problem(GeometricBrownianMotion(), BermudanCall(dates=1)))
    assert exact is not None
    assert lower_bound(call, table).price[0] == pytest.approx(exact.price(table)[0], abs=0.01)
    deep = contract_of(learned(), X0=80, K=110, v=0.15, T=2, r=0.08, d=0.0)
    oracle = oracle_of(learned())
    assert oracle is not None
    assert lower_bound(learned(), deep).price[0] == pytest.approx(oracle.price(deep)[0], abs=0.02)


@pytest.mark.long
def test_a_max_call_on_two_assets_has_the_literature_s_value() -> None:
    domain = {"T": {"lower": 2.0, "upper": 4.0}, "K": {"lower": 90, "upper": 110}, "r": {"lower": 0.03, "upper": 0.07},
              "p1_2": {"lower": -0.3, "upper": 0.3}}  # fmt: skip
    for i in "12":
        domain |= {f"X{i}": {"lower": 80, "upper": 125}, f"d{i}": {"lower": 0.08, "upper": 0.12},
                   f"v{i}": {"lower": 0.15, "upper": 0.25}}  # fmt: skip
    problem = with_policy(Problem(CorrelatedGBM(), BermudanMaxCall(dates=9)), domain)
    values = {"K": 100, "T": 3, "r": 0.05, "p1_2": 0, "X1": 110, "X2": 110, "d1": 0.1, "d2": 0.1, "v1": 0.2, "v2": 0.2}
    table = np.array([[values[name] for name in problem.schema.names]], dtype=np.float64)
    below, above = lower_bound(problem, table, 1 << 21), upper_bound(problem, table, paths=2048)
    assert below.price[0] + 3 * below.standard_error[0] > 21.34382 * 0.998
    assert below.price[0] - 3 * below.standard_error[0] < 21.34382 < above.price[0] + 3 * above.standard_error[0]
    assert above.price[0] < 21.34382 * 1.01


def test_an_upper_bound_is_refused_where_prices_do_not_say_how_they_go_on(few: None) -> None:
    heston = with_policy(Problem(Heston(), BermudanPut(dates=2)), seed=1)
    assert not has_upper_bound(heston)
    with pytest.raises(ConfigError, match="there is no upper bound of heston x bermudan_put"):
        upper_bound(heston, np.zeros((0, len(heston.schema))))
    assert not has_upper_bound(Problem(GeometricBrownianMotion(), EuropeanPut()))


@pytest.mark.slow
def test_a_pricer_learns_its_policy_and_keeps_it(few: None) -> None:
    settings = {"simulation": {"product": {"kind": "bermudan_put", "dates": 4}}, "domain": NARROW}
    experiment = make_experiment("early", settings, recipe="tiny")
    pricer = GbmCVNNPricer(experiment.fresh())
    product = pricer.problem.product
    assert isinstance(product, BermudanPut)
    assert product.policy is not None
    pricer.train(small_training(5))
    data = encode(Snapshot.of(pricer.snapshot()))
    again = GbmCVNNPricer(restore(decode(data)))
    assert again.problem == pricer.problem
    table = contract_of(pricer.problem)
    np.testing.assert_array_equal(again.predict_price(table), pricer.predict_price(table))
    # The experiment asks for no policy, and so goes on with the one that was learned.
    metadata = read_metadata(parse_header(data, len(data)))
    difference = experiment.difference(metadata)
    assert difference is None or "product" not in difference
    other = make_experiment("early", settings, {"simulation": {"product": {"dates": 2}}}, recipe="tiny")
    assert "simulation.product" in str(other.difference(metadata))


@pytest.mark.slow
def test_a_policy_answers_where_nothing_is_random_and_on_one_date(few: None) -> None:
    pricer = GbmCVNNPricer(make_experiment("early", {"simulation": {"product": {"kind": "bermudan_put", "dates": 4}},
                                                     "domain": NARROW}, recipe="tiny").fresh())  # fmt: skip
    pricer.train(small_training(1))
    for values in ({"T": 0.0, "K": 110.0}, {"v": 0.0, "K": 110.0}):
        table = contract_of(pricer.problem, **values)
        oracle = oracle_of(pricer.problem)
        assert oracle is not None
        assert pricer.predict_price(table)[0] == pytest.approx(oracle.price(table)[0], abs=1e-9)
    once = with_policy(Problem(GeometricBrownianMotion(), BermudanPut(dates=1)), NARROW)
    table = contract_of(once)
    exact = oracle_of(once)
    assert exact is not None
    assert lower_bound(once, table).price[0] == pytest.approx(exact.price(table)[0], abs=0.02)


@pytest.mark.slow
def test_prices_that_may_be_absorbed_have_a_policy_and_an_upper_bound(few: None) -> None:
    problem = with_policy(Problem(ConstantElasticity(), BermudanPut(dates=2)), seed=1)
    table = contract_of(problem, v=0.6, T=2.0, beta=0.0)
    assert np.isfinite(upper_bound(problem, table, paths=64, inner=32).price).all()
    with pytest.raises(ConfigError, match="even numbers, 2 at least, got 511 and 256"):
        upper_bound(problem, table, paths=511)


@pytest.mark.long
def test_a_sweep_tells_how_far_each_is_off_and_whether_all_holds(few: None) -> None:
    settings = {"simulation": {"product": {"kind": "bermudan_put", "dates": 4}}, "domain": NARROW}
    experiment = make_experiment("early", settings, {"training": {"num_batches": 20}}, recipe="tiny")
    pricer = GbmCVNNPricer(experiment.fresh())
    pricer.train(experiment.training)
    found = evaluated(pricer, 64)
    assert found.soundness.holds
    assert found.measures["gap to the upper bound"].count == 16
    head, line = errors([ExperimentOutcome(experiment, None, evaluated=found), ExperimentOutcome(experiment, None)])
    assert head.split()[:4] == ["experiment", "price", "at", "most"]
    assert line.startswith("early")
    assert line.endswith("recursion from date to date  yes")
    assert errors([ExperimentOutcome(experiment, None)]) == []
