"""Products: what they pay against their oracles, what is expected of them, and what they promise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.recipes import read_sweep
from smc.errors import ConfigError
from smc.learning.scale import View
from smc.problem.conditional import estimator_of
from smc.problem.contracts import resolve_domain
from smc.problem.oracles import log_normal
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import _PROCESSES, Problem, product_of
from smc.problem.process import Process
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import DownAndInPut, DownAndOutCall, UpAndInCall, UpAndOutCall, UpAndOutPut
from smc.problem.products.bermudan import BermudanOption, BermudanPut
from smc.problem.products.cliquet import Cliquet
from smc.problem.products.double_barrier import DoubleKnockOutCall
from smc.problem.products.european import EuropeanPut
from smc.problem.products.extremes import BestOfCall
from smc.problem.products.geometric_asian import GeometricAsianCall
from smc.problem.products.lookback import FloatingLookbackCall, FloatingLookbackPut, LookbackCall, LookbackPut
from smc.problem.products.spread import SpreadCall
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation
from tests.test_problem.products import kinds, products

GBM = GeometricBrownianMotion()


def named(product: Product) -> str:
    rest = (str(getattr(product, name)) for name in ("monitoring", "over") if hasattr(product, name))
    return " ".join((product.kind, *rest))


def problem_of(product: Product, process: Process | None = None) -> Problem:
    if process is None:
        process = GBM if product.assets == 1 else CorrelatedGBM(n_assets=product.assets)
    return Problem(process, product)


def sample(problem: Problem, count: int) -> np.ndarray:
    return SobolSampler(resolve_domain({}, problem.schema), seed=3, schema=problem.schema).sample(count)


def simulation_of(problem: Problem, *, steps: int = 16, paths: int = 4096) -> Simulation:
    params = SimulationParams(timesteps=steps, network_size=64, batches_per_mc_run=paths // 64, mc_seed=1)
    return Simulation(problem, params, conditional=True)


# --- against oracles ----------------------------------------------------------------------------------

VALUES: tuple[tuple[Product, dict[str, float], float, float], ...] = (
    (
        ArithmeticAsianCall(over="time"),
        {"X0": 2, "K": 2, "r": 0.02, "d": 0, "v": 0.1, "T": 1},
        0.05598604154402069,
        1e-13,
    ),
    (
        ArithmeticAsianCall(over="time"),
        {"X0": 2, "K": 2, "r": 0.05, "d": 0, "v": 0.5, "T": 2},
        0.350095218965402,
        1e-13,
    ),
    (ArithmeticAsianCall(dates=52), {"X0": 100, "K": 100, "r": 0.05, "d": 0, "v": 0.3, "T": 1}, 8.06778245696, 1e-9),
    (
        ArithmeticAsianPut(dates=11, over="today and dates"),
        {"X0": 90, "K": 87, "r": 0.025, "d": 0.06, "v": 0.13, "T": 11 / 12},
        1.699284718,
        1e-8,
    ),
    (GeometricAsianCall(dates=10), {"X0": 100, "K": 100, "r": 0.06, "d": 0.03, "v": 0.2, "T": 1}, 5.3425606635, 1e-9),
    (
        DownAndOutCall(monitoring="continuous", rebate=3),
        {"X0": 100, "K": 90, "H": 0.95, "r": 0.08, "d": 0.04, "T": 0.5, "v": 0.25},
        9.02456769497,
        1e-10,
    ),
    (
        UpAndOutCall(monitoring="continuous", rebate=3),
        {"X0": 100, "K": 100, "H": 1.05, "r": 0.08, "d": 0.04, "T": 0.5, "v": 0.25},
        2.35801979084,
        1e-10,
    ),
    (
        DownAndInPut(monitoring="continuous", rebate=3),
        {"X0": 100, "K": 100, "H": 0.95, "r": 0.08, "d": 0.04, "T": 0.5, "v": 0.25},
        6.56770537669,
        1e-10,
    ),
    (
        UpAndInCall(monitoring="continuous"),
        {"X0": 100, "K": 100, "H": 1.1, "r": 0.05, "d": 0.02, "T": 1, "v": 0.25},
        11.06147956779,
        1e-10,
    ),
    (
        DownAndOutCall(dates=50),
        {"X0": 100, "K": 100, "H": 0.99, "r": 0.1, "d": 0, "T": 0.2, "v": 0.3},
        2.3363868958,
        1e-9,
    ),
    (
        DoubleKnockOutCall(monitoring="continuous"),
        {"X0": 100, "K": 100, "L": 0.7, "H": 1.3, "r": 0.1, "d": 0, "T": 0.25, "v": 0.25},
        4.8293174599,
        1e-9,
    ),
    (
        FloatingLookbackCall(monitoring="continuous"),
        {"X0": 120, "M": 100 / 120, "r": 0.1, "d": 0.06, "T": 0.5, "v": 0.3},
        25.35335527181,
        1e-10,
    ),
    (
        FloatingLookbackPut(monitoring="continuous"),
        {"X0": 100, "M": 1, "r": 0.1, "d": 0, "T": 0.5, "v": 0.3},
        15.35255546789,
        1e-10,
    ),
    (
        LookbackCall(monitoring="continuous"),
        {"X0": 100, "K": 100, "M": 1, "r": 0.1, "d": 0, "T": 1, "v": 0.2},
        21.54886819701,
        1e-10,
    ),
    (
        LookbackPut(monitoring="continuous"),
        {"X0": 100, "K": 95, "M": 1, "r": 0.1, "d": 0, "T": 1, "v": 0.3},
        12.23753504345,
        1e-10,
    ),
    (FloatingLookbackPut(dates=160), {"X0": 100, "M": 1, "r": 0.1, "d": 0, "T": 0.5, "v": 0.3}, 14.261039547, 5e-10),
    (
        Autocallable(dates=3),
        {
            "X0": 100,
            "K": 100,
            "r": 0.03,
            "d": 0.01,
            "v": 0.25,
            "T": 3,
            "call_level": 1,
            "coupon_level": 1,
            "protection": 0.7,
            "coupon": 0.08,
        },
        93.68470157,
        1e-8,
    ),
    (BermudanPut(dates=50), {"X0": 36, "K": 40, "r": 0.06, "d": 0, "v": 0.2, "T": 1}, 4.4778111111, 1e-9),
    (BermudanPut(dates=100), {"X0": 44, "K": 40, "r": 0.06, "d": 0, "v": 0.4, "T": 2}, 5.6412360267, 1e-9),
    (
        SpreadCall(),
        {"X1": 100, "X2": 96, "K": 4, "r": 0.1, "d1": 0.05, "d2": 0.05, "v1": 0.2, "v2": 0.1, "p1_2": 0.5, "T": 1},
        6.653065107468672,
        1e-11,
    ),
    (
        BestOfCall(),
        {"X1": 100, "X2": 105, "K": 98, "r": 0.05, "d1": 0, "d2": 0, "v1": 0.11, "v2": 0.16, "p1_2": 0.63, "T": 0.5},
        11.6322888442,
        1e-9,
    ),
)


@pytest.mark.parametrize(("product", "contract", "value", "digits"), VALUES, ids=[named(row[0]) for row in VALUES])
def test_an_oracle_has_the_literature_s_value(
    product: Product, contract: dict[str, float], value: float, digits: float
) -> None:
    problem = problem_of(product)
    oracle = oracle_of(problem)
    assert oracle is not None
    table = np.array([[contract[name] for name in problem.schema.names]], dtype=np.float64)
    assert oracle.price(table)[0] == pytest.approx(value, abs=digits)


def test_what_is_knocked_in_and_what_is_knocked_out_are_the_option_together() -> None:
    for monitoring in ("dates", "continuous"):
        for way in ("up", "down"):
            for option in ("put", "call"):
                both = [problem_of(product_of({"kind": f"{way}_and_{what}_{option}", "dates": 4,
                                               "monitoring": monitoring})) for what in ("in", "out")]  # fmt: skip
                table = sample(both[0], 32)
                whole = Problem(GBM, product_of({"kind": f"european_{option}"}))
                plain = table[:, [both[0].schema.column(name) for name in whole.schema.names]]
                oracle = oracle_of(whole)
                assert oracle is not None
                total = sum(log_normal.price(problem, table) for problem in both)
                np.testing.assert_allclose(total, oracle.price(plain), atol=1e-9)


def test_many_dates_come_near_all_the_time() -> None:
    for kind in ("down_and_out_call", "floating_lookback_put", "double_knock_out_put", "lookback_put"):
        always = problem_of(product_of({"kind": kind, "monitoring": "continuous"}))
        table = sample(always, 8)
        exact, apart = log_normal.price(always, table), []
        for dates in (16, 256):
            found = log_normal.price(problem_of(product_of({"kind": kind, "dates": dates})), table)
            apart.append(np.abs(found - exact).max())
        assert 0 < apart[1] < 0.45 * apart[0]  # by the root of the number of dates


def check_against_oracle(product: Product, count: int, paths: int) -> None:
    if getattr(product, "over", "") == "time":  # the oracle has the integral, to which dates are an approximation
        product = product.model_copy(update={"dates": 64})
    problem = problem_of(product)
    oracle = oracle_of(problem)
    if oracle is None or isinstance(product, BermudanOption):
        return
    table = sample(problem, count)
    steps = 64 if product.continuous or product.dates == 64 else 8
    found = simulation_of(problem, steps=steps).price(table, paths)
    away = np.abs(found.price - oracle.price(table)) / (found.standard_error + 2e-4)
    assert away.max() < 6, named(product)


# A call differs from its put by a sign.
PUTS = [p for p in products() if not (p.kind.endswith("call") and p.kind.removesuffix("call") + "put" in kinds())]


@pytest.mark.long
@pytest.mark.parametrize("product", PUTS, ids=named)
def test_the_simulation_of_every_product_meets_its_oracle(product: Product) -> None:
    check_against_oracle(product, 8, 1 << 15)


# --- what is expected of a payoff ---------------------------------------------------------------------


def test_the_best_estimator_follows_from_process_and_product() -> None:
    note, barrier = Autocallable(dates=4), UpAndOutCall(dates=4)
    for process, product, estimator in (
        (GBM, note, "bridge"), (Heston(), note, "bridge"), (LiftedRoughHeston(), barrier, "bridge"),
        (Bates(), note, "payoff"), (ConstantElasticity(), note, "payoff"), (GBM, EuropeanPut(), "payoff"),
        (GeometricBrownianMotion(scheme="euler"), barrier, "payoff"), (Heston(), EuropeanPut(), "outer"),
        (GBM, UpAndOutCall(dates=4, rebate=1.0), "payoff"), (GBM, UpAndInCall(dates=4, rebate=1.0), "bridge"),
        (Heston(), UpAndOutCall(dates=4, monitoring="continuous"), "path"),
        (GBM, LookbackCall(dates=4, monitoring="continuous"), "payoff"), (GBM, LookbackCall(dates=4), "payoff"),
    ):  # fmt: skip
        assert estimator_of(Problem(process, product)) == estimator, (process.kind, named(product))


class PaysTwice(UpAndOutCall):
    """Changes what is paid, and not what is expected."""

    kind = "pays_twice"

    def vanilla(self, spot: float, k: tuple[float, ...]) -> float:
        """Twice."""
        return 2.0 * k[1] * max(spot - k[0], 0.0)

    def payoff(self, seen: tuple[float, ...], spot: float, k: tuple[float, ...]) -> float:
        """Twice."""
        return self.vanilla(spot, k) if seen[0] > 0.0 else 0.0


def test_a_payoff_that_is_changed_alone_is_not_priced_by_its_parent_s_formula() -> None:
    assert estimator_of(Problem(GBM, PaysTwice(dates=4))) == "payoff"
    assert estimator_of(Problem(GBM, PaysTwice(dates=4, monitoring="continuous"))) == "payoff"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "product", "share"),
    [
        (GBM, Autocallable(dates=4), 0.2),
        pytest.param(GBM, Autocallable(dates=6, memory=False), 0.2, marks=pytest.mark.long),
        pytest.param(GBM, UpAndInCall(dates=8, rebate=2.0), 0.5, marks=pytest.mark.long),
        pytest.param(GBM, DoubleKnockOutCall(dates=8), 0.6, marks=pytest.mark.long),
        (Heston(), UpAndOutCall(dates=8), 0.5),
        (GBM, UpAndOutPut(dates=8, monitoring="continuous", rebate=2.0), 0.95),
    ],
    ids=lambda part: part.kind if hasattr(part, "kind") else str(part),
)
def test_what_is_expected_is_right_and_has_less_noise(process: Process, product: Product, share: float) -> None:
    problem = Problem(process, product)
    contract = torch.from_numpy(sample(problem, 3))
    engine = simulation_of(problem, steps=24, paths=1024)
    for row in contract:
        (found,) = engine.simulate_priced([row.expand(256, -1).contiguous()], torch.tensor(5))
        means = found.payoffs.double().mean(dim=1)
        error = float((means - found.prices).std()) / 16
        assert abs(float(means.mean() - found.prices.mean())) < 5 * error + 1e-4
        assert float(found.prices.std()) <= share * float(means.std()) + 1e-4


def test_payoffs_beside_expected_ones_are_those_of_the_same_paths() -> None:
    problem = Problem(GBM, UpAndOutCall(dates=4))
    table, engine = torch.from_numpy(sample(problem, 4)), simulation_of(problem, steps=8, paths=256)
    (found,) = engine.simulate_priced([table], torch.tensor(0))
    apart = (found.payoffs - engine.simulate(table, torch.tensor(0))).abs() > 1e-3
    assert float(apart.double().mean()) < 0.002


# --- what every product says of itself ----------------------------------------------------------------


@pytest.mark.parametrize("product", products(), ids=named)
def test_features_anchor_and_bounds_are_finite_all_over_the_domain(product: Product) -> None:
    problem = problem_of(product)
    domain = resolve_domain({}, problem.schema)
    view = View(problem, domain)
    view.check()
    bounds = np.array([[domain[name].lower, domain[name].upper] for name in problem.schema.names])
    corners = np.random.default_rng(2).integers(0, 2, (512, len(bounds)))
    table = torch.from_numpy(np.where(corners == 0, bounds[:, 0], bounds[:, 1])).requires_grad_()
    features, unit, anchor, held = view.features(table), view.unit(table), view.anchor(table), view.bounds(table)
    assert bool(features.isfinite().all())
    assert bool((unit > 0).all())
    assert bool(anchor.isfinite().all())
    assert bool((held.lower <= held.upper + 1e-9).all())
    assert bool((held.lower <= held.payoff + 1e-9).all())
    (slope,) = torch.autograd.grad((anchor * unit).sum(), table)
    assert bool(slope.isfinite().all())


def test_a_price_does_not_depend_on_the_currency() -> None:
    for product in products():
        problem = problem_of(product)
        if isinstance(product, BermudanOption) or "cash" in product.kind or "digital" in product.kind:
            continue
        if product.notional == "nominal" or product.kind in ("terminal_price",):
            continue
        table = torch.from_numpy(sample(problem, 16))
        in_cents = table.clone()
        for column, field in enumerate(problem.schema):
            if (
                field.name in {f.name for f in problem.process.fields[: problem.process.assets]}
                or "currency" in field.unit
            ):
                in_cents[:, column] *= 100
        view = View(problem, resolve_domain({}, problem.schema))
        for of, factor in ((view.unit, 100), (view.anchor, 1)):
            torch.testing.assert_close(of(in_cents), factor * of(table), rtol=1e-9, atol=1e-9)


# --- what does not go together ------------------------------------------------------------------------


def test_what_is_looked_at_all_the_time_needs_prices_that_do_not_jump() -> None:
    with pytest.raises(
        ConfigError, match="looks at prices between dates, and what they do there is not known of bates"
    ):
        Problem(Bates(), UpAndOutCall(monitoring="continuous"))
    Problem(Bates(), UpAndOutCall())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "forward_start_call", "dates": 3, "start": 3}, "start must be below dates, which is 3, got 3"),
        ({"kind": "up_and_out_call", "rebate": -1}, "rebate: Input should be greater than or equal to 0, got -1"),
        ({"kind": "lookback_put", "monitoring": "daily"}, "monitoring: Input should be 'dates' or 'continuous'"),
        (
            {"kind": "arithmetic_asian_put", "over": "years"},
            "over: Input should be 'dates', 'today and dates' or 'time'",
        ),
        ({"kind": "autocallable", "nominal": 0}, "nominal: Input should be greater than 0, got 0"),
        ({"kind": "worst_of_autocallable", "n_assets": 1}, "n_assets: Input should be greater than or equal to 2"),
        ({"kind": "autocalable"}, "there is no product of the kind 'autocalable': there are arithmetic_asian_call"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        product_of(settings)


@cache
def pairs() -> set[tuple[str, str]]:
    """Every process and product that go together, as they are."""
    found = set()
    for name, process in _PROCESSES.items():
        for kind, product in kinds().items():
            try:
                Problem(process(), product())
            except ConfigError:
                continue
            found.add((name, kind))
    return {(name, kind) for name, kind in found if kind != "terminal_price" and
            _PROCESSES[name].__module__.startswith("smc.")}  # fmt: skip


def test_the_sweep_of_products_has_every_pair() -> None:
    _, experiments = read_sweep(Path("sweeps/products.yaml"))
    problems = [experiment.simulation.problem for experiment in experiments]
    assert {(p.process.kind, p.product.kind) for p in problems} == pairs()
    assert sum(p.product.continuous for p in problems) == 9


def test_a_cliquet_pays_the_sum_of_clipped_returns() -> None:
    cliquet = Cliquet(dates=3, nominal=50.0)
    problem = Problem(GBM, cliquet)
    values = {"X0": 100, "cap": 0.05, "floor": -0.02, "least": 0.01, "T": 1, "r": 0, "d": 0, "v": 0.2}
    contract = problem.schema.row(*(values[name] for name in problem.schema.names))
    k = cliquet.coefficients(contract)
    seen = cliquet.begin(k)
    for date, price in enumerate((110.0, 99.0, 100.0), 1):
        seen = cliquet.observe(seen, price, float(date), k)
    assert cliquet.payoff(seen, 100.0, k) == pytest.approx(50 * (0.05 - 0.02 + 1 / 99))
    assert cliquet.payoff((-0.06, 100.0), 100.0, k) == pytest.approx(0.5)


def test_a_note_pays_what_its_terms_say() -> None:
    note = Autocallable(dates=3)
    problem = Problem(GBM, note)
    values = {"X0": 100, "K": 100, "call_level": 1.0, "coupon_level": 0.8, "protection": 0.6, "coupon": 0.02, "T": 3,
              "r": 0.1, "d": 0, "v": 0.2}  # fmt: skip
    k = note.coefficients(problem.schema.row(*(values[name] for name in problem.schema.names)))
    grown = np.exp(-0.1 * np.arange(1, 4))

    def paid(*prices: float) -> float:
        seen = note.begin(k)
        for date, price in enumerate(prices, 1):
            seen = note.observe(seen, price, float(date), k)
        return note.payoff(seen, prices[-1], k)

    assert paid(105, 50, 50) == pytest.approx(102 * grown[0])  # called at once
    assert paid(70, 100, 50) == pytest.approx(104 * grown[1])  # with the coupon that was missed
    assert paid(85, 70, 90) == pytest.approx(2 * grown[0] + 104 * grown[2])
    assert paid(70, 70, 70) == pytest.approx(100 * grown[2])  # protected
    assert paid(90, 70, 55) == pytest.approx(2 * grown[0] + 55 * grown[2])
    forgets = Autocallable(dates=3, memory=False).observe((1.0, 0.0, 0.0, 1.0), 70.0, 1.0, k)
    assert forgets[2] == 0
    assert note.observe((1.0, 0.0, 0.0, 1.0), 70.0, 1.0, k)[2] == 1


# --- limits -------------------------------------------------------------------------------------------


def one(problem: Problem, **values: float) -> np.ndarray:
    usual = {"X0": 100, "K": 90, "T": 1, "r": 0.04, "d": 0.01, "v": 0.2, "H": 1.3, "L": 0.7, "M": 1.0} | values
    row = [usual.get(field.name, (field.lower + field.upper) / 2) for field in problem.schema]
    return np.array([row], dtype=np.float64)


@pytest.mark.parametrize("product", products(), ids=named)
def test_where_nothing_is_random_the_oracle_has_what_is_certain(product: Product) -> None:
    problem = problem_of(product)
    oracle = oracle_of(problem)
    if oracle is None or (product.continuous and getattr(product, "rebate", 0.0)):
        return
    if getattr(product, "over", "") == "time":  # whose dates are an approximation
        return
    down = {"H": 0.8} if product.kind.startswith("down") else {}
    for values in ({"T": 0.0}, {"v": 0.0, "v1": 0.0, "v2": 0.0}):
        table = one(problem, **down, **values)
        certain = problem.certain_payoffs(torch.from_numpy(table))
        np.testing.assert_allclose(oracle.price(table), certain, atol=1e-6)


def test_lookbacks_have_a_price_without_growth() -> None:
    for kind in ("lookback_call", "lookback_put", "floating_lookback_call", "floating_lookback_put"):
        problem = problem_of(product_of({"kind": kind, "monitoring": "continuous"}))
        exact = log_normal.price(problem, one(problem, r=0.02, d=0.02))
        near = log_normal.price(problem, one(problem, r=0.02 + 1e-5, d=0.02))
        np.testing.assert_allclose(exact, near, atol=2e-3)


def test_greeks_at_an_extreme_of_today_are_the_limit_of_those_before() -> None:
    problem = problem_of(FloatingLookbackPut(monitoring="continuous"))
    oracle = oracle_of(problem)
    assert oracle is not None
    assert oracle.greeks is not None
    at, beside = (oracle.greeks(one(problem, M=extreme)) for extreme in (1.0, 1.004))
    np.testing.assert_allclose(at.delta, beside.delta, atol=0.02)
    np.testing.assert_allclose(at.gamma, beside.gamma, rtol=0.05)


def test_what_is_absorbed_at_nothing_still_pays_a_number() -> None:
    cliquet = Cliquet(dates=2)
    k = (100.0, 0.05, -0.02, 0.0, 100.0)
    assert cliquet.payoff(cliquet.observe(cliquet.observe((0.0, 100.0), 0.0, 1.0, k), 0.0, 2.0, k), 0.0, k) == 0.0
    problem = Problem(ConstantElasticity(), Cliquet(dates=4))
    table = one(problem, beta=0.0, v=0.6, T=2.0, r=0.0, d=0.04)
    assert bool(simulation_of(problem, steps=32).payoffs(table).isfinite().all())


def test_a_rebate_is_paid_when_the_barrier_is_passed_and_not_at_the_end_of_a_step() -> None:
    problem = problem_of(UpAndOutCall(monitoring="continuous", rebate=10.0))
    table = one(problem, r=0.08, d=0.0, T=2.0, v=0.3, H=1.2)
    engine = simulation_of(problem, steps=16, paths=4096)
    (found,) = engine.simulate_priced([torch.from_numpy(np.repeat(table, 64, axis=0))], torch.tensor(0))
    assert float(found.prices.mean()) == pytest.approx(log_normal.price(problem, table)[0], abs=0.01)


def test_a_note_pays_no_more_than_its_bound_says() -> None:
    problem = problem_of(Autocallable(dates=4))
    table = one(problem, call_level=1.1, coupon_level=0.5, protection=1.3, coupon=0.05, r=-0.02, v=0.4, K=100.0)
    paid = simulation_of(problem, steps=4).payoffs(table)
    assert float(paid.max()) <= float(problem.product.bounds(problem.law(torch.from_numpy(table))).payoff) + 1e-3
