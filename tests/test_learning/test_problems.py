"""Any problem is learnt: labels, derivatives, answers within what must hold, checkpoints that name what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from jobs.recipes import make_experiment
from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.checkpoint.tensor_header import parse_header
from smc.errors import ConfigError
from smc.learning.experiment import Experiment
from smc.learning.labels import ExampleSource
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.learning.scale import View, input_count
from smc.prediction.evaluation import evaluate, objective_value, price_error
from smc.prediction.reference import Reference
from smc.problem.contracts import resolve_domain
from smc.problem.models import load_models
from smc.problem.oracles import black_scholes, log_normal
from smc.problem.oracles.oracle import oracle_of
from smc.problem.problem import EUROPEAN_PUT, Problem, product_of, register
from smc.problem.process import Process
from smc.problem.processes.gbm import RATE, SPOT, GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import DownAndOutCall, UpAndOutCall
from smc.problem.products.cash_or_nothing import CashOrNothingCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.problem.schema import Field
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import ProblemConfig, SimulationParams
from smc.simulation.engine import BlackScholes, BlackScholesConfig, Simulation
from tests.conftest import small_simulation, small_training

GBM = GeometricBrownianMotion()
PRODUCTS = (
    EuropeanPut(),
    EuropeanCall(),
    DigitalPut(),
    CashOrNothingCall(cash=3.0),
    ArithmeticAsianPut(dates=4),
    ArithmeticAsianCall(dates=4),
    UpAndOutCall(dates=4),
    DownAndOutCall(dates=4),
)
LEARNT = (DigitalPut(), ArithmeticAsianPut(dates=4), UpAndOutCall(dates=4))


def kind_of(product: Product) -> str:
    return product.kind


def pricer_of(product: Product, process: Process = GBM, **changes: Any) -> GbmCVNNPricer:
    params = small_simulation(**{"network_size": 32, "batches_per_mc_run": 32, "timesteps": 4, **changes})
    config = ProblemConfig(process=process, product=product, sim_params=params)
    model = build_cvnn(params, CVNNConfig(hidden=(32, 32)), config.problem)
    return GbmCVNNPricer(GbmCVNNPricerConfig(config, {}, model))


def sample(pricer: GbmCVNNPricer, count: int, seed: int = 3) -> np.ndarray[Any, np.dtype[np.float64]]:
    return SobolSampler(pricer.domain, seed=seed, schema=pricer.problem.schema).sample(count)


@pytest.fixture(scope="module")
def trained() -> Mapping[str, GbmCVNNPricer]:
    pricers = {}
    for product in LEARNT:
        pricer = pricers[product.kind] = pricer_of(product)
        differential = 0.3 if product.lipschitz else 0.0
        pricer.train(small_training(400, batch_size=64, learning_rate=0.01, differential=differential))
    return pricers


# --- labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("differential", [False, True])
def test_the_general_way_gives_the_labels_of_the_closed_form(differential: bool) -> None:
    params = SimulationParams(timesteps=4, network_size=32, batches_per_mc_run=512, mc_seed=5)
    domain = resolve_domain({})
    own = ExampleSource(BlackScholes(BlackScholesConfig(sim_params=params)), domain, differential=differential)
    general = ExampleSource(Simulation(EUROPEAN_PUT, params), domain, differential=differential)
    wanted, found = (s.simulate(s.contracts(100, 64), torch.tensor(100)) for s in (own, general))
    assert torch.equal(wanted.inputs, found.inputs)
    torch.testing.assert_close(found.targets[:, 0], wanted.targets[:, 0], atol=2e-5, rtol=1e-5)
    if differential:  # by a difference in single precision: a bias of 2^-9 of a second derivative
        torch.testing.assert_close(found.targets[:, 1], wanted.targets[:, 1], atol=2e-2, rtol=2e-2)
        apart = (found.targets[:, 1] - wanted.targets[:, 1])[:, 0, 0]
        assert apart.abs().max() < 5e-3


@pytest.mark.parametrize("product", [p for p in PRODUCTS if p.lipschitz and p.dates], ids=kind_of)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_derivatives_of_a_product_without_a_closed_form_are_those_of_its_price(
    product: Product, precision: str
) -> None:
    params = SimulationParams(timesteps=4, network_size=32, batches_per_mc_run=1024, mc_seed=5, dtype=precision)
    problem = Problem(GBM, product)
    source = ExampleSource(Simulation(problem, params), resolve_domain({}, problem.schema), differential=True)
    contracts = source.contracts(0, 32)
    found = source.simulate(contracts, torch.tensor(0)).targets[:, 1, 0, 0].double()
    step = 1e-4 * source._directions(0, contracts.table)

    def scaled(table: torch.Tensor) -> torch.Tensor:
        price = torch.from_numpy(log_normal.price(problem, table.numpy()))
        return price / source.view.unit(table) - source.view.anchor(table)

    wanted = (scaled(contracts.table + step) - scaled(contracts.table - step)) / 2e-4
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


def test_equal_payoffs_stand_in_the_order_of_their_slopes() -> None:
    from smc.simulation.levels import payoff_spectrum_and_slope

    payoffs = torch.tensor([[0.0, 2.0, 0.0, 2.0]])
    slopes = torch.tensor([[3.0, -1.0, 0.0, -5.0]])
    one = torch.ones(1)
    for dtype in (torch.float32, torch.float64):
        given = (payoffs.to(dtype), slopes.to(dtype), one.to(dtype), 0.5 * one.to(dtype))
        value, slope = payoff_spectrum_and_slope(*given, 4)
        levels = torch.fft.irfft(value, n=4, norm="forward")
        moved = torch.fft.irfft(slope, n=4, norm="forward")
        torch.testing.assert_close(levels, torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=dtype))
        torch.testing.assert_close(moved, torch.tensor([[0.0, 3.0, -4.0, 0.0]], dtype=dtype))


def test_derivatives_of_a_payoff_that_jumps_are_refused_by_name_and_left_out_by_recipes() -> None:
    product = DigitalPut()
    with pytest.raises(ConfigError, match=f"that of {product.kind} may jump: train with differential=0"):
        pricer_of(product).train(small_training(1, differential=0.3))
    settings = {"simulation": {"product": {"kind": product.kind}}}
    with pytest.raises(ConfigError, match=f"that of {product.kind} may jump"):
        make_experiment("jumps", settings, {"training": {"differential": 0.3}})
    assert make_experiment("even", settings).training.differential == 0


@pytest.mark.parametrize("product", [Autocallable(dates=2)], ids=kind_of)
def test_of_a_payoff_that_jumps_the_expected_one_has_a_derivative(product: Product) -> None:
    settings = {"simulation": {"product": {"kind": product.kind, "dates": product.dates}}}
    assert make_experiment("smooth", settings).training.differential > 0
    with pytest.raises(ConfigError, match=f"that of {product.kind} may jump"):
        make_experiment("plain", settings, {"simulation": {"conditional": False}, "training": {"differential": 0.3}})
    assert make_experiment("plain", settings, {"simulation": {"conditional": False}}).training.differential == 0
    problem = Problem(GeometricBrownianMotion(), product)
    params = small_simulation(batches_per_mc_run=256, timesteps=4)
    source = ExampleSource(Simulation(problem, params, conditional=True), resolve_domain({}, problem.schema),
                           differential=True)  # fmt: skip
    contracts = source.contracts(0, 32)
    examples = source.simulate(contracts, torch.tensor(0))
    assert source.bins_with_slopes == 1
    assert bool((examples.targets[:, 1, 1:] == 0).all())
    # The label's derivative is that of the price, along the direction in which the contract is moved.
    step, view, oracle = 2.0**-9, source.view, oracle_of(problem)
    assert oracle is not None
    scaled = [(torch.from_numpy(oracle.price(t.numpy())) / view.unit(t) - view.anchor(t)) for t in
              (contracts.moved, 2 * contracts.table - contracts.moved)]  # fmt: skip
    slopes = ((scaled[0] - scaled[1]) / (2 * step)).numpy()
    found = examples.targets[:, 1, 0, 0].numpy()
    assert np.sqrt(np.square(found - slopes).mean()) < 0.15 * np.sqrt(np.square(slopes).mean()) + 0.02


# --- what the network sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS, ids=kind_of)
def test_an_anchor_leaves_little_of_a_price_to_learn(product: Product) -> None:
    problem = Problem(GBM, product)
    view = View(problem, resolve_domain({}, problem.schema))
    contracts = SobolSampler({}, seed=1, schema=problem.schema).sample(256)
    table = torch.from_numpy(contracts)
    oracle = oracle_of(problem)
    assert oracle is not None
    price = torch.from_numpy(oracle.price(contracts)) / view.unit(table)
    assert (price - view.anchor(table)).abs().max() < 0.15 < price.abs().max()
    features = view.features(table)
    assert features.shape == (256, input_count(problem))
    assert features.isfinite().all()
    assert features.abs().max() < 6


@pytest.mark.parametrize("product", PRODUCTS, ids=kind_of)
def test_no_price_of_the_oracle_is_beyond_its_bounds(product: Product) -> None:
    problem = Problem(GBM, product)
    contracts = SobolSampler({}, seed=2, schema=problem.schema).sample(256)
    oracle = oracle_of(problem)
    assert oracle is not None
    bounds, price = product.bounds(problem.law(torch.from_numpy(contracts))), oracle.price(contracts)
    assert (price >= bounds.lower.numpy() - 1e-9).all()
    assert (price <= bounds.upper.numpy() + 1e-9).all()
    payoffs = Simulation(problem, small_simulation(timesteps=4)).payoffs(contracts).double()
    assert (payoffs <= bounds.payoff[:, None] * (1 + 1e-6)).all()


# --- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", LEARNT, ids=kind_of)
def test_what_is_learnt_is_near_the_oracle_and_valid(product: Product, trained: Mapping[str, GbmCVNNPricer]) -> None:
    pricer = trained[product.kind]
    contracts = sample(pricer, 24)
    measures = evaluate(pricer, contracts)
    assert measures["price"].rmse < {"digital_put": 40, "arithmetic_asian_put": 6, "up_and_out_call": 15}[product.kind]
    assert measures["delta"].relative is not None
    assert measures["delta"].relative < 0.2
    assert measures["price"].unit == ("bp of payment" if isinstance(product, DigitalPut) else "bp of spot")
    price, levels = pricer.predict_price(contracts), pricer.predict_distribution(contracts).host_levels
    bounds = product.bounds(pricer.problem.law(torch.from_numpy(contracts)))
    assert np.isfinite(levels).all()
    assert (np.diff(levels, axis=1) >= 0).all()
    assert (levels >= 0).all()
    assert (levels <= bounds.payoff.numpy()[:, None]).all()
    np.testing.assert_allclose(levels.mean(axis=1), price, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("product", PRODUCTS, ids=kind_of)
def test_what_is_certain_is_exact(product: Product) -> None:
    pricer = pricer_of(product)
    pricer.train(small_training(1))
    contracts = np.tile(sample(pricer, 12), (2, 1))
    schema = pricer.problem.schema
    contracts[:12, schema.column("T")] = 0.0
    contracts[12:18, schema.column("v")] = 0.0
    oracle = oracle_of(pricer.problem)
    assert oracle is not None
    wanted = oracle.price(contracts)[:18]
    np.testing.assert_allclose(pricer.predict_price(contracts)[:18], wanted, rtol=1e-12, atol=1e-12)
    levels = pricer.predict_distribution(contracts).host_levels[:18]
    np.testing.assert_allclose(levels, np.repeat(wanted[:, None], 32, axis=1), rtol=1e-12, atol=1e-12)
    greeks = pricer.predict_greeks(contracts)
    assert all(np.isfinite(values).all() for values in greeks)
    assert not greeks.gamma[:18].any()


def test_the_other_option_is_answered_where_it_follows(trained: Mapping[str, GbmCVNNPricer]) -> None:
    asian = trained["arithmetic_asian_put"]
    contracts = sample(asian, 64)
    call = asian.predict_price(contracts, "call")
    exact = log_normal.price(Problem(GBM, ArithmeticAsianCall(dates=4)), contracts)
    assert np.abs(call - exact).max() < 0.2
    np.testing.assert_array_equal(asian.predict_price(contracts, "put"), asian.predict_price(contracts))
    kinds = ["put", "call"] * 32
    np.testing.assert_array_equal(
        asian.predict_price(contracts, kinds)[1::2], asian.predict_price(contracts[1::2], "call")
    )
    with pytest.raises(ConfigError, match="distribution of a call does not follow from gbm x arithmetic_asian_put"):
        asian.predict_distribution(contracts, "call")
    for product, other in (("digital_put", "call"), ("up_and_out_call", "put")):
        pricer = trained[product]
        with pytest.raises(ConfigError, match=f"kind='{other}' does not follow from gbm x {product}"):
            pricer.predict_price(sample(pricer, 1), other)


def test_a_european_call_is_a_product_of_its_own() -> None:
    pricer = pricer_of(EuropeanCall())
    pricer.train(small_training(300, batch_size=64, learning_rate=0.01, differential=0.3))
    contracts = sample(pricer, 256)
    error = (pricer.predict_price(contracts) - black_scholes.price(contracts, "call")) / contracts[:, 0] * 1e4
    assert np.sqrt(np.square(error).mean()) < 12
    put = (pricer.predict_price(contracts, "put") - black_scholes.price(contracts)) / contracts[:, 0] * 1e4
    assert np.sqrt(np.square(put).mean()) < 12
    with pytest.raises(ConfigError, match="the distribution of a put does not follow"):
        pricer.predict_distribution(contracts, "put")


def test_a_barrier_stays_where_it_is_when_the_spot_moves(trained: Mapping[str, GbmCVNNPricer]) -> None:
    pricer = trained["up_and_out_call"]
    contracts = sample(pricer, 32)
    names = pricer.problem.schema.names
    X0, H = names.index("X0"), names.index("H")

    def at(share: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        moved = contracts.copy()
        moved[:, X0] *= 1 + share
        moved[:, H] /= 1 + share
        predictor = pricer.predictor
        table = torch.from_numpy(moved)
        with torch.no_grad():
            return predictor._spectrum(table)[0][:, 0].numpy()

    h = 1e-4
    step, greeks = h * contracts[:, X0], pricer.predict_greeks(contracts)
    np.testing.assert_allclose(greeks.delta, (at(h) - at(-h)) / (2 * step), rtol=2e-2, atol=2e-3)
    by = pricer.predict_sensitivities(contracts)
    np.testing.assert_allclose(by.X0 - by.H * contracts[:, H] / contracts[:, X0], greeks.delta, rtol=1e-9)
    assert not np.allclose(by.X0, greeks.delta, rtol=1e-2)
    np.testing.assert_array_equal(by.v, greeks.vega)


def test_contracts_come_by_the_names_of_the_problem(trained: Mapping[str, GbmCVNNPricer]) -> None:
    pricer = trained["up_and_out_call"]
    contract = {"H": 1.4, "X0": 100, "K": 105, "T": 1.0, "r": 0.03, "d": 0.01, "v": 0.25}
    wanted = pricer.predict_price([[contract[name] for name in pricer.problem.schema.names]])
    np.testing.assert_array_equal(pricer.predict_price([contract]), wanted)
    with pytest.raises(ConfigError, match="H missing; the fields are X0, K, H, T, r, d, v"):
        pricer.predict_price([{name: value for name, value in contract.items() if name != "H"}])
    with pytest.raises(ConfigError, match="'G' unknown"):
        pricer.predict_price([{**contract, "G": 1}])
    with pytest.raises(ConfigError, match=r"expected shape \(n, 7\)"):
        pricer.predict_price([[100, 105, 1.0, 0.03, 0.01, 0.25]])
    with pytest.raises(ConfigError, match=r"H = 1\.7 is outside the trained domain"):
        pricer.predict_price([{**contract, "H": 1.7}])


# --- checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_names_kinds_and_holds_their_settings() -> None:
    pricer = pricer_of(UpAndOutCall(dates=2))
    pricer.train(small_training(3))
    data = encode(Snapshot.of(pricer.snapshot()))
    fields = orjson.loads(parse_header(data, len(data)).metadata["spectralmc"])
    assert fields["simulation"]["process"] == {"kind": "gbm", "scheme": "log"}
    assert fields["simulation"]["product"] == {"kind": "up_and_out_call", "dates": 2}
    again = GbmCVNNPricer(restore(decode(data)))
    assert again.problem == Problem(GBM, UpAndOutCall(dates=2))
    contracts = sample(pricer, 16)
    np.testing.assert_array_equal(again.predict_price(contracts), pricer.predict_price(contracts))


def test_what_was_trained_before_there_were_problems_says_no_more_than_it_did() -> None:
    pricer = GbmCVNNPricer(make_experiment("a", recipe="tiny").fresh())
    data = encode(Snapshot.of(pricer.snapshot()))
    fields = orjson.loads(parse_header(data, len(data)).metadata["spectralmc"])
    assert set(fields["simulation"]) == {"sim_params", "simulate_log_return", "normalize_forwards"}
    assert fields["format"] == 3


@pytest.mark.parametrize("product", [ArithmeticAsianPut(dates=4), UpAndOutCall(dates=4)], ids=kind_of)
def test_resumed_training_is_the_same_bit_for_bit(product: Product) -> None:
    differential = 0.3 if product.lipschitz else 0.0
    config = small_training(40, batch_size=32, differential=differential)
    whole, part = (pricer_of(product, buffer_size=100) for _ in range(2))
    whole.train(config)
    part.train(config.model_copy(update={"num_batches": 25}))
    # A plan of 25 batches is another than one of 40: stopped in the middle, as a lost node would.
    stopped = pricer_of(product, buffer_size=100)

    def stop(report: Any) -> None:
        if report.batch == 25:
            stopped.stop()

    stopped.train(config, logger=stop)
    at = stopped.snapshot().global_step
    resumed = GbmCVNNPricer(restore(decode(encode(Snapshot.of(stopped.snapshot())))))
    resumed.train(config.model_copy(update={"num_batches": 40 - at}))
    states = [encode(Snapshot.of(pricer.snapshot())) for pricer in (whole, resumed)]
    assert states[0] == states[1]


def test_an_unknown_kind_is_refused_with_what_to_register() -> None:
    pricer = pricer_of(UpAndOutCall(dates=2))
    pricer.train(small_training(1))
    data = encode(Snapshot.of(pricer.snapshot()))
    other = data.replace(b"up_and_out_call", b"op_and_out_call")
    with pytest.raises(ConfigError, match=r"no product of the kind 'op_and_out_call': there are .*register your own"):
        decode(other)
    with pytest.raises(ConfigError, match="--models FILE"):
        decode(other)


def test_a_template_of_another_problem_is_refused() -> None:
    pricer, other = pricer_of(UpAndOutCall(dates=2)), pricer_of(UpAndOutCall(dates=4))
    snapshot = Snapshot.of(pricer.snapshot())
    with pytest.raises(ConfigError, match=r"config_template.cfg is about .*dates=4.*was trained on .*dates=2"):
        restore(snapshot, config_template=other.snapshot())
    restore(snapshot, config_template=pricer.snapshot())


def test_a_network_of_another_problem_is_refused() -> None:
    params = small_simulation(timesteps=4)
    config = ProblemConfig(product=UpAndOutCall(dates=4), sim_params=params)
    with pytest.raises(ConfigError, match=r"shape \(batch, 17\)"):
        GbmCVNNPricer(GbmCVNNPricerConfig(config, {}, build_cvnn(params)))


# --- settings -----------------------------------------------------------------------------------------


def test_an_experiment_names_its_problem() -> None:
    product = {"kind": "arithmetic_asian_put", "dates": 8}
    experiment = make_experiment("asian", {"simulation": {"product": product}}, recipe="default")
    assert experiment.simulation.problem == Problem(GBM, ArithmeticAsianPut(dates=8))
    again = Experiment.model_validate(experiment.model_dump())
    assert again == experiment
    # What a recipe says of European puts alone is no setting of another problem.
    assert (
        make_experiment("asian", {"simulation": {"product": product}}, recipe="gpu").simulation.sim_params.paths
        == 131072
    )
    put = {"kind": "european_put"}
    assert make_experiment("put", {"simulation": {"product": put}}).simulation.problem == EUROPEAN_PUT
    with pytest.raises(ConfigError, match=r"unknown key 'simulation.normalize_forwards'; allowed are process, product"):
        make_experiment("both", {"simulation": {"product": put, "normalize_forwards": True}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"product": {"kind": "asian"}},
            r"no product of the kind 'asian': there are arith",
        ),
        ({"product": {"kind": "digital_put", "cash": 2}}, r"digital_put: cash: Extra inputs are not permitted, got 2"),
        ({"product": {"kind": "up_and_out_call", "dates": 0}}, "dates: Input should be greater than or equal to 1"),
        (
            {"product": {"kind": "up_and_out_call", "dates": 3}, "sim_params": {"timesteps": 16}},
            "timesteps is 16, .* looks at the price on 3 dates",
        ),
        ({"process": {"kind": "gbm"}}, "simulation.product: Field required"),
        ({"process": {"kind": "hull"}, "product": {"kind": "digital_put"}}, "no process of the kind 'hull'"),
    ],
)
def test_bad_settings_of_a_problem_are_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_experiment("bad", {"simulation": settings, "training": {"differential": 0}})


def test_a_domain_is_of_the_fields_of_the_problem() -> None:
    product = {"kind": "up_and_out_call"}
    layers = {"simulation": {"product": product}, "training": {"differential": 0}}
    made = make_experiment("a", layers, {"domain": {"H": {"lower": 1.2, "upper": 1.3}}})
    assert made.fresh().domain_bounds["H"].lower == 1.2
    with pytest.raises(ConfigError, match=r"domain_bounds\['H'\]: lower bound must be above 1, got 1.0"):
        make_experiment("a", layers, {"domain": {"H": {"lower": 1.0, "upper": 1.3}}})
    with pytest.raises(ConfigError, match="unknown field 'H'; allowed are X0, K, T, r, d, v"):
        make_experiment("a", {"domain": {"H": {"lower": 1.2, "upper": 1.3}}})


# --- models of one's own ------------------------------------------------------------------------------


@register
class Ratio(Process):
    """A process that says nothing of its law."""

    kind = "ratio"
    fields = (SPOT, RATE, Field("s", "spread", "per square root of a year", 0.1, 0.4, least=0.0, strict=True))

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        return c.r * dt - 0.5 * c.s * c.s * dt, c.s * dt**0.5, c.X0

    def start(self, c: Any) -> tuple[float, ...]:
        return (0.0,)

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        return (state[0] + k[0] + k[1] * normals[0],)

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> float:
        return k[2] * (1.0 + state[0] + 0.5 * state[0] * state[0])


@pytest.mark.long
def test_a_process_that_says_nothing_of_its_law_is_learnt_all_the_same() -> None:
    pricer = pricer_of(EuropeanPut(), Ratio())
    pricer.train(small_training(200, batch_size=64, learning_rate=0.01, differential=0.3))
    contracts = sample(pricer, 512)
    error = price_error(pricer, contracts[:24])
    assert error.known == "simulated"
    assert error.count == 24
    assert error.noise is not None
    assert error.noise < 2
    assert error.compared.startswith("simulated, 2^15 paths, standard error ")
    assert error.rmse < 25
    with pytest.raises(ConfigError, match="kind='call' does not follow from ratio x european_put"):
        pricer.predict_price(contracts, "call")
    with pytest.raises(ConfigError, match=r"has no field 'v'.*derivatives by X0, K, T, r, s"):
        pricer.predict_greeks(contracts)
    assert pricer.predict_sensitivities(contracts).s.shape == (512,)
    levels = pricer.predict_distribution(contracts).host_levels
    most = contracts[:, 1] * np.exp(-contracts[:, 3] * contracts[:, 2])
    assert (levels <= most[:, None]).all()  # a put pays no more than its strike, whatever the law
    names = set(evaluate(pricer, contracts[:8]))
    assert names == {"price", "W2, put", "CVaR97.5, put"}
    with pytest.raises(ConfigError, match="ratio x european_put has no 'vega' to measure; there are price; W2, put"):
        objective_value(pricer, "vega")


@pytest.mark.slow
def test_a_reference_answers_the_same_however_many_samples_it_was_asked_about() -> None:
    reference = Reference(Problem(GBM, DigitalPut()))
    samples = [SobolSampler({}, seed=seed, schema=reference.problem.schema).sample(8) for seed in range(40)]
    first = [reference.price(contracts).values for contracts in samples]
    for contracts, values in zip(samples, first, strict=True):
        np.testing.assert_array_equal(reference.price(contracts).values, values)
        np.testing.assert_array_equal(Reference(reference.problem).price(contracts).values, values)
    levels = reference.levels(samples[0], 32).values
    assert levels.shape == (8, 32)
    # It simulates the first contracts only, with so many paths for each, however many it is asked about.
    simulated = Reference(Problem(Ratio(), EuropeanPut()), path_steps=1 << 22)
    many = SobolSampler({}, seed=1, schema=simulated.problem.schema).sample(512)
    known = simulated.price(many)
    assert known.values.shape == (128,)
    assert known.about == "simulated, 2^14 paths"
    np.testing.assert_array_equal(simulated.price(many[:3]).values, known.values[:3])
    assert simulated.levels(many, 32).values.shape == (64, 32)
    np.testing.assert_allclose(levels.mean(axis=1), first[0], rtol=1e-12)


def test_a_scale_that_is_no_number_is_refused_before_training() -> None:
    class Broken(EuropeanPut):
        kind = "broken_put"

        def unit(self, law: Any) -> torch.Tensor:
            return 0 * law.spot

    with pytest.raises(ConfigError, match=r"gbm x broken_put: the .* is \[.*must be finite all over the domain"):
        pricer_of(Broken())


def test_what_a_product_says_wrongly_is_one_clear_error() -> None:
    class Failing(EuropeanPut):
        kind = "failing_put"

        def anchor(self, law: Any) -> torch.Tensor:
            return law.c.H

    with pytest.raises(ConfigError, match=r"Failing.anchor of gbm x failing_put fails: AttributeError: .*'H'"):
        pricer_of(Failing())

    class Misspelt(EuropeanPut):
        kind = "misspelt_put"
        inputs = ("k",)

    with pytest.raises(
        ConfigError, match=r"Misspelt.inputs names 'k', which is no field of gbm x misspelt_put; .*X0, K"
    ):
        Problem(GBM, Misspelt())


@pytest.mark.parametrize(("paid", "said"), [("spot - k[0]", "-"), ("k[1] * math.log(spot - k[0])", "nan")])
def test_a_payoff_that_is_negative_or_no_number_is_refused_before_training(
    paid: str, said: str, tmp_path: Path
) -> None:
    name = f"pays_{said.replace('-', 'less')}"
    (tmp_path / f"{name}.py").write_text(
        "import math\n"
        "from smc.problem.products.european import EuropeanPut\n"
        f"class Own(EuropeanPut):\n    kind = '{name}'\n"
        f"    def payoff(self, seen, spot, k):\n        return {paid} if spot < 0.9 * k[0] else 0.0\n"
    )
    pricer = pricer_of(load_models(tmp_path / f"{name}.py").Own(), dtype="float64")
    with pytest.raises(ConfigError, match=rf"gbm x {name}: a path pays {said}.*: a payoff is a number, at least 0"):
        pricer.train(small_training(1))


def test_files_of_models_are_run_for_whoever_names_them(tmp_path: Path) -> None:
    path = tmp_path / "own_products.py"
    text = (
        "from smc.problem.problem import register\n"
        "from smc.problem.products.european import EuropeanPut\n"
        "@register\nclass Half(EuropeanPut):\n    kind = 'half_put'\n"
    )
    with pytest.raises(ConfigError, match="there is no file of models"):
        load_models(path)
    path.write_text(text + "1 / 0\n")
    with pytest.raises(ConfigError, match=r"own_products.py: ZeroDivisionError: division by zero"):
        load_models(path)
    path.write_text(text)
    module = load_models(path)
    assert load_models(path) is module
    assert type(product_of({"kind": "half_put"})) is module.Half
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="no module's already"):
        load_models(tmp_path / "json.py")


def test_a_cash_or_nothing_call_is_the_rest_of_a_digital_put() -> None:
    """The product that docs/extending.md adds: one file, one line, and this."""
    problem = Problem(GBM, CashOrNothingCall(cash=10.0))
    contracts = SobolSampler({}, seed=4, schema=problem.schema).sample(32)
    put = log_normal.price(Problem(GBM, DigitalPut()), contracts)
    discount = np.exp(-contracts[:, 3] * contracts[:, 2])
    found = Simulation(problem, small_simulation()).price(contracts, 1 << 18)
    assert (np.abs(found.price - 10 * (discount - put)) <= 4 * found.standard_error + 1e-4).all()
    oracle = oracle_of(problem)
    assert oracle is not None
    np.testing.assert_allclose(oracle.price(contracts), 10 * (discount - put), rtol=1e-12, atol=1e-14)


def test_two_contracts_of_state_are_not_mixed_up() -> None:
    """A snapshot belongs to one problem: another config with its network is refused."""
    pricer = pricer_of(DigitalPut())
    state = pricer.snapshot()
    other = ProblemConfig(product=UpAndOutCall(dates=4), sim_params=state.cfg.sim_params)
    with pytest.raises(ConfigError, match="cannot serve"):
        GbmCVNNPricer(replace(state, cfg=other, domain_bounds={}))
