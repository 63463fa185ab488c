from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from smc.models.numerical import Precision
from smc.simulation.normals import _lower_quantile32, box_muller, bridge_increments, philox4x32, sobol_normals


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of Random123's kat_vectors for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(key[0] | key[1] << 32, counter)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("precision", list(Precision))
def test_box_muller_normals_are_normal_and_independent(precision: Precision) -> None:
    words = philox4x32(5, (np.arange(250_000, dtype=np.uint64), 0, 0, 0))
    normals = box_muller(words, precision)
    for z in normals:
        assert z.dtype == precision.numpy
        assert stats.kstest(z, "norm").pvalue > 1e-4
    correlation = np.corrcoef(normals)
    assert np.abs(correlation - np.eye(len(normals))).max() < 5 / np.sqrt(250_000)


def test_the_float32_quantile_is_accurate_in_both_regions() -> None:
    p = np.concatenate([np.logspace(-9.6, np.log10(0.5), 20_001), np.linspace(0.07, 0.5, 5000)]).astype(np.float32)
    exact = ndtri(p.astype(np.float64))
    # Relative to max(|z|, 1): next to the median the error is that of p - 1/2 in float32.
    assert (np.abs(_lower_quantile32(p) - exact) / np.maximum(np.abs(exact), 1)).max() < 6e-7


@pytest.mark.parametrize("precision", list(Precision))
def test_sobol_normals_are_one_to_a_stratum(precision: Precision) -> None:
    z = sobol_normals(9, np.array([4, 5], dtype=np.uint64), 1024, 3, precision)
    assert z.shape == (2, 3, 1024)
    assert z.dtype == precision.numpy
    strata = np.floor(stats.norm.cdf(z.astype(np.float64)) * 1024 * (1 - 1e-7)).astype(int)
    for contract in strata:
        for dimension in contract:
            # float32 may round a point over its stratum's edge.
            assert len(set(dimension.tolist())) >= 1024 - (8 if precision is Precision.float32 else 0)


def test_each_contract_has_a_scrambling_of_its_own() -> None:
    z = sobol_normals(9, np.arange(200, dtype=np.uint64), 64, 2, Precision.float64)
    assert len({row.tobytes() for row in z[:, 0]}) == 200
    first = z[:, 0, 0]
    assert stats.kstest(first, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z[:, 0, 0], z[:, 1, 0])[0, 1]) < 5 / np.sqrt(200)


def test_a_contract_beyond_32_bits_has_its_own_stream() -> None:
    near = sobol_normals(9, np.array([5], dtype=np.uint64), 64, 1, Precision.float64)
    far = sobol_normals(9, np.array([5 + 2**32], dtype=np.uint64), 64, 1, Precision.float64)
    assert not np.allclose(near, far)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 100])
def test_the_bridge_is_orthogonal_and_its_end_is_the_first_normal(steps: int) -> None:
    matrix = bridge_increments(steps)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(steps), atol=1e-12)
    end = matrix.sum(axis=0)
    np.testing.assert_allclose(end, [np.sqrt(steps)] + [0] * (steps - 1), atol=1e-12)
