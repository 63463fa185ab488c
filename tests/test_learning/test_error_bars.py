"""Error bars: what they promise, where they come from, and that checkpoints keep them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from jobs.recipes import make_experiment
from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.errors import ConfigError, Corrupt
from smc.learning.error_bars import LEVEL, ErrorBars
from smc.learning.plan import LEAST_HELD_BACK, TrainingConfig
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import coverage
from smc.problem.sobol_sampler import SobolSampler
from tests.conftest import small_training

HELD_BACK = 256


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and errors whose size is known: the first feature doubles it, the square of the second adds to it."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    size = 2.0 ** features[:, 0] * (1 + features[:, 1].square() / 4)
    return features, size * torch.randn(count, generator=generator, dtype=torch.float64) * 1e-4


@pytest.mark.parametrize("count", [LEAST_HELD_BACK, 512])
def test_intervals_hold_what_they_promise_and_are_wide_where_errors_are_large(count: int) -> None:
    shares, rates = [], []
    for seed in range(8):
        features, errors = samples(count, seed)
        bars = ErrorBars.of(features, errors, torch.zeros_like(errors))
        fresh, missed = samples(20_000, 1000 + seed)
        width = bars.half_width(fresh)
        shares.append(float((missed.abs() <= width).double().mean()))
        rates.append(float(torch.corrcoef(torch.stack([width.log2(), fresh[:, 0]]))[0, 1]))
    assert abs(np.mean(shares) - LEVEL) < (0.02 if count > 100 else 0.035), shares
    assert min(shares) > 0.88
    assert np.mean(rates) > 0.7


def test_the_noise_of_what_is_simulated_is_taken_off() -> None:
    features, errors = samples(1024, 0)
    generator = torch.Generator().manual_seed(5)
    scale = errors.abs().median()
    noises = torch.randn(2, 1024, generator=generator, dtype=torch.float64) * scale
    plain = ErrorBars.of(features, errors, torch.zeros_like(errors)).half_width(features)
    noisy = ErrorBars.of(features, errors + noises[0], noises[1]).half_width(features)
    blind = ErrorBars.of(features, errors + noises[0], torch.zeros_like(errors)).half_width(features)
    assert float((noisy / plain).median()) < float((blind / plain).median())
    assert 0.8 < float((noisy / plain).log().mean().exp()) < 1.25


def test_noise_that_drowns_the_error_leaves_a_share_of_the_interval() -> None:
    features, _ = samples(512, 0)
    noises = torch.randn(2, 512, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    nothing = torch.zeros_like(noises[0])
    blind, told = (ErrorBars.of(features, noises[0], noise).half_width(features) for noise in (nothing, 5 * noises[1]))
    torch.testing.assert_close(told, 0.3 * blind)


def test_an_error_of_nothing_is_an_interval_of_nothing_and_no_failure() -> None:
    features, _ = samples(128, 0)
    bars = ErrorBars.of(features, torch.zeros(128), torch.zeros(128))
    assert bool(bars.half_width(features).isfinite().all())
    assert float(bars.half_width(features).max()) < 1e-100


@cache
def trained() -> GbmCVNNPricer:
    given: dict[str, Any] = {
        "training": {"num_batches": 300, "batch_size": 64, "fresh_per_batch": 8, "held_back": HELD_BACK},
        "simulation": {"sim_params": {"network_size": 64, "batches_per_mc_run": 16, "buffer_size": 2048}},
        "network": {"hidden": [32, 32]},
    }
    experiment = make_experiment("bars", given, recipe="tiny")
    pricer = GbmCVNNPricer(experiment.fresh())
    assert pricer.error_bars is None
    pricer.train(experiment.training)
    return pricer


def sample(pricer: GbmCVNNPricer, count: int) -> np.ndarray:
    return SobolSampler(pricer.domain, seed=9, schema=pricer.problem.schema).sample(count)


def test_a_trained_pricer_knows_how_far_off_it_is() -> None:
    pricer = trained()
    found = coverage(pricer, sample(pricer, 4096))
    assert found is not None
    assert found.count == 4096
    assert 0.90 <= found.share <= 0.98, found
    assert "of 4,096 contracts lie within" in found.line


def test_what_is_certain_has_no_error_and_what_is_asked_on_a_tensor_comes_back_on_it() -> None:
    pricer, contracts = trained(), sample(trained(), 8)
    contracts[3, pricer.problem.schema.column("T")] = 0.0
    bars = pricer.predict_error_bar(contracts)
    assert isinstance(bars, np.ndarray)
    assert bars[3] == 0
    assert (np.delete(bars, 3) > 0).all()
    assert isinstance(pricer.predict_error_bar(torch.from_numpy(contracts[:2])), torch.Tensor)
    with pytest.raises(ConfigError, match="outside the trained domain"):
        pricer.predict_error_bar(contracts * 10)


def test_a_checkpoint_keeps_error_bars_and_a_resumed_pricer_has_them() -> None:
    pricer, contracts = trained(), sample(trained(), 64)
    data = encode(Snapshot.of(pricer.snapshot()))
    again = GbmCVNNPricer(restore(decode(data)))
    np.testing.assert_array_equal(again.predict_error_bar(contracts), pricer.predict_error_bar(contracts))
    assert encode(Snapshot.of(again.snapshot())) == data


def test_further_training_forgets_them_until_its_end() -> None:
    pricer = GbmCVNNPricer(trained().snapshot())
    seen: list[bool] = []
    config = small_training(num_batches=4, batch_size=64).model_copy(update={"held_back": LEAST_HELD_BACK})
    pricer.train(config, logger=lambda report: seen.append(pricer.error_bars is not None and pricer.error_bars.known))
    assert seen == [False] * 4
    assert pricer.error_bars is not None
    assert pricer.error_bars.known
    pricer.train(small_training(num_batches=2, batch_size=64))
    with pytest.raises(ConfigError, match="no error bars: it was trained with held_back=0"):
        pricer.predict_error_bar(sample(pricer, 4))
    assert coverage(pricer, sample(pricer, 64)) is None


def test_a_run_in_two_parts_ends_with_the_same_bits() -> None:
    whole, parts = (GbmCVNNPricer(trained().snapshot()) for _ in range(2))
    config = small_training(num_batches=6, batch_size=64).model_copy(update={"held_back": LEAST_HELD_BACK})
    start = whole.progress.step
    whole.train(config)
    parts.train(config, logger=lambda report: parts.stop())
    state = parts.snapshot()
    assert start < state.global_step < start + 6
    assert state.error_bars is not None
    assert not state.error_bars.known
    resumed = GbmCVNNPricer(restore(decode(encode(Snapshot.of(state)))))
    resumed.train(config.model_copy(update={"num_batches": start + 6 - state.global_step}))
    assert encode(Snapshot.of(resumed.snapshot())) == encode(Snapshot.of(whole.snapshot()))


def test_a_file_whose_error_bars_do_not_fit_is_corrupt() -> None:
    snapshot = Snapshot.of(trained().snapshot())
    for name, wrong in (("scaling.errors.centre", torch.zeros(3, dtype=torch.float64)), ("scaling.errors.more", None)):
        tensors = dict(snapshot.tensors)
        tensors[name] = torch.zeros(1, dtype=torch.float64) if wrong is None else wrong
        with pytest.raises(Corrupt, match="the checkpoint contradicts itself: its network sees 9 features, its error"):
            restore(Snapshot(tensors, snapshot.metadata))


def test_settings_name_error_bars_only_where_there_are_some() -> None:
    assert "held_back" not in small_training().model_dump()
    assert small_training().model_copy(update={"held_back": 512}).model_dump()["held_back"] == 512
    with pytest.raises(ValueError, match="held_back must be 0 or at least 64, got 10"):
        TrainingConfig(num_batches=1, batch_size=1, learning_rate=0.1, held_back=10)
