from __future__ import annotations

import numpy as np
import pytest

from smc.errors import ConfigError
from smc.problem.contracts import DEFAULT_DOMAIN, FIELDS
from smc.problem.sobol_sampler import SobolSampler


def test_contracts_fill_the_domain() -> None:
    contracts = SobolSampler({}, seed=1).sample(4096)
    for column, name in enumerate(FIELDS):
        bound = DEFAULT_DOMAIN[name]
        values = contracts[:, column]
        assert bound.lower <= values.min() < values.max() <= bound.upper
        assert values.mean() == pytest.approx((bound.lower + bound.upper) / 2, abs=1e-3 * (bound.upper - bound.lower))


@pytest.mark.parametrize("skip", [1, 7, 1023, 1024, 5000])
def test_a_sampler_resumed_by_skip_continues_the_sequence(skip: int) -> None:
    whole = SobolSampler({}, seed=3).sample(skip + 50)
    resumed = SobolSampler({}, seed=3, skip=skip)
    assert np.array_equal(resumed.sample(50), whole[skip:])
    assert resumed.skip == skip + 50


def test_batches_of_any_size_give_the_same_sequence() -> None:
    whole = SobolSampler({}, seed=3).sample(3000)
    sampler = SobolSampler({}, seed=3)
    assert np.array_equal(np.concatenate([sampler.sample(n) for n in (1, 1500, 0, 499, 1000)]), whole)


def test_going_back_is_possible() -> None:
    sampler = SobolSampler({}, seed=3)
    later = sampler.unit_points(2000, 10)
    assert np.array_equal(sampler.unit_points(0, 10), SobolSampler({}, seed=3).unit_points(0, 10))
    assert np.array_equal(sampler.unit_points(2000, 10), later)


def test_seeds_differ() -> None:
    assert not np.allclose(SobolSampler({}, seed=1).sample(8), SobolSampler({}, seed=2).sample(8))


def test_a_negative_skip_is_refused() -> None:
    with pytest.raises(ConfigError, match="skip must be at least 0"):
        SobolSampler({}, seed=1, skip=-1)


def test_the_sequence_goes_on_beyond_the_points_of_one_scrambling() -> None:
    sampler = SobolSampler({}, seed=3)
    edge = 1 << 30
    across = SobolSampler({}, seed=3).unit_points(edge, 4)
    assert np.array_equal(across, sampler.unit_points(edge, 4))
    assert not np.allclose(across, sampler.unit_points(0, 4))
