from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import threading
import time
import warnings
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from smc.checkpoint.file import Snapshot, encode
from smc.errors import ConfigError, NumericsError
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.plan import TrainingPlan
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, StepReport, TrainingConfig
from smc.learning.step import TrainingStep
from smc.prediction.predictor import Predictor
from smc.problem.contracts import DEFAULT_DOMAIN, FIELDS, Contract
from smc.problem.oracles import black_scholes
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholesConfig
from smc.storage import AsyncBlockchainModelStore
from smc.storage.objects import MemoryObjectStore
from tests.conftest import small_config, small_simulation, small_training


def state_bytes(pricer: GbmCVNNPricer) -> bytes:
    return encode(Snapshot.of(pricer.snapshot()))


@pytest.fixture(scope="module")
def trained() -> GbmCVNNPricer:
    params = small_simulation(network_size=64, batches_per_mc_run=32, buffer_size=4000)
    config = GbmCVNNPricerConfig(
        cfg=BlackScholesConfig(sim_params=params),
        domain_bounds={},
        cvnn=build_cvnn(params, CVNNConfig(hidden=(32, 32))),
    )
    pricer = GbmCVNNPricer(config)
    pricer.train(TrainingConfig(num_batches=1500, batch_size=32, learning_rate=0.01))
    return pricer


CONTRACTS = SobolSampler({}, seed=31).sample(1024)
CORNERS = np.array(list(itertools.product(*((b.lower, b.upper) for b in (DEFAULT_DOMAIN[name] for name in FIELDS)))))


def test_a_trained_pricer_prices_within_a_few_basis_points(trained: GbmCVNNPricer) -> None:
    error = (trained.predict_price(CONTRACTS) - black_scholes.price(CONTRACTS)) / CONTRACTS[:, 0] * 1e4
    assert np.sqrt(np.square(error).mean()) < 8


def test_calls_follow_from_puts_by_parity(trained: GbmCVNNPricer) -> None:
    X0, K, T, r, d, _ = CONTRACTS.T
    difference = trained.predict_price(CONTRACTS, "call") - trained.predict_price(CONTRACTS)
    np.testing.assert_allclose(difference, X0 * np.exp(-d * T) - K * np.exp(-r * T), atol=1e-9)


def test_prices_keep_the_no_arbitrage_bounds(trained: GbmCVNNPricer) -> None:
    contracts = np.concatenate([CONTRACTS, CORNERS])
    X0, K, T, r, d, _ = contracts.T
    put = trained.predict_price(contracts)
    assert np.all(put >= np.maximum(K * np.exp(-r * T) - X0 * np.exp(-d * T), 0) - 1e-12)
    assert np.all(put <= K * np.exp(-r * T))


@pytest.mark.parametrize(("kind", "w2"), [("put", 0.01), ("call", 0.03)])
def test_distributions_are_valid_and_have_the_price_as_mean(
    trained: GbmCVNNPricer, kind: black_scholes.OptionKind, w2: float
) -> None:
    contracts = np.concatenate([CONTRACTS, CORNERS])
    distribution = trained.predict_distribution(contracts, kind)
    levels = distribution.host_levels
    assert levels.shape == (1024 + 64, 64)
    assert np.all(np.diff(levels, axis=1) >= 0)
    assert levels.min() >= 0
    if kind == "put":
        assert np.all(levels <= (contracts[:, 1] * np.exp(-contracts[:, 3] * contracts[:, 2]))[:, None])
    np.testing.assert_allclose(distribution.mean, trained.predict_price(contracts, kind), atol=1e-9)
    exact = black_scholes.payoff_bin_averages(CONTRACTS, 64, kind)
    distance = np.sqrt(np.square(levels[:1024] - exact).mean(axis=1)) / CONTRACTS[:, 0]
    assert np.sqrt(np.square(distance).mean()) < w2


def test_prices_rise_with_strike_and_are_convex_in_it(trained: GbmCVNNPricer) -> None:
    strikes = np.arange(50.0, 150.5, 2.0)
    table = np.repeat(CONTRACTS[:256], len(strikes), axis=0)
    table[:, 0], table[:, 1] = 100.0, np.tile(strikes, 256)
    put = trained.predict_price(table).reshape(256, -1)
    assert np.diff(put, axis=1).min() > -0.01  # a basis point of spot
    assert np.diff(put, n=2, axis=1).min() > -0.01
    call = trained.predict_price(table, "call").reshape(256, -1)
    assert np.diff(call, axis=1).max() < 0.01


def test_no_loss_is_lost_where_a_window_of_steps_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pricer = GbmCVNNPricer(small_config()), GbmCVNNPricer(small_config())
    every: list[StepReport] = []
    whole.train(small_training(22), logger=every.append)
    monkeypatch.setattr("smc.learning.step._AHEAD", {"cpu": 32})  # of contracts: eight steps
    read: list[float] = []
    losses = TrainingStep.losses

    def keep(self: TrainingStep, through: int) -> list[float]:
        read.extend(new := losses(self, through))
        return new

    monkeypatch.setattr(TrainingStep, "losses", keep)
    some: list[StepReport] = []
    result = pricer.train(small_training(22), logger=some.append, report_every=5)
    assert [report.step for report in some] == [5, 10, 15, 20, 22]
    np.testing.assert_array_equal(read, [report.loss for report in every])
    assert result.loss == every[-1].loss
    for report in some:
        assert replace(report, seconds=0) == replace(every[report.step - 1], seconds=0)


def test_a_loss_that_is_not_finite_is_found_in_reports_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    pricer = GbmCVNNPricer(small_config())

    def poison(report: StepReport) -> None:
        with torch.no_grad():
            next(pricer.model.parameters()).fill_(float("nan"))

    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    settings = {"blockchain_store": store, "auto_commit": True, "commit_interval": 3, "report_every": 5}
    with pytest.raises(NumericsError, match="the loss is nan at step 11"):  # it was told of step 5 after step 10
        pricer.train(small_training(40), logger=poison, **settings)  # type: ignore[arg-type]

    async def committed() -> list[int]:
        async with store:
            return [version.step for version in await store.list_versions()]

    assert asyncio.run(committed()) == [3, 6, 9]


@pytest.mark.parametrize(
    ("changes", "training", "normalize"),
    [
        ({"buffer_size": 257}, {}, False),
        ({}, {"fresh_per_batch": 1}, False),
        ({"dtype": "float64", "network_size": 256, "batches_per_mc_run": 256}, {"fresh_per_batch": 1}, True),
        ({"batches_per_mc_run": 1024}, {"fresh_per_batch": 1, "differential": 0.5}, True),
    ],
    ids=["a chunk of one row", "one row at a time", "normalised", "normalised derivatives"],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same_with_two_threads(
    changes: dict[str, Any], training: dict[str, Any], normalize: bool
) -> None:
    config = small_config(**changes)
    config = replace(config, cfg=config.cfg.model_copy(update={"normalize_forwards": normalize}))
    plan = small_training(8 if normalize else 160, **training)
    half = plan.num_batches // 2
    try:
        torch.set_num_threads(2)
        states = []
        for stop in (None, half):
            pricer = GbmCVNNPricer(replace(config, cvnn=copy.deepcopy(config.cvnn)))
            pricer.train(plan, logger=lambda r, p=pricer, s=stop: p.stop() if r.step == s else None)  # type: ignore[misc]
            if stop:
                pricer = GbmCVNNPricer(pricer.snapshot())
                pricer.train(plan.model_copy(update={"num_batches": plan.num_batches - stop}))
            states.append(encode(Snapshot.of(pricer.snapshot())))
        assert states[0] == states[1]
    finally:
        torch.set_num_threads(1)


def test_tensors_are_priced_as_tensors_like_the_same_contracts_in_an_array(trained: GbmCVNNPricer) -> None:
    contracts = CONTRACTS.copy()
    contracts[3, 2] = contracts[4, 5] = 0.0  # certain, priced without the network
    table = torch.from_numpy(contracts)
    for kind in ("put", "call"):
        prices = trained.predict_price(table, kind)
        assert isinstance(prices, torch.Tensor)
        np.testing.assert_array_equal(prices.numpy(), trained.predict_price(contracts, kind))
    np.testing.assert_allclose(
        trained.predict_price(contracts)[3:5], black_scholes.price(contracts)[3:5], rtol=1e-12, atol=1e-12
    )
    distribution = trained.predict_distribution(table)
    assert isinstance(distribution.levels, torch.Tensor)
    np.testing.assert_allclose(distribution.mean, trained.predict_price(contracts), rtol=1e-9, atol=1e-9)


def test_apredictor_with_graphs_goes_when_nobody_holds_it(
    trained: GbmCVNNPricer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not when Python next looks for cycles: a model that is served no more would keep the GPU's memory."""
    monkeypatch.setattr("smc.prediction.predictor.capture", lambda work, device: work() or (lambda: None))
    monkeypatch.setattr("torch.cuda.Event", MagicMock)
    held = trained.predictor
    predictor = Predictor(trained.model, held._scaling, held.domain, held._size)
    predictor._capturable = True
    predictor.predict_price(CONTRACTS)
    assert predictor._graphs
    gone = weakref.ref(predictor)
    gc.disable()
    try:
        del predictor
        assert gone() is None
    finally:
        gc.enable()


def test_a_tensor_is_checked_like_an_array(trained: GbmCVNNPricer) -> None:
    table = torch.from_numpy(CONTRACTS[:3].copy())
    table[1, 1] = 400.0
    with pytest.raises(ConfigError, match=r"contracts\[1\].K = 400 is outside the trained domain"):
        trained.predict_price(table)
    table[1, 1] = torch.nan
    with pytest.raises(ConfigError, match=r"contracts\[1\].K must be finite"):
        trained.predict_price(table)
    with pytest.raises(ConfigError, match="expected shape"):
        trained.predict_price(table[:, :4])
    assert trained.predict_price(table[:0]).shape == (0,)


@pytest.mark.filterwarnings("ignore:this pricer has not been trained")
@pytest.mark.parametrize("kind", ["put", "call"])
def test_greeks_are_derivatives_of_the_predicted_price(trained: GbmCVNNPricer, kind: black_scholes.OptionKind) -> None:
    params = small_simulation(dtype="float64")
    model = build_cvnn(params, CVNNConfig(hidden=(8,)))
    pricer = GbmCVNNPricer(GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=model))
    inner = CONTRACTS[:32] * 0.98 + 0.02 * np.array([100, 100, 1, 0.04, 0.02, 0.3])
    greeks = pricer.predict_greeks(inner, kind)
    # Where the price is held at its no-arbitrage bound, the bound's derivative is not the network's.
    raw = pricer.predictor._spectrum(torch.from_numpy(inner))[0][:, 0].detach().numpy()
    free = np.abs(raw - pricer.predict_price(inner)) < 1e-12
    assert free.sum() > 8

    def slope(column: int, h: float = 1e-6) -> np.ndarray:
        up, down = inner.copy(), inner.copy()
        up[:, column] += h
        down[:, column] -= h
        return (pricer.predict_price(up, kind) - pricer.predict_price(down, kind)) / (2 * h)

    np.testing.assert_allclose(greeks.delta[free], slope(0)[free], atol=1e-5)
    np.testing.assert_allclose(greeks.vega[free], slope(5)[free], atol=1e-3)
    np.testing.assert_allclose(greeks.theta[free], -slope(2)[free], atol=1e-3)
    np.testing.assert_allclose(greeks.rho[free], slope(3)[free], atol=1e-3)
    delta = lambda x: pricer.predict_greeks(x, kind).delta  # noqa: E731
    shift = np.array([1e-4, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(greeks.gamma, (delta(inner + shift) - delta(inner - shift)) / 2e-4, atol=1e-5)


def test_learnt_greeks_come_close_to_the_closed_form(trained: GbmCVNNPricer) -> None:
    learnt, exact = trained.predict_greeks(CONTRACTS), black_scholes.greeks(CONTRACTS)
    assert np.sqrt(np.square(learnt.delta - exact.delta).mean()) < 0.02
    assert np.sqrt(np.square(learnt.vega - exact.vega).mean()) < 2


@pytest.mark.parametrize(("T", "v"), [(0.0, 0.2), (1.0, 0.0)])
def test_certain_contracts_are_priced_exactly_without_the_network(trained: GbmCVNNPricer, T: float, v: float) -> None:
    # Far outside the domain on purpose: nothing of the network is asked.
    rows = np.array([[10, 200, T, 0.3, 0.0, v], [200, 10, T, 0.0, 0.3, v], [100, 100, 1.0, 0.02, 0.01, 0.2]])
    for kind in ("put", "call"):
        np.testing.assert_allclose(trained.predict_price(rows, kind)[:2], black_scholes.price(rows, kind)[:2])
    distribution = trained.predict_distribution(rows)
    np.testing.assert_allclose(distribution.mean[:2], black_scholes.price(rows)[:2])
    assert distribution.std[:2].tolist() == pytest.approx([0, 0], abs=1e-9)
    np.testing.assert_allclose(trained.predict_greeks(rows).delta[:2], black_scholes.greeks(rows).delta[:2])


def test_a_contract_outside_the_domain_is_refused_unless_asked_for(trained: GbmCVNNPricer) -> None:
    outside = Contract(X0=100, K=100, T=1, r=0.02, d=0.01, v=0.9)
    with pytest.raises(ConfigError, match=r"contracts\[0\]\.v = 0.9 is outside the trained domain \[0.05, 0.6\]"):
        trained.predict_price(outside)
    with pytest.warns(UserWarning, match="extrapolated"):
        assert np.isfinite(trained.predict_price(outside, outside="warn")).all()


def test_wrong_arguments_of_prediction_are_named(trained: GbmCVNNPricer) -> None:
    with pytest.raises(ConfigError, match="kind must be 'put' or 'call'"):
        trained.predict_price(CONTRACTS, "straddle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="outside must be"):
        trained.predict_price(CONTRACTS, outside="ignore")  # type: ignore[arg-type]


def test_prediction_accepts_any_number_of_contracts(trained: GbmCVNNPricer) -> None:
    assert trained.predict_price(np.empty((0, 6))).shape == (0,)
    one = trained.predict_price(Contract(X0=100, K=100, T=1, r=0.02, d=0.01, v=0.2))
    assert one.shape == (1,)


@pytest.mark.parametrize("split", [1, 7, 19])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(split: int) -> None:
    whole = GbmCVNNPricer(small_config())
    middle: list[GbmCVNNPricerConfig] = []

    def keep(report: StepReport) -> None:
        if report.step == split:
            middle.append(whole.snapshot())

    whole.train(small_training(20), logger=keep)
    resumed = GbmCVNNPricer(middle[0])
    # Something else uses torch's generator and another pricer trains in between.
    torch.rand(5)
    GbmCVNNPricer(small_config(mc_seed=99)).train(small_training(3))
    result = resumed.train(small_training(20 - split))
    assert result.global_step == 20
    assert state_bytes(resumed) == state_bytes(whole)


def test_resume_is_exact_when_the_replay_buffer_has_wrapped_around() -> None:
    whole = GbmCVNNPricer(small_config(buffer_size=17))
    middle: list[GbmCVNNPricerConfig] = []
    whole.train(small_training(30), logger=lambda r: middle.append(whole.snapshot()) if r.step == 15 else None)
    resumed = GbmCVNNPricer(middle[0])
    resumed.train(small_training(15))
    assert state_bytes(resumed) == state_bytes(whole)


def test_training_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    GbmCVNNPricer(small_config()).train(small_training(2))
    assert torch.equal(before, torch.get_rng_state())


def test_a_snapshot_is_not_changed_by_further_training() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(5))
    snapshot = pricer.snapshot()
    before = encode(Snapshot.of(snapshot))
    pricer.train(small_training(5))
    assert encode(Snapshot.of(snapshot)) == before
    assert snapshot.global_step == 5
    assert snapshot.cfg.sim_params.skip == snapshot.sobol_skip == 20


def test_a_finished_plan_is_followed_by_a_new_one() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(10))
    pricer.train(small_training(10))
    plan = pricer.snapshot().plan
    assert plan is not None
    assert (plan.start, plan.end) == (10, 20)


def test_the_schedule_warms_up_and_decays_to_zero() -> None:
    plan = TrainingPlan(config=TrainingConfig(num_batches=1000, batch_size=1, learning_rate=0.01), start=50)
    rates = [plan.learning_rate(50 + i) for i in range(1000)]
    assert rates[0] == pytest.approx(0.0001)
    assert max(rates) == pytest.approx(0.01)
    assert np.argmax(rates) in (99, 100)
    assert rates[-1] < 1e-7
    constant = TrainingPlan(
        config=TrainingConfig(num_batches=10, batch_size=1, learning_rate=0.01, schedule="constant"), start=0
    )
    assert {constant.learning_rate(i) for i in range(10)} == {0.01}


def test_the_logger_sees_every_step_on_the_cpu() -> None:
    reports: list[StepReport] = []
    result = GbmCVNNPricer(small_config()).train(small_training(6), logger=reports.append)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].loss == result.loss
    assert result.contracts == 6 * 4
    assert all(np.isfinite(r.loss) and r.seconds > 0 for r in reports)


def test_fresh_contracts_per_batch_are_configurable() -> None:
    result = GbmCVNNPricer(small_config()).train(small_training(3, fresh_per_batch=16))
    assert result.contracts == 48
    with pytest.raises(ValidationError, match="fresh_per_batch must be at most batch_size 16"):
        small_training(3, fresh_per_batch=17)


def test_float64_trains_in_float64() -> None:
    config = small_config(dtype="float64")
    pricer = GbmCVNNPricer(config)
    pricer.train(small_training(3))
    moments = pricer.snapshot().optimizer_state
    assert moments is not None
    assert all(t.dtype == torch.float64 for t in moments.tensors.values())


def test_a_loss_that_is_not_finite_stops_training() -> None:
    config = small_config()
    with torch.no_grad():
        next(config.cvnn.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="the loss is nan at step 1"):
        GbmCVNNPricer(config).train(small_training(5))


class Wrong(torch.nn.Module):
    def __init__(self, out: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(9, 17)
        self._out = out

    def forward(self, real: torch.Tensor, imag: torch.Tensor) -> Any:
        return self._out(self.layer(real))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(5, 5), "Linear cannot serve"),
        (Wrong(lambda x: x), r"it returned \[\(2, 17\)\]"),
        (Wrong(lambda x: (x, x[:, :3])), r"it returned \[\(2, 17\), \(2, 3\)\]"),
        (torch.nn.Identity(), "has no parameters"),
        (Wrong(lambda x: (x, x)).double(), "parameters are torch.float64, the simulation is torch.float32"),
        (Wrong(lambda x: (x, x)).to("meta"), "only 'cpu' and 'cuda'"),
    ],
)
def test_a_model_that_cannot_serve_is_refused_with_what_is_wanted(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GbmCVNNPricer(replace(small_config(), cvnn=model))
    if "cannot serve" in message:
        assert "(batch, 9)" in str(caught.value)
        assert "(batch, 17)" in str(caught.value)
        assert "build_cvnn(sim_params)" in str(caught.value)


def test_a_model_spread_over_devices_is_refused() -> None:
    model = small_config().cvnn
    model.layers[0].to("meta")
    with pytest.raises(ConfigError, match="several devices: cpu, meta"):
        GbmCVNNPricer(replace(small_config(), cvnn=model))


def test_any_module_with_the_signature_trains() -> None:
    pricer = GbmCVNNPricer(replace(small_config(), cvnn=Wrong(lambda x: (x, 0 * x))))
    first = pricer.train(small_training(1)).loss
    assert pricer.train(small_training(60)).loss < first


def test_moments_that_do_not_fit_are_refused() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(1))
    state = pricer.snapshot()
    assert state.optimizer_state is not None
    tensors = state.optimizer_state.tensors
    name = next(iter(tensors))
    missing = {kept: value for kept, value in tensors.items() if kept != name}
    for wrong, got in (({**tensors, name: torch.zeros(3)}, r"of shape \(3,\)"), (missing, "missing")):
        with pytest.raises(ConfigError, match=f"optimizer_state: {name} must have shape .* it is {got}"):
            GbmCVNNPricer(replace(state, optimizer_state=replace(state.optimizer_state, tensors=wrong)))


@pytest.mark.parametrize("changes", [{"num_batches": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"lr": 0.1}])
def test_bad_training_configs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        small_training(**changes)


def test_snapshot_stop_and_progress_answer_from_other_threads() -> None:
    pricer = GbmCVNNPricer(small_config())
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(pricer.train(small_training(100_000))))
    thread.start()
    while pricer.progress.loss is None:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="already training"):
        pricer.train(small_training(1))
    first = pricer.snapshot()
    second = pricer.snapshot()
    assert 0 < first.global_step <= second.global_step
    assert pricer.progress.training
    pricer.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert results[0].stopped
    assert results[0].global_step < 100_000
    assert not pricer.progress.training
    # The state taken in mid-run resumes like any other.
    GbmCVNNPricer(first).train(small_training(2))


def test_training_works_inside_a_running_event_loop() -> None:
    async def inside() -> int:
        return GbmCVNNPricer(small_config()).train(small_training(2)).global_step

    assert asyncio.run(inside()) == 2


def test_no_warnings_are_given_within_the_domain(trained: GbmCVNNPricer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.predict_price(CONTRACTS)
    assert trained.domain == dict(DEFAULT_DOMAIN)
