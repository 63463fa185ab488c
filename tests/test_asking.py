"""Questions as a desk asks them: none, one or many contracts, puts and calls in one call, inside any context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.distribution import PayoffDistribution
from smc.problem.oracles import black_scholes
from tests.conftest import small_config, small_training

CONTRACTS = np.array([[100, 105, 1.0, 0.03, 0.01, 0.25], [100, 90, 0.5, 0.01, 0.02, 0.3], [80, 90, 1.5, 0.0, 0.0, 0.4]])


@pytest.fixture(scope="module")
def pricer() -> GbmCVNNPricer:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(5))
    return pricer


NO_COLUMNS = {field: [] for field in ("X0", "K", "T", "r", "d", "v")}
NOTHING: list[Any] = [[], np.empty((0, 6)), np.empty(0), torch.empty((0, 6)), (), NO_COLUMNS]


@pytest.mark.parametrize("nothing", NOTHING, ids=range(len(NOTHING)))
@pytest.mark.parametrize("kind", ["put", "call", []])
def test_every_answer_works_for_no_contract(pricer: GbmCVNNPricer, nothing: Any, kind: Any) -> None:
    assert len(pricer.predict_price(nothing, kind)) == 0
    distribution = pricer.predict_distribution(nothing, kind)
    assert distribution.host_levels.shape == (0, 32)
    for answer in (
        distribution.mean,
        distribution.std,
        distribution.var(0.9),
        distribution.cvar(0.9),
        distribution.cvar(1),
    ):
        assert answer.shape == (0,)
    assert distribution.quantile([0.1, 0.5]).shape == (0, 2)
    assert distribution.cdf([1.0, 2.0]).shape == (0, 2)
    assert distribution.expectation(np.sqrt).shape == (0,)
    assert [values.shape for values in pricer.predict_greeks(nothing, kind)] == [(0,)] * 5
    if isinstance(kind, str) and not isinstance(nothing, torch.Tensor):
        assert black_scholes.price(nothing, kind).shape == (0,)
        assert black_scholes.implied_volatility(nothing, [], kind).shape == (0,)
        assert black_scholes.payoff_quantile(nothing, [0.1, 0.2], kind).shape == (0, 2)
        assert black_scholes.payoff_bin_averages(nothing, 4, kind).shape == (0, 4)
        assert black_scholes.cvar(nothing, 0.9, kind).shape == (0,)
        assert black_scholes.greeks(nothing, kind).delta.shape == (0,)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.inference_mode(False)])
def test_every_answer_is_the_same_inside_any_context(pricer: GbmCVNNPricer, context: Any) -> None:
    greeks = pricer.predict_greeks(CONTRACTS)
    with context():
        assert all(np.array_equal(a, b) for a, b in zip(pricer.predict_greeks(CONTRACTS), greeks, strict=True))
        inside = pricer.predict_price(CONTRACTS)
    assert np.array_equal(inside, pricer.predict_price(CONTRACTS))


def test_training_works_inside_inference_mode_or_says_why_not() -> None:
    outside = GbmCVNNPricer(small_config())
    with torch.inference_mode():
        assert outside.train(small_training(2)).global_step == 2
        made_inside = GbmCVNNPricer(small_config())
    with pytest.raises(ConfigError, match=r"made inside torch.inference_mode\(\)"):
        made_inside.train(small_training(1))


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda k: np.array(k, dtype=object)])
def test_puts_and_calls_are_asked_in_one_call(pricer: GbmCVNNPricer, form: Any) -> None:
    for kinds in (["put", "call", "put"], ["call"] * 3, ["put"] * 3, ["call", "put", "put"]):
        kind = form(kinds)
        alone = [pricer.predict_price(CONTRACTS[i : i + 1], k)[0] for i, k in enumerate(kinds)]
        assert np.allclose(pricer.predict_price(CONTRACTS, kind), alone, rtol=1e-6)
        levels = [pricer.predict_distribution(CONTRACTS[i : i + 1], k).host_levels[0] for i, k in enumerate(kinds)]
        assert np.allclose(pricer.predict_distribution(CONTRACTS, kind).host_levels, levels, atol=1e-4)
        deltas = [pricer.predict_greeks(CONTRACTS[i : i + 1], k).delta[0] for i, k in enumerate(kinds)]
        assert np.allclose(pricer.predict_greeks(CONTRACTS, kind).delta, deltas, rtol=1e-4)
        tensor = pricer.predict_price(torch.from_numpy(CONTRACTS), kind)
        assert isinstance(tensor, torch.Tensor)
        assert np.allclose(tensor.numpy(), alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("straddle", "kind must be 'put' or 'call', got 'straddle'"),
        (["put", "call"], "one for each of 3 contracts"),
        (["put", "call", "digital"], r"kind\[2\] must be 'put' or 'call', got 'digital'"),
        (["put", None, "call"], r"kind\[1\] must be 'put' or 'call', got None"),
        (None, "one for each of 3 contracts"),
        ([["put"], ["call"], ["put"]], "one for each of 3 contracts"),
    ],
)
def test_a_kind_that_is_none_is_refused(pricer: GbmCVNNPricer, kind: Any, message: str) -> None:
    for ask in (pricer.predict_price, pricer.predict_distribution, pricer.predict_greeks):
        with pytest.raises(ConfigError, match=message):
            ask(CONTRACTS, kind)
    for formula in (black_scholes.price, black_scholes.greeks):
        with pytest.raises(ConfigError, match="kind must be 'put' or 'call'"):
            formula(CONTRACTS, "digital")  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [97.5, -0.1, 1.0000001, float("nan"), float("inf"), -float("inf")])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    distribution = PayoffDistribution(np.arange(8.0)[None])
    for ask in (
        distribution.quantile,
        distribution.var,
        distribution.cvar,
        lambda u: black_scholes.cvar(CONTRACTS, u),
        lambda u: black_scholes.payoff_quantile(CONTRACTS, u),
        lambda u: black_scholes.payoff_quantile(CONTRACTS, [0.5, u]),
    ):
        with pytest.raises(ConfigError, match=r"probability levels must lie in \[0, 1\]"):
            ask(level)


def test_the_ends_of_the_levels_are_answered() -> None:
    largest = black_scholes.cvar(CONTRACTS, 1.0)
    assert np.allclose(largest, CONTRACTS[:, 1] * np.exp(-CONTRACTS[:, 3] * CONTRACTS[:, 2]))
    assert np.allclose(black_scholes.cvar(CONTRACTS, 0.0), black_scholes.price(CONTRACTS))


def test_what_is_worth_nothing_is_not_minus_zero(pricer: GbmCVNNPricer) -> None:
    edges = [[100, 100, 0.0, 0.03, 0.01, 0.25], [100, 100, 1.0, 0.0, 0.0, 0.0], [100, 90, 0.0, 0.03, 0.01, 0.25]]
    for kind in ("put", "call"):
        for values in (pricer.predict_price(edges, kind), black_scholes.price(edges, kind)):
            assert not np.signbit(np.asarray(values)).any()


def test_a_pricer_that_was_not_trained_says_so() -> None:
    pricer = GbmCVNNPricer(small_config())
    for ask in (pricer.predict_price, pricer.predict_distribution, pricer.predict_greeks):
        for kind in ("put", "call"):
            with pytest.warns(UserWarning, match="this pricer has not been trained: .*; call train first"):
                ask(CONTRACTS, kind)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="has not been trained"):
        GbmCVNNPricer(pricer.snapshot()).predict_price(CONTRACTS)
    pricer.train(small_training(1))
    for trained in (pricer, GbmCVNNPricer(pricer.snapshot())):
        trained.predict_price(CONTRACTS)
        trained.predict_greeks(CONTRACTS)
