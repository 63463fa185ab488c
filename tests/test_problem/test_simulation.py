"""Simulations of any problem: contracts by name, prices with their error, and the page on extending."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.errors import ConfigError
from smc.gbm import Simulation, SimulationParams
from smc.problem.contracts import contract_array, outside_domain, question_units, resolve_domain
from smc.problem.oracles import black_scholes
from smc.problem.problem import EUROPEAN_PUT, Problem
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.products.asian import ArithmeticAsianPut
from smc.problem.products.barrier import UpAndOutCall
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.sizes import time_grid

BARRIER = Problem(GeometricBrownianMotion(), UpAndOutCall(dates=4))
SCHEMA = BARRIER.schema
ROW = {"X0": 100.0, "K": 105.0, "H": 1.3, "T": 1.0, "r": 0.03, "d": 0.01, "v": 0.25}


def params(**changes: Any) -> SimulationParams:
    given_ = {"timesteps": 16, "network_size": 64, "batches_per_mc_run": 16, "mc_seed": 3, **changes}
    return SimulationParams(**given_)


@settings(max_examples=40, deadline=None)
@given(st.permutations(list(ROW)), st.integers(1, 5))
def test_contracts_of_any_problem_are_read_by_name_in_any_order(order: list[str], count: int) -> None:
    expected = np.array([list(ROW.values())] * count)
    columns = {name: [ROW[name]] * count for name in order}
    for form in (columns, pd.DataFrame(columns), pl.DataFrame(columns), [{name: ROW[name] for name in order}] * count):
        np.testing.assert_array_equal(contract_array(form, SCHEMA), expected)
    records = np.array([tuple(ROW[n] for n in order)] * count, dtype=[(name, float) for name in order])
    np.testing.assert_array_equal(contract_array(records, SCHEMA), expected)
    np.testing.assert_array_equal(contract_array(expected, SCHEMA), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"H": None}, r"contracts\[0\]\.H must be finite and above 1, got nan"),
        ({"H": 1.0}, r"contracts\[0\]\.H must be finite and above 1, got 1.0"),
        ({"H": "1.2"}, r"not an array of numbers: contracts\[0\]\.H is '1.2'"),
        ({"B": 1.2}, r"contracts\[0\]: 'B' unknown; the fields are X0, K, H, T, r, d, v"),
        ({"T": -1}, r"contracts\[0\]\.T must be finite and at least 0, got -1.0 \(T is in years"),
        ({"v": np.inf}, r"contracts\[0\]\.v must be finite and at least 0, got inf \(v is per square root"),
    ],
)
def test_a_contract_that_cannot_be_is_named_by_field_and_unit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation(BARRIER, params()).payoffs([{**ROW, **changes}])


def test_a_field_too_few_or_too_many_is_named() -> None:
    without = {name: value for name, value in ROW.items() if name != "H"}
    with pytest.raises(ConfigError, match=r"contracts\[0\]: H missing"):
        contract_array([without], SCHEMA)
    with pytest.raises(ConfigError, match=r"expected shape \(n, 7\) with columns X0, K, H, T, r, d, v, got \(1, 6\)"):
        contract_array([list(without.values())], SCHEMA)
    with pytest.raises(ConfigError, match=r"'H' unknown; the fields are X0, K, T, r, d, v"):
        contract_array([ROW])


def test_domains_and_samples_are_of_the_problem() -> None:
    domain = resolve_domain({"H": {"lower": 1.2, "upper": 1.4}}, SCHEMA)
    assert list(domain) == list(SCHEMA.names)
    sample = SobolSampler({"H": {"lower": 1.2, "upper": 1.4}}, seed=1, schema=SCHEMA).sample(500)
    assert sample.shape == (500, 7)
    assert not outside_domain(sample, domain, SCHEMA)
    assert outside_domain(sample + 0.3, domain, SCHEMA)["H"] == 0
    with pytest.raises(ConfigError, match=r"domain_bounds\['H'\]: lower bound must be above 1, got 0.9"):
        resolve_domain({"H": {"lower": 0.9, "upper": 1.4}}, SCHEMA)
    with pytest.raises(ConfigError, match="unknown field 'B'; allowed are X0, K, H, T, r, d, v"):
        resolve_domain({"B": {"lower": 0.9, "upper": 1.4}}, SCHEMA)
    with pytest.warns(UserWarning, match=r"domain_bounds\['T'\] reaches from 1 to 365"):
        question_units(resolve_domain({"T": {"lower": 1, "upper": 365}}, SCHEMA), SCHEMA)


@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
def test_a_price_comes_with_its_error(sampling: Any) -> None:
    contracts = SobolSampler({}, seed=1).sample(40)
    contracts = contracts[black_scholes.price(contracts) > 0.5]  # of which some paths are exercised
    simulation = Simulation(EUROPEAN_PUT, params(sampling=sampling))
    estimate = simulation.price(contracts, paths=1 << 15)
    assert estimate.paths == 1 << 15
    apart = (estimate.price - black_scholes.price(contracts)) / np.maximum(estimate.standard_error, 1e-6)
    assert np.abs(apart).max() < 5
    assert np.sqrt(np.square(apart).mean()) < 1.6
    assert simulation.price(contracts[:1], paths=1).paths == 8 * 1024  # eight samples at least
    again = simulation.price(contracts, paths=1 << 15)
    np.testing.assert_array_equal(again.price, estimate.price)


def test_levels_are_the_quantile_function_and_their_mean_is_the_price() -> None:
    simulation = Simulation(Problem(GeometricBrownianMotion(), ArithmeticAsianPut(dates=8)), params())
    contracts = SobolSampler({}, seed=2).sample(3)
    payoffs, levels = simulation.payoffs(contracts, offset=5), simulation.levels(contracts, offset=5)
    assert levels.shape == (3, 64)
    assert (levels.diff(dim=1) >= 0).all()
    np.testing.assert_allclose(levels.mean(dim=1), payoffs.mean(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(payoffs[1:2], simulation.payoffs(contracts[1:2], offset=6))
    assert simulation.payoffs(np.empty((0, 6))).shape == (0, 1024)


def test_steps_that_miss_a_date_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="timesteps is 15, and up_and_out_call looks at the price on 4 dates"):
        Simulation(BARRIER, params(timesteps=15))


@pytest.mark.service
def test_the_page_on_extending_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "own.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fields, price, levels = done.stdout.splitlines()
    assert fields == "('X0', 'G', 'T', 'r', 'a', 'v')"
    found = re.fullmatch(r"(\d+\.\d+) \+- (0\.\d+), 262,144 paths", price)
    assert found is not None
    assert float(found[2]) < 0.2
    lowest, middle, highest = (float(x) for x in levels.strip("[]").split())
    assert lowest < middle < highest
    assert lowest < float(found[1]) < highest


def test_more_paths_than_are_held_at_a_time_are_all_counted() -> None:
    contract = [[100, 105, 1.0, 0.03, 0.01, 0.25]]
    estimate = Simulation(EUROPEAN_PUT, params(timesteps=1)).price(contract, paths=(1 << 24) + (1 << 20))
    assert estimate.paths == (1 << 24) + (1 << 20)
    assert abs(estimate.price - black_scholes.price(contract))[0] < 1e-3


def test_more_coordinates_than_sobol_points_have_are_refused() -> None:
    barrier = Problem(GeometricBrownianMotion(), UpAndOutCall(dates=21202 // 2))
    with pytest.raises(ConfigError, match="at most 21,201 dimensions, 21,202 are wanted"):
        time_grid(barrier, 21202, "sobol")
    assert time_grid(barrier, 21202, "pseudorandom") == (21202, 2)
