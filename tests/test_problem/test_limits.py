"""Where products, oracles and what is compiled of them come to an end: small volatilities, many dates, odd settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.recipes import make_experiment
from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.prediction.evaluation import Measure
from smc.prediction.reference import Reference
from smc.prediction.soundness import soundness
from smc.problem.conditional import estimator_of
from smc.problem.contracts import contract_array, resolve_domain
from smc.problem.exercise import Policy
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import Problem, product_of
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.product import Product
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import UpAndOutCall
from smc.problem.products.bermudan import BermudanMaxCall, BermudanPut
from smc.problem.products.european import EuropeanCall
from smc.problem.products.floating_asian import GeometricAsianFloatingPut
from smc.problem.products.lookback import LookbackCall
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

GBM = GeometricBrownianMotion()
USUAL = {
    "X0": 100.0, "K": 100.0, "T": 1.0, "r": 0.03, "d": 0.01, "v": 0.25, "H": 1.2, "L": 0.8, "M": 1.2, "v0": 0.04,
    "kappa": 1.0, "theta": 0.04, "xi": 0.5, "rho": -0.5, "beta": 0.5, "call_level": 1.0, "coupon_level": 0.8,
    "protection": 0.7, "coupon": 0.02, "cap": 0.05, "floor": -0.03, "least": 0.0,
}  # fmt: skip


def one(problem: Problem, **fields: float) -> np.ndarray:
    """A contract."""
    return np.array([[({**USUAL, **fields})[name] for name in problem.schema.names]])


def exact(product: Product, **fields: float) -> float:
    problem = Problem(GBM, product)
    oracle = oracle_of(problem)
    assert oracle is not None
    return float(oracle.price(one(problem, **fields))[0])


# --- oracles ------------------------------------------------------------------------------------------

# By the same formulas with 500 digits, where images beyond a barrier weigh 1e16 and more.
SMALL_VOLATILITIES = (
    ("down_and_out_call", {"K": 70, "T": 2, "r": 0, "d": 0.1, "v": 0.03, "H": 0.82}, 6.530590784250643),
    ("down_and_out_call", {"K": 70, "T": 2, "r": 0, "d": 0.1, "v": 0.01, "H": 0.82}, 5.675527776524758),
    ("down_and_out_put", {"K": 100, "T": 2, "r": 0, "d": 0.1, "v": 0.03, "H": 0.82}, 6.52342029165162),
    ("down_and_out_put", {"K": 100, "T": 5, "r": 0, "d": 0.1, "v": 0.1, "H": 0.8}, 0.36849788123525656),
    ("double_knock_out_put", {"K": 110, "T": 2, "r": 0, "d": 0.2, "v": 0.05, "L": 0.7, "H": 1.3}, 8.357916720693307),
    ("double_knock_out_put", {"K": 110, "T": 5, "r": 0, "d": 0.1, "v": 0.05, "L": 0.5, "H": 1.6}, 45.861698694415146),
    ("double_knock_out_put", {"K": 110, "T": 2, "r": 0, "d": 0.2, "v": 0.1, "L": 0.5, "H": 1.6}, 41.15274539767145),
)


@pytest.mark.parametrize(("kind", "contract", "value"), SMALL_VOLATILITIES)
def test_formulas_keep_their_digits_where_images_weigh_much(
    kind: str, contract: dict[str, float], value: float
) -> None:
    assert exact(product_of({"kind": kind, "monitoring": "continuous"}), **contract) == pytest.approx(value, abs=1e-11)


@pytest.mark.parametrize("kind", ["lookback_call", "up_and_out_put", "double_knock_out_put"])
def test_next_to_no_volatility_is_no_volatility(kind: str) -> None:
    product = product_of({"kind": kind, "monitoring": "continuous"})
    nearly, none = (exact(product, v=v, K=110.0) for v in (1e-4, 0.0))
    assert nearly == pytest.approx(none, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "contract"),
    [
        ("bermudan_call", {"dates": 4}, {"K": 149.8, "T": 7.59, "r": 0.0695, "d": 0.189, "v": 0.02}),
        ("bermudan_call", {"dates": 4}, {"K": 62.2, "T": 13.04, "r": -0.086, "d": 0.181, "v": 0.0856}),
        ("cliquet", {"dates": 2}, {"T": 2, "r": 0.08, "d": 0, "v": 0.006, "cap": 0.02}),
        ("cliquet", {"dates": 4}, {"T": 2, "r": 0.08, "d": 0, "v": 0.001, "cap": 0.02}),
        ("autocallable", {}, {"T": 1e-8}),
        ("autocallable", {}, {"v": 1e-5}),
        ("autocallable", {}, {"T": 1 / 365, "v": 0.05}),
    ],
)
def test_oracles_answer_at_the_ends_of_what_is_allowed(
    kind: str, settings: dict[str, Any], contract: dict[str, float]
) -> None:
    assert 0 <= exact(product_of({"kind": kind, **settings}), **contract) < 200


def test_what_a_recursion_does_not_resolve_is_no_number() -> None:
    assert np.isnan(exact(product_of({"kind": "up_and_out_put", "dates": 4}), v=1e-5))


# By adaptive quadrature, one price integrated given the other.
OF_TWO = (
    ("basket_put", {"K": 98, "T": 2, "v1": 0.6, "v2": 0.6, "X2": 96, "d2": 0.02, "p1_2": -0.95}, 12.7191),
    ("basket_put", {"K": 98, "T": 2, "v1": 0.6, "v2": 0.6, "X2": 96, "d2": 0.02, "p1_2": -1.0}, 12.2938),
    ("spread_call", {"K": 4, "T": 2, "v1": 0.05, "v2": 0.6, "X2": 96, "p1_2": 0.8}, 29.674907100674),
    ("spread_call", {"K": 4, "T": 1, "v1": 0.3, "v2": 0.2, "X2": 96, "p1_2": 1.0}, 4.351277504111),
    ("spread_call", {"K": 4, "T": 1, "v1": 0.3, "v2": 0.2, "X2": 96, "p1_2": -1.0}, 19.482946867037),
)


@pytest.mark.parametrize(("kind", "contract", "value"), OF_TWO)
def test_two_assets_are_integrated_up_to_their_kinks(kind: str, contract: dict[str, float], value: float) -> None:
    problem = Problem(CorrelatedGBM(), product_of({"kind": kind}))
    usual = {"X1": 100.0, "X2": 100.0, "r": 0.03, "d1": 0.0, "d2": 0.0, **contract}
    oracle = oracle_of(problem)
    assert oracle is not None
    found = oracle.price(np.array([[float(usual[name]) for name in problem.schema.names]]))[0]
    assert found == pytest.approx(value, abs=1e-4 if kind == "basket_put" else 1e-10)


def test_a_basket_whose_assets_all_but_cancel_is_no_number() -> None:
    problem = Problem(CorrelatedGBM(n_assets=3), product_of({"kind": "basket_put", "n_assets": 3}))
    usual = {name: {"X": 100.0, "v": 0.4, "d": 0.0, "p": -0.4}.get(name[0], 0.03) for name in problem.schema.names}
    oracle = oracle_of(problem)
    assert oracle is not None

    def priced(**fields: float) -> float:
        contract = usual | {"K": 100.0, "T": 1.0} | fields
        return float(oracle.price(np.array([[contract[name] for name in problem.schema.names]]))[0])

    assert priced() > 0
    assert np.isnan(priced(p1_2=-0.99, p1_3=-0.99, v3=1e-3))


def test_of_a_slow_oracle_so_many_are_asked_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(GBM, EuropeanCall())
    oracle = oracle_of(problem)
    assert oracle is not None
    reference = Reference(problem)
    table = np.repeat(one(problem), 300, axis=0)
    assert len(reference.price(table).values) == 300
    slow = Reference(problem)
    monkeypatch.setattr(slow, "oracle", replace(oracle, slow=True))
    assert len(slow.price(table).values) == 128
    assert slow.greeks_of == 16


# --- what is compiled ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dates", [14, 26])
def test_a_note_may_have_as_many_dates_as_there_are_months(dates: int) -> None:
    problem = Problem(GBM, Autocallable(dates=dates))
    params = SimulationParams(timesteps=dates, network_size=64, batches_per_mc_run=64, mc_seed=1)
    engine = Simulation(problem, params, conditional=True)
    table = one(problem, T=2.0)
    (found,) = engine.simulate_priced([torch.from_numpy(np.repeat(table, 8, axis=0))], torch.tensor(0))
    assert float(found.prices.mean()) == pytest.approx(exact(problem.product, T=2.0), abs=0.02)
    assert float(found.payoffs.mean()) == pytest.approx(exact(problem.product, T=2.0), abs=0.3)


@pytest.mark.slow
def test_an_absorbed_price_has_a_geometric_average() -> None:
    problem = Problem(ConstantElasticity(), GeometricAsianFloatingPut(dates=4, over="time"))
    params = SimulationParams(timesteps=16, network_size=64, batches_per_mc_run=64, mc_seed=1, dtype=Precision.float64)
    payoffs = Simulation(problem, params).payoffs(one(problem, beta=0.0, v=0.6, T=2.0))
    assert bool(payoffs.isfinite().all())


class Displaced(Heston):
    """Another price of the same state."""

    kind = "displaced"

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        """Half of it does not move."""
        return 0.5 * k[7] + 0.5 * super().spot(state, k)


class FromElsewhere(Heston):
    """Another variance today."""

    kind = "from_elsewhere"

    def start(self, c: Any) -> tuple[float, ...]:
        """Four times as much."""
        return 0.0, 4.0 * c.v0


class Half(UpAndOutCall):
    """Another payoff, by what the payoff calls."""

    kind = "half"

    def vanilla(self, spot: float, k: tuple[float, ...]) -> float:
        """Half of it."""
        return 0.5 * k[1] * max(spot - k[0], 0.0)


class Bonus(Autocallable):
    """Another beginning."""

    kind = "bonus"

    def begin(self, k: tuple[float, ...]) -> tuple[float, ...]:
        """Five were paid."""
        return 1.0, 5.0, 0.0, 1.0


class Guessed(UpAndOutCall):
    """The same payoff, with another guess of its price."""

    kind = "guessed"

    def anchor(self, law: Any) -> Any:
        """Nothing."""
        return 0 * law.spot


def test_a_class_that_changes_a_path_anywhere_is_not_priced_by_its_parents_formula() -> None:
    changed = (
        Problem(Displaced(), EuropeanCall()), Problem(FromElsewhere(), EuropeanCall()), Problem(GBM, Half()),
        Problem(GBM, Half(monitoring="continuous")), Problem(GBM, Bonus()),
    )  # fmt: skip
    assert [estimator_of(problem) for problem in changed] == ["payoff"] * len(changed)
    assert estimator_of(Problem(GBM, Guessed())) == "bridge"


# --- settings, steps, bounds --------------------------------------------------------------------------

POLICY: dict[str, Any] = {
    "fields": ("v0",), "logarithms": (True,), "centres": (0.0,), "spreads": (1.0,), "scale": (1.0, 0.0, 0.0),
    "growth": (0.0, 0.0, 0.0), "of_ratios": (1.0,), "of_time": (0.0,), "of_fields": (0.0,), "biases": (0.0,),
    "output": (0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "european_call", "dates": 4}, "it pays by the price at expiry alone, and has no dates, got 4"),
        ({"kind": "european_call", "dates": -4}, "it pays by the price at expiry alone, and has no dates, got -4"),
        ({"kind": "european_call", "strike": 4}, "got 4; its settings: none$"),
        ({"kind": "cash_or_nothing_call", "cash": float("inf")}, "cash: Input should be a finite number"),
        ({"kind": "up_and_out_call", "rebate": float("nan")}, "rebate: Input should be a finite number"),
        ({"kind": "autocallable", "memory": "yes"}, "memory: Input should be a valid boolean, got 'yes'"),
        ({"kind": "bermudan_put", "policy": POLICY | {"of_time": (1.0, 2.0)}}, "1 units of_time has 1 numbers, got 2"),
        (
            {"kind": "bermudan_max_call", "policy": POLICY},
            "its policy sees 3 ratios of prices, and the one given sees 1",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        product_of(settings)


def test_a_policy_of_another_process_is_refused_by_the_field_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"BermudanPut\.reads names 'v0', which is no field of gbm x bermudan_put"):
        Problem(GBM, BermudanPut(policy=Policy(**POLICY)))
    assert Problem(Heston(), BermudanPut(policy=Policy(**POLICY))).product.reads == ("v0",)
    assert BermudanMaxCall().reads == ()


def test_prices_between_steps_are_looked_at_where_they_are_known() -> None:
    with pytest.raises(ConfigError, match="what they do there is not known of cev: monitor on dates"):
        Problem(ConstantElasticity(), LookbackCall(monitoring="continuous"))


def test_steps_of_what_is_looked_at_all_the_time_are_any_number_and_stand_closer() -> None:
    on_dates, always = (
        Problem(Heston(), product_of({"kind": "up_and_out_call", "monitoring": how})) for how in ("dates", "continuous")
    )
    always.check_steps(7)
    with pytest.raises(ConfigError, match="timesteps is 7, and up_and_out_call looks at the price on 16 dates"):
        on_dates.check_steps(7)
    domain = resolve_domain({}, always.schema)
    assert always.default_steps(domain) == 3 * on_dates.default_steps(domain)


@pytest.mark.parametrize(("dates", "steps"), [(5, 20), (12, 24), (16, 16), (52, 52)])
def test_a_recipe_has_a_step_for_each_date(dates: int, steps: int) -> None:
    given = {"simulation": {"product": {"kind": "autocallable", "dates": dates}}}
    assert make_experiment("any", given).simulation.sim_params.timesteps == steps


def test_a_barrier_at_the_spot_is_refused_on_either_side() -> None:
    for kind, word in (("up_and_out_call", "above 1"), ("down_and_out_call", "below 1")):
        schema = Problem(GBM, product_of({"kind": kind})).schema
        end = "lower" if word == "above 1" else "upper"
        bound = {"lower": 0.9, "upper": 1.1} | {end: 1.0}
        with pytest.raises(ConfigError, match=rf"domain_bounds\['H'\]: {end} bound must be {word}, got 1.0"):
            resolve_domain({"H": bound}, schema)
        with pytest.raises(ConfigError, match=rf"contracts\[0\].H must be finite and .*{word}"):
            contract_array(np.array([[100.0, 100.0, 1.0, 1.0, 0.03, 0.01, 0.2]]), schema)


def test_what_is_endless_is_not_sound() -> None:
    problem = Problem(GBM, LookbackCall(dates=4))
    schema, endless = problem.schema, lambda table, *_: np.full(len(table), np.inf)
    pricer = SimpleNamespace(
        problem=problem, domain=resolve_domain({}, schema), distribution_kinds=("learnt",), predict_price=endless,
        predict_distribution=lambda table, *_: SimpleNamespace(host_levels=np.full((len(table), 4), np.inf)),
        predict_sensitivities=lambda table, *_: schema.row(*(endless(table) for _ in schema)),
    )  # fmt: skip
    found = soundness(pricer, 256)  # type: ignore[arg-type]
    assert found.wrong == 256 * (5 + len(schema))
    assert not found.holds


def test_a_quantity_that_is_always_nothing_has_no_share() -> None:
    assert Measure("rho", "", np.array([0.5, 0.5]), 0.0).relative is None
    assert Measure("rho", "", np.array([0.5, 0.5]), 2.0).relative == 0.25
