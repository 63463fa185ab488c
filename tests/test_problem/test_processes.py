"""Bates, constant elasticity, several assets, rough volatility: schemes against oracles, oracles against the known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson

from jobs.recipes import make_experiment
from smc.errors import ConfigError, NumericsError
from smc.learning.labels import ExampleSource
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.learning.scale import View
from smc.models.numerical import Precision
from smc.prediction.evaluation import price_error
from smc.problem.conditional import is_conditional
from smc.problem.contracts import resolve_domain
from smc.problem.normal import quantile_of_tail
from smc.problem.oracles import basket, black_scholes, cev, heston
from smc.problem.oracles.oracle import greeks_by_differences, oracle_of
from smc.problem.problem import Problem, known_fields, process_of, product_of
from smc.problem.process import Process
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM, OneFactorGBM, SeveralAssets
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston, exponentials
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.basket import BasketCall, BasketPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.products.terminal import TerminalPrice
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation import paths
from smc.simulation.config import ProblemConfig
from smc.simulation.engine import Simulation
from tests.conftest import small_simulation, small_training
from tests.test_problem.test_paths import in_python, philox_increments, simulated

BATES, CEV = Problem(Bates(), EuropeanCall()), Problem(ConstantElasticity(), EuropeanCall())
SEVERAL = [OneFactorGBM(n_assets=2), CorrelatedGBM(n_assets=2), OneFactorGBM(n_assets=5), CorrelatedGBM(n_assets=8)]


def one(problem: Problem, **contract: float) -> Any:
    return np.array([[contract[name] for name in problem.schema.names]])


def table_of(problem: Problem, count: int = 24) -> Any:
    return SobolSampler({}, seed=4, schema=problem.schema).sample(count)


# --- oracles --------------------------------------------------------------------------------------------

JUMPS = {"X0": 100.0, "T": 1.0, "r": 0.05, "d": 0.02, "v0": 0.04, "kappa": 2.0, "theta": 0.04, "xi": 0.5, "rho": -0.7,
         "intensity": 0.3, "jump_mean": -0.1, "jump_deviation": 0.15}  # fmt: skip
MERTON = {**JUMPS, "v0": 0.0225, "theta": 0.0225, "xi": 0.0, "intensity": 0.5, "jump_deviation": 0.2}


@pytest.mark.parametrize(
    ("contract", "value"),
    [
        ({**JUMPS, "K": 80.0}, 23.75311197840799),
        ({**JUMPS, "K": 120.0}, 1.891618341400487),
        ({**MERTON, "K": 80.0}, 23.29985443051728),
        ({**MERTON, "K": 120.0}, 2.554325403009155),
    ],
)
def test_bates_oracle_gives_published_prices_and_merton_is_its_edge(contract: dict[str, float], value: float) -> None:
    oracle = oracle_of(BATES)
    assert oracle is not None
    assert oracle.price(one(BATES, **contract))[0] == pytest.approx(value, abs=2e-13)


def test_mertons_series_is_bates_model_without_volatility_of_variance() -> None:
    counts = np.arange(60)
    for strike in (70.0, 100.0, 140.0):
        c = {**MERTON, "K": strike, "v0": 0.03, "theta": 0.05, "rho": 0.4}
        variance = 0.05 + (0.03 - 0.05) * -np.expm1(-2.0) / 2  # the mean of what reverts at 2 a year
        factor = np.exp(c["jump_mean"] + c["jump_deviation"] ** 2 / 2)
        rates = c["r"] - c["intensity"] * (factor - 1) + counts * np.log(factor)
        deviations = np.sqrt(variance + counts * c["jump_deviation"] ** 2)
        forward = 100 * np.exp(rates - c["d"])
        d1 = np.log(forward / strike) / deviations + deviations / 2
        calls = forward * norm.cdf(d1) - strike * norm.cdf(d1 - deviations)
        series = np.exp(-c["r"]) * poisson.pmf(counts, c["intensity"]) @ calls
        assert heston.price(BATES.schema.row(*one(BATES, **c).T), "call")[0] == pytest.approx(series, abs=1e-11)


def test_bates_model_without_jumps_is_hestons() -> None:
    table = table_of(BATES)
    table[:, BATES.schema.column("intensity")] = 0
    c = BATES.schema.row(*table.T)
    plain = Problem(Heston(), EuropeanCall()).schema.row(*table.T[: len(Heston.fields) + 2])
    np.testing.assert_allclose(heston.price(c, "call"), heston.price(plain, "call"), atol=1e-12)


def test_cev_oracle_gives_published_prices() -> None:
    contract = {"X0": 100.0, "T": 1.0, "r": 0.05, "d": 0.0, "v": 0.25, "beta": 0.5}
    for strike, value in ((80.0, 25.6940286195), (120.0, 4.6223889198)):
        c = CEV.schema.row(*one(CEV, **contract, K=strike).T)
        assert cev.price(c, "call")[0] == pytest.approx(value, abs=1e-9)


def test_cev_oracle_is_smooth_up_to_geometric_brownian_motion() -> None:
    contract = {"X0": 100.0, "K": 103.0, "T": 1.0, "r": 0.03, "d": 0.01, "v": 0.3}
    black = black_scholes.price([[100.0, 103.0, 1.0, 0.03, 0.01, 0.3]], "call")[0]
    lacking = np.array([3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-7])
    prices = [cev.price(CEV.schema.row(*one(CEV, **contract, beta=1 - e).T), "call")[0] for e in lacking]
    slopes = (np.array(prices) - black) / lacking
    assert (np.abs(slopes - slopes[-2]) < 0.06 * lacking + 1e-3).all(), slopes
    assert cev.price(CEV.schema.row(*one(CEV, **contract, beta=1.0).T), "call")[0] == pytest.approx(black, abs=1e-12)
    certain = CEV.schema.row(*one(CEV, **{**contract, "v": 0.0, "K": 90.0}, beta=0.5).T)
    assert cev.price(certain, "call")[0] == pytest.approx(100 * np.exp(-0.01) - 90 * np.exp(-0.03))


@pytest.mark.parametrize(
    ("strike", "rho", "volatilities", "value"),
    [
        (50.0, 0.5, (0.4,) * 4, 54.3101760503818554),
        (150.0, 0.5, (0.4,) * 4, 15.1640102889333352),
        (100.0, -0.1, (0.4,) * 4, 17.756916333753729),
        # Of this one the published digits end three at 1e-9: four different directions of integration agree on these.
        (100.0, 0.5, (0.05, 0.05, 0.05, 1.0), 19.4590949732729),
    ],
)
def test_basket_oracle_gives_published_prices(
    strike: float, rho: float, volatilities: tuple[float, ...], value: float
) -> None:
    v = np.array(volatilities)
    covariance = 5 * (rho + (1 - rho) * np.eye(4)) * np.outer(v, v)
    assert basket.price(np.full(4, 25.0), covariance, strike, "call") == pytest.approx(value, abs=5e-10)
    put = basket.price(np.full(4, 25.0), covariance, strike, "put")
    assert put == pytest.approx(value - 100 + strike, abs=5e-10)


def test_basket_oracle_with_assets_that_go_against_each_other_is_simulations() -> None:
    deviations = np.array([0.3, 0.5, 0.4])
    correlation = np.array([[1.0, -0.8, 0.1], [-0.8, 1.0, -0.3], [0.1, -0.3, 1.0]])
    covariance = correlation * np.outer(deviations, deviations)
    forwards = np.array([60.0, 5.0, 30.0])
    normals = np.random.default_rng(5).standard_normal((1 << 20, 3)) @ np.linalg.cholesky(covariance).T
    paid = np.maximum((forwards * np.exp(normals - deviations**2 / 2)).sum(axis=1) - 90, 0)
    found = basket.price(forwards, covariance, 90.0, "call")
    assert abs(found - paid.mean()) < 4 * paid.std() / 1024


def test_a_basket_of_one_price_several_times_is_an_option_on_it() -> None:
    found = basket.price(np.array([40.0, 60.0]), np.full((2, 2), 0.09), 95.0, "put")
    d1 = np.log(100 / 95) / 0.3 + 0.15
    assert found == pytest.approx(95 * norm.cdf(0.3 - d1) - 100 * norm.cdf(-d1), abs=1e-10)


@pytest.mark.parametrize("process", [Heston(), Bates(), ConstantElasticity()], ids=lambda p: p.kind)
@pytest.mark.parametrize("product", [EuropeanPut(), EuropeanCall()], ids=lambda p: p.kind)
def test_greeks_and_implied_volatilities_of_an_oracle_are_those_of_its_prices(process: Any, product: Any) -> None:
    problem = Problem(process, product)
    table, oracle = table_of(problem), oracle_of(problem)
    assert oracle is not None
    assert oracle.greeks is not None
    assert oracle.implied_volatility is not None
    by_differences = greeks_by_differences(problem, oracle.price, table)
    for ours, theirs in zip(oracle.greeks(table), by_differences, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * (1 + np.abs(ours).max()))
    implied = oracle.implied_volatility(table, oracle.price(table))
    c = problem.schema.row(*table.T)
    plain = np.stack([c.X0, c.K, c.T, c.r, c.d, implied], axis=1)
    known = np.isfinite(implied)
    assert known.sum() >= 20
    again = black_scholes.price(plain[known], problem.product.option or "put")
    np.testing.assert_allclose(again, oracle.price(table)[known], atol=1e-8)


def test_basket_oracle_knows_what_is_certain_and_says_where_nothing_goes_up_together() -> None:
    assert basket.price(np.array([40.0, 60.0]), np.zeros((2, 2)), 95.0, "call") == 5.0
    assert basket.price(np.array([40.0, 60.0]), np.zeros((2, 2)), 95.0, "put") == 0.0
    with pytest.raises(NumericsError, match="no direction moves all of them up"):
        basket.price(np.array([50.0, 50.0]), np.array([[0.04, -0.04], [-0.04, 0.04]]), 95.0, "call")


def test_labels_move_a_correlation_of_one_back_into_what_there_is() -> None:
    problem = Problem(Heston(), EuropeanPut())
    domain = resolve_domain({"rho": {"lower": 0.9999, "upper": 1.0}}, problem.schema)
    source = ExampleSource(Simulation(problem, small_simulation(timesteps=2)), domain, differential=True)
    contracts = source.contracts(0, 256)
    column = problem.schema.column("rho")
    assert float(contracts.moved[:, column].max()) <= 1.0
    assert bool((contracts.moved[:, column] != contracts.table[:, column]).all())


def test_a_server_may_be_told_the_bounds_of_as_many_assets_as_there_are() -> None:
    assert {"X1", "X16", "d16", "v16", "b16", "p1_2", "p15_16", "K", "T"} <= set(known_fields())


# --- schemes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "precision"),
    [
        (Problem(Bates(), EuropeanPut()), Precision.float64),
        (Problem(ConstantElasticity(), EuropeanPut()), Precision.float64),
        *(
            (Problem(process, BasketPut(n_assets=process.n_assets)), precision)
            for process, precision in zip(SEVERAL, [*reversed(Precision), *Precision], strict=True)
        ),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_simulated_prices_are_the_oracles(problem: Problem, precision: Precision) -> None:
    table, oracle = table_of(problem), oracle_of(problem)
    assert oracle is not None
    steps = 1 if problem.process.exact else 64
    payoffs = paths.simulate(
        problem, table, 5, seed=2, paths=1 << 16, steps=steps, precision=precision, sampling="pseudorandom"
    ).astype(np.float64)
    spots = problem.law(torch.from_numpy(table)).spot.numpy()
    error = np.hypot(payoffs.std(axis=1) / 256, 3e-5 * spots)
    away = (payoffs.mean(axis=1) - oracle.price(table)) / error
    assert np.abs(away).max() < 4.5, away


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize(
    "process", [Bates(), ConstantElasticity(), LiftedRoughHeston(hurst=0.3, factors=3)],
    ids=lambda p: p.kind,
)  # fmt: skip
def test_forwards_are_exact_whatever_the_steps(process: Process, steps: int) -> None:
    problem = Problem(process, TerminalPrice())
    table = table_of(problem)
    prices = paths.simulate(
        problem, table, 5, seed=2, paths=1 << 14, steps=steps, precision=Precision.float64, sampling="pseudorandom"
    )
    expected = problem.law(torch.from_numpy(table)).forward.numpy()
    assert (np.abs(prices.mean(axis=1) - expected) / (prices.std(axis=1) / 128)).max() < 4.5
    assert prices.min() >= 0


@pytest.mark.slow
def test_the_number_of_jumps_is_poissons_to_the_last_that_is_told_apart() -> None:
    process = Bates()
    problem = Problem(process, EuropeanPut())
    for intensity in (0.0, 0.02, 1.0, 20.0):
        contract = one(problem, **{**JUMPS, "intensity": intensity, "K": 100.0})[0]
        k = process.coefficients(problem.schema.row(*contract), 0.05)
        above = norm.sf(np.array(k[11:15]))
        np.testing.assert_allclose(above, poisson.sf(np.arange(4), intensity * 0.05), atol=1e-14)
    outer = process.outer_coefficients(problem.schema.row(*one(problem, **{**JUMPS, "K": 1.0})[0]), 0.05)
    chances = poisson.cdf(np.arange(4), 0.3)
    for count, edge in enumerate(chances):
        for side, told in ((-1e-6, count), (1e-6, count + 1)):
            assert process.count(float(norm.ppf(edge + side)), outer) == told
    assert process.count(-6.0, outer) == 0


def test_a_quantile_is_where_the_tail_says() -> None:
    for p in (0.0, 1e-12, 0.02, 0.5, 0.7, 1 - 1e-9, 1.0):
        expected = {0.0: 40.0, 1.0: -40.0}.get(p, norm.isf(p))
        assert quantile_of_tail(p) == pytest.approx(expected, abs=1e-7 if p > 0.9 else 1e-12)


@pytest.mark.slow
def test_prices_are_absorbed_at_nothing_and_stay_there() -> None:
    problem = Problem(ConstantElasticity(), TerminalPrice())
    contract = one(problem, X0=100.0, K=100.0, T=2.0, r=0.0, d=0.0, v=0.6, beta=0.0)
    prices = paths.simulate(
        problem, contract, 0, seed=1, paths=1 << 17, steps=256, precision=Precision.float64, sampling="pseudorandom"
    )
    # Bachelier's model, absorbed: by reflection.
    assert (prices == 0).mean() == pytest.approx(2 * norm.cdf(-1 / (0.6 * np.sqrt(2))), abs=0.01)
    assert prices.mean() == pytest.approx(100.0, abs=1.0)


@pytest.mark.parametrize("process", SEVERAL, ids=lambda p: f"{p.kind} {p.n_assets}")
def test_correlations_are_those_of_the_fields(process: SeveralAssets) -> None:
    problem = Problem(process, BasketPut(n_assets=process.n_assets))
    table = table_of(problem)
    factor = process.factor(problem.schema.row(*torch.from_numpy(table).unbind(dim=1))).numpy()
    count = process.n_assets
    for row, contract in enumerate(table):
        c = problem.schema.row(*contract)
        mixing = process.mixing(c)
        below = [mixing[i * (i - 1) // 2 + j] for i in range(count) for j in range(i)]
        np.testing.assert_allclose(factor[row][np.tril_indices(count, -1)], below, atol=1e-14)
        np.testing.assert_allclose(np.diag(factor[row]), mixing[-count:], atol=1e-14)
        correlation = factor[row] @ factor[row].T
        np.testing.assert_allclose(np.diag(correlation), 1, atol=1e-14)
        if isinstance(process, OneFactorGBM):
            loadings = np.array([getattr(c, f"b{i + 1}") for i in range(count)])
            wanted = np.outer(loadings, loadings) + np.diag(1 - loadings**2)
            np.testing.assert_allclose(correlation, wanted, atol=1e-14)
        else:
            assert correlation[0, 1] == pytest.approx(c.p1_2)


def test_partial_correlations_of_one_give_a_matrix_still() -> None:
    process = CorrelatedGBM(n_assets=3)
    problem = Problem(process, BasketPut(n_assets=3))
    edge = dict.fromkeys(process.rhos, 1.0) | {"p1_2": -1.0}
    contract = dict.fromkeys(problem.schema.names, 0.2) | edge
    mixing = np.array(process.mixing(problem.schema.row(*(contract[name] for name in problem.schema.names))))
    assert np.isfinite(mixing).all()
    assert mixing[0] == -1


@pytest.mark.slow
def test_rough_heston_meets_values_of_the_literature() -> None:
    problem = Problem(LiftedRoughHeston(), EuropeanCall())
    common = {"X0": 100.0, "r": 0.03, "d": 0.0, "v0": 0.04, "kappa": 0.3, "theta": 0.04, "xi": 0.4, "rho": -0.7}
    for strike, expiry, value in ((100.0, 0.25, 3.793313), (100.0, 1.0, 8.336634), (130.0, 1.0, 0.202295)):
        table = np.repeat(one(problem, **common, K=strike, T=expiry), 4, axis=0)
        payoffs = paths.simulate(
            problem, table, 0, seed=1, paths=1 << 16, steps=64, precision=Precision.float64, sampling="sobol"
        )
        means = payoffs.mean(axis=1)
        assert abs(means.mean() - value) < 0.005 + 4 * means.std() / np.sqrt(4)


@pytest.mark.parametrize(
    ("hurst", "factors", "apart"), [(0.1, 5, 0.06), (0.1, 7, 0.04), (0.3, 5, 0.03), (0.3, 3, 0.12)]
)
def test_exponentials_follow_the_kernel_over_three_decades(hurst: float, factors: int, apart: float) -> None:
    speeds, weights = (np.array(values) for values in exponentials(hurst, factors))
    t = np.geomspace(1e-3, 1, 50)
    found = np.exp(-np.outer(t, speeds)) @ weights
    np.testing.assert_allclose(found, t ** (hurst - 0.5) / math.gamma(hurst + 0.5), rtol=apart)
    assert (weights > 0).all()
    assert (np.diff(speeds) > 0).all()


def test_labels_do_not_move_what_paths_jump_with() -> None:
    problem = Problem(Bates(), EuropeanPut())
    view = View(problem, resolve_domain({}, problem.schema))
    moves = view.moves(torch.from_numpy(table_of(problem)))
    still = {name for name, column in zip(problem.schema.names, moves.T, strict=True) if bool((column == 0).all())}
    assert still == {"K", "intensity", "T"}


# --- together with the rest --------------------------------------------------------------------------------


def test_steps_follow_from_the_domain_and_from_the_dates() -> None:
    def steps(process: Process, product: Any, **domain: Any) -> int:
        problem = Problem(process, product)
        return problem.default_steps(resolve_domain(domain, problem.schema))

    assert steps(Heston(), EuropeanPut()) == 48  # kappa dt is 1/4 at kappa = 6 and T = 2
    assert steps(Heston(), EuropeanPut(), kappa={"lower": 0.3, "upper": 1.0}) == 32  # a sixteenth of a year
    assert steps(Heston(), ArithmeticAsianPut(dates=20)) == 60
    assert steps(Heston(), ArithmeticAsianPut(dates=250)) == 250
    assert steps(Bates(), EuropeanPut(), intensity={"lower": 10.0, "upper": 20.0}) == 200  # a fifth of a jump
    assert steps(GeometricBrownianMotion(), EuropeanPut()) == 1
    assert steps(GeometricBrownianMotion(), ArithmeticAsianPut(dates=12)) == 12
    assert steps(CorrelatedGBM(), BasketPut()) == 1


def test_an_experiment_has_the_steps_that_its_problem_needs_unless_it_says_how_many() -> None:
    def steps(**simulation: Any) -> int:
        return make_experiment("one", {"simulation": simulation}).simulation.sim_params.timesteps

    heston, put = {"kind": "heston"}, {"kind": "european_put"}
    assert steps(process=heston, product=put) == 48
    assert steps(process=heston, product=put, sim_params={"timesteps": 8}) == 8
    assert steps(process=heston, product={"kind": "arithmetic_asian_put", "dates": 20}) == 60
    assert steps(product=put) == 16
    assert steps() == 16
    assert make_experiment("one", {"simulation": {"process": heston, "product": put}}).training.differential == 0
    given = make_experiment(
        "one", {"simulation": {"process": heston, "product": put}, "training": {"differential": 0.2}}
    )
    assert given.training.differential == 0.2
    assert make_experiment("one", {"simulation": {"product": put}}).training.differential == 0.3
    with pytest.raises(ConfigError, match="there is no process of the kind 'hestn'"):
        steps(process={"kind": "hestn"}, product=put)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(Bates(), EuropeanPut()),
        CEV,
        Problem(LiftedRoughHeston(hurst=0.2), EuropeanPut()),
        *(Problem(process, BasketCall(n_assets=process.n_assets)) for process in SEVERAL),
    ],
    ids=lambda problem: problem.name,
)
def test_the_network_sees_numbers_all_over_the_domain(problem: Problem) -> None:
    view = View(problem, resolve_domain({}, problem.schema))
    view.check()
    table = torch.from_numpy(table_of(problem, 256))
    features = view.features(table)
    assert bool(features.isfinite().all())
    assert float(features.abs().max()) < 30
    bounds = view.bounds(table)
    price = view.anchor(table) * view.unit(table)
    assert bool((price >= bounds.lower - 1e-2 * view.unit(table)).all())
    assert problem.certain_payoffs(table[:3]).shape == (3,)


def test_kinds_are_made_from_settings_and_wrong_ones_are_refused() -> None:
    assert process_of({"kind": "correlated_gbm", "n_assets": 3}) == CorrelatedGBM(n_assets=3)
    assert process_of({"kind": "lifted_rough_heston", "hurst": 0.2, "factors": 3}).title.startswith("rough Heston of 3")
    assert product_of({"kind": "basket_put", "n_assets": 2, "weights": [0.3, 0.7]}) == BasketPut(weights=(0.3, 0.7))
    with pytest.raises(ConfigError, match=r"product basket_put: weights must be 3 numbers above 0, got \(0.3, 0.7\)$"):
        product_of({"kind": "basket_put", "n_assets": 3, "weights": [0.3, 0.7]})
    with pytest.raises(ConfigError, match=r"correlated_gbm has 3 assets and basket_put is on 2"):
        Problem(CorrelatedGBM(n_assets=3), BasketPut())
    with pytest.raises(ConfigError, match="correlated_gbm has 2 assets and european_put is on 1"):
        Problem(CorrelatedGBM(), EuropeanPut())
    with pytest.raises(ConfigError, match=r"process lifted_rough_heston: H: Extra .*; its settings: hurst, factors$"):
        process_of({"kind": "lifted_rough_heston", "H": 0.1})
    with pytest.raises(ConfigError, match="hurst"):
        process_of({"kind": "lifted_rough_heston", "hurst": 0.6})
    with pytest.raises(ConfigError, match="n_assets"):
        process_of({"kind": "one_factor_gbm", "n_assets": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        Problem(Bates(), EuropeanPut()),
        CEV,
        Problem(LiftedRoughHeston(factors=3), ArithmeticAsianPut(dates=4)),
    ],
    ids=lambda problem: problem.name,
)
def test_each_is_learnt_resumed_bit_for_bit_and_has_finite_sensitivities(problem: Problem) -> None:
    params = small_simulation(timesteps=4)
    config = ProblemConfig(process=problem.process, product=problem.product, sim_params=params)
    model = build_cvnn(params, CVNNConfig(hidden=(16, 16)), problem=problem)
    pricer = GbmCVNNPricer(GbmCVNNPricerConfig(cfg=config, domain_bounds={}, cvnn=model))
    pricer.train(small_training(6, batch_size=32))
    again = GbmCVNNPricer(pricer.snapshot())
    assert pricer.train(small_training(3)).loss == again.train(small_training(3)).loss
    table = table_of(problem, 64)
    np.testing.assert_array_equal(pricer.predict_price(table), again.predict_price(table))
    ends = np.array([[getattr(field, end) for field in problem.schema] for end in ("lower", "upper")])
    for values in pricer.predict_sensitivities(np.concatenate([table, ends])):
        assert np.isfinite(values).all()


@pytest.mark.slow
def test_several_assets_are_learnt_and_have_sensitivities_but_no_greeks_of_one_spot() -> None:
    problem = Problem(OneFactorGBM(n_assets=3), BasketPut(n_assets=3))
    params = small_simulation(timesteps=1)
    config = ProblemConfig(process=problem.process, product=problem.product, sim_params=params)
    model = build_cvnn(params, CVNNConfig(hidden=(24, 24)), problem=problem)
    pricer = GbmCVNNPricer(GbmCVNNPricerConfig(cfg=config, domain_bounds={}, cvnn=model))
    pricer.train(small_training(200, batch_size=64, differential=0.3))
    table = table_of(problem, 128)
    error = price_error(pricer, table)
    assert error.reference == "quadrature"
    assert error.rmse < 60
    assert pricer.predict_sensitivities(table[:4])._fields == problem.schema.names
    with pytest.raises(ConfigError, match="has no field 'v', and so no such Greek"):
        pricer.predict_greeks(table[:4])
    certain = table[:1].copy()
    certain[0, problem.schema.column("T")] = 0
    paid = max(certain[0, problem.schema.column("K")] - certain[0, :3].mean(), 0)
    assert float(np.asarray(pricer.predict_price(certain, outside="warn"))[0]) == pytest.approx(paid)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        Problem(Bates(), EuropeanPut()),
        Problem(ConstantElasticity(), EuropeanPut()),
        Problem(LiftedRoughHeston(factors=3), EuropeanPut()),
        *(Problem(process, BasketPut(n_assets=process.n_assets)) for process in SEVERAL[:2]),
    ],
    ids=lambda problem: problem.name,
)
def test_compiled_methods_give_what_they_give_in_python(problem: Problem) -> None:
    table = table_of(problem, 2)
    got = simulated(problem, table, 16, steps=8, precision=Precision.float64)
    for row, contract in enumerate(table):
        z = philox_increments(7, 3 + row, 1, 8 * problem.process.normals, 16, Precision.float64)[0]
        named = dict(zip(problem.schema.names, contract.tolist(), strict=True))
        paid = [in_python(problem, named, z[:, path], 8) for path in range(16)]
        np.testing.assert_allclose(got[row], paid, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        *(Problem(process, EuropeanPut()) for process in (Heston(), Bates(), LiftedRoughHeston(factors=3))),
        Problem(ConstantElasticity(), EuropeanPut()),
        *(Problem(process, BasketPut(n_assets=process.n_assets)) for process in SEVERAL[:2]),
    ],
    ids=lambda problem: problem.name,
)
def test_at_expiry_every_path_pays_what_is_certain(problem: Problem) -> None:
    table = table_of(problem, 4)
    table[:, problem.schema.column("T")] = 0
    paid = problem.certain_payoffs(torch.from_numpy(table))
    found = simulated(problem, table, 32, steps=4)
    np.testing.assert_allclose(found, np.repeat(paid[:, None], 32, axis=1), atol=1e-9)
    if is_conditional(problem):
        (outer,) = paths.simulate_priced(
            problem, [table], 0, seed=1, paths=32, steps=4, precision=Precision.float64, sampling="pseudorandom"
        )
        np.testing.assert_allclose(outer[:, 0], found, atol=1e-9)
        np.testing.assert_allclose(outer[:, 1], found, atol=1e-4)


class Sums(GeometricBrownianMotion):
    """Whatever is taken over ranges."""

    count: int = 3
    names: tuple[str, ...] = ("r", "d")

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        rates = tuple(getattr(c, self.names[i]) * dt for i in range(2))
        return (*rates, c.v * math.sqrt(dt), *super().coefficients(c, dt))

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        triangle = sum(sum(k[2] * j for j in range(i)) for i in range(self.count))
        flat = tuple(k[i] + j for i in range(2) for j in range(self.count - 1))
        nothing = sum(k[i] for i in range(0))
        least, most = min(flat[i] for i in range(4)), max(flat[i] for i in range(4))
        return (state[0] + triangle * normals[0] + least - most + nothing,)

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        return k[5] * math.exp(state[0])


def test_sums_and_tuples_over_ranges_are_what_they_are_in_python() -> None:
    problem = Problem(Sums(), EuropeanCall())
    table = table_of(problem, 1)
    got = simulated(problem, table, 8, steps=2, precision=Precision.float64)
    z = philox_increments(7, 3, 1, 2, 8, Precision.float64)[0]
    named = dict(zip(problem.schema.names, table[0].tolist(), strict=True))
    np.testing.assert_allclose(got[0], [in_python(problem, named, z[:, path], 2) for path in range(8)], rtol=1e-12)


class OverState(GeometricBrownianMotion):
    """A range that is not known beforehand."""

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(normals[0] for i in range(len(state))),)


class Filtered(GeometricBrownianMotion):
    """A condition in the range."""

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(normals[0] for i in range(3) if i),)


class Unnamed(GeometricBrownianMotion):
    """A name that is not known beforehand."""

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        name = "v"
        return (getattr(c, name) * dt, 0.0, c.X0)


@pytest.mark.parametrize(
    ("process", "why"),
    [
        (OverState(), r"OverState.step in .*, line \d+, cannot be compiled: .*the range must be known beforehand"),
        (Filtered(), r"Filtered.step in .*, line \d+, cannot be compiled: .*taken over ranges, without conditions"),
        (Unnamed(), r"Unnamed.coefficients in .*, line \d+, cannot be compiled: .*the name must be known beforehand"),
    ],
)
def test_what_cannot_be_written_out_is_one_clear_error(process: Process, why: str) -> None:
    problem = Problem(process, EuropeanCall())
    with pytest.raises(ConfigError, match=why):
        simulated(problem, table_of(problem, 1), 8, steps=2)
