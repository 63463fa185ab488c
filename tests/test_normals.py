from __future__ import annotations

import numba
import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from smc.models.numerical import Precision
from smc.simulation import lanes
from smc.simulation.elementary import exp, log, normal_quantile, sine_and_cosine
from smc.simulation.normals import box_muller, bridge_increments, philox4x32, sobol_points
from tests import reference_normals


def sobol_normals(seed: int, contracts: np.ndarray, paths: int, dimensions: int, precision: Precision) -> np.ndarray:
    """Those of the engine. Shapes: contracts (n,) uint64 -> (n, dimensions, paths)."""
    fill = lanes.sobol_float32 if precision is Precision.float32 else lanes.sobol_float64
    z = np.empty((len(contracts), dimensions, paths), dtype=precision.numpy)
    for row, contract in enumerate(contracts):
        fill(sobol_points(dimensions, paths), np.uint64(seed), contract, 0, paths, z[row])
    return z


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


@numba.njit(fastmath=True)  # type: ignore[untyped-decorator]
def applied(which: int, x: np.ndarray, out: np.ndarray) -> None:
    """A loop that the compiler makes vector instructions of, as it does of the engine's."""
    for i in range(len(x)):
        if which == 0:
            out[i, 0] = normal_quantile(x[i])
        elif which == 1:
            out[i, 0] = exp(x[i])
        elif which == 2:
            out[i, 0] = log(x[i])
        else:
            out[i, 0], out[i, 1] = sine_and_cosine(x[i])


def values_of(which: int, x: np.ndarray) -> np.ndarray:
    out = np.zeros((len(x), 2), dtype=np.float32)
    applied(which, x.astype(np.float32), out)
    return out.astype(np.float64)


def test_the_float32_quantile_is_accurate_in_both_regions() -> None:
    # As far out as a point of 32 bits can be.
    p = np.concatenate([np.logspace(np.log10(2.0**-33), np.log10(0.5), 20_001), np.linspace(0.07, 0.5, 5000)])
    p = p.astype(np.float32)
    exact = ndtri(p.astype(np.float64))
    # Relative to max(|z|, 1): next to the median the error is that of p - 1/2 in float32.
    assert (np.abs(values_of(0, p)[:, 0] - exact) / np.maximum(np.abs(exact), 1)).max() < 6e-7


def test_elementary_functions_are_right_to_a_few_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 100_001).astype(np.float32)
    assert np.abs(values_of(1, x)[:, 0] / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    assert values_of(1, np.array([-1e4, 1e4]))[:, 0] == pytest.approx(np.exp([-87.0, 88.0]), rel=1e-6)  # held
    y = np.exp(np.linspace(-85, 85, 100_001)).astype(np.float32)
    exact = np.log(y.astype(np.float64))
    assert (np.abs(values_of(2, y)[:, 0] - exact) / np.maximum(np.abs(exact), 1)).max() < 2e-7
    turns = ((np.arange(100_000) + 0.5) / 100_000).astype(np.float32)
    angle = 2 * np.pi * turns.astype(np.float64)
    assert np.abs(values_of(3, turns) - np.stack([np.sin(angle), np.cos(angle)], axis=1)).max() < 2e-7


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.float32, 2e-6), (Precision.float64, 1e-12)])
def test_sobol_normals_are_those_of_the_reference(precision: Precision, tolerance: float) -> None:
    contracts = np.array([0, 5, 2**33 + 1], dtype=np.uint64)
    got = sobol_normals(2**40 + 9, contracts, 1000, 5, precision)
    np.testing.assert_allclose(
        got, reference_normals.sobol_normals(2**40 + 9, contracts, 1000, 5, precision), atol=tolerance
    )


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
