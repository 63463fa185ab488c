from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from smc.errors import ConfigError
from smc.learning.pricer import GbmCVNNPricer
from smc.problem.contracts import (
    DEFAULT_DOMAIN,
    FIELDS,
    BoundSpec,
    Contract,
    contract_array,
    outside_domain,
    resolve_domain,
)
from tests.conftest import small_config

ROW = [100.0, 90.0, 1.0, 0.03, 0.01, 0.2]


@pytest.mark.parametrize(
    "form",
    [
        Contract(**dict(zip(FIELDS, ROW, strict=True))),
        [Contract(**dict(zip(FIELDS, ROW, strict=True)))],
        ROW,
        [ROW],
        np.array([ROW], dtype=np.float32),
        torch.tensor([ROW]),
    ],
)
def test_every_form_of_contracts_becomes_the_same_array(form: object) -> None:
    array = contract_array(form)  # type: ignore[arg-type]
    assert array.dtype == np.float64
    np.testing.assert_allclose(array, [ROW], rtol=1e-6)


def test_no_contracts_is_an_empty_batch() -> None:
    assert contract_array([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 0.0, r"contracts\[0\]\.X0 must be finite and above 0"),
        (1, -1.0, r"contracts\[0\]\.K must be finite and above 0"),
        (2, -0.1, r"contracts\[0\]\.T must be finite and at least 0"),
        (3, np.nan, r"contracts\[0\]\.r must be finite"),
        (5, np.inf, r"contracts\[0\]\.v must be finite and at least 0"),
    ],
)
def test_an_impossible_contract_is_named(column: int, value: float, message: str) -> None:
    row = list(ROW)
    row[column] = value
    with pytest.raises(ConfigError, match=message):
        contract_array([row])


def test_a_wrong_shape_is_refused_with_the_shape_that_is_wanted() -> None:
    with pytest.raises(ConfigError, match=r"expected shape \(n, 6\) with columns X0, K, T, r, d, v, got \(1, 5\)"):
        contract_array([ROW[:5]])
    with pytest.raises(ConfigError, match="not an array of numbers"):
        contract_array([["a"] * 6])


def test_a_contract_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        Contract(X0=1, K=1, T=1, r=0, d=0, v=0.1, sigma=0.2)  # type: ignore[call-arg]


def test_empty_bounds_mean_the_default_domain() -> None:
    assert resolve_domain({}) == dict(DEFAULT_DOMAIN)
    assert resolve_domain({"T": {"lower": 0.5, "upper": 1.0}})["T"] == BoundSpec(lower=0.5, upper=1.0)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"sigma": {"lower": 0, "upper": 1}}, "unknown field 'sigma'; allowed are X0, K, T, r, d, v"),
        ({"v": {"lower": 0.5, "upper": 0.1}}, r"domain_bounds\['v'\]: lower must be below upper, got 0.5 and 0.1"),
        ({"T": {"lower": 0.0, "upper": 1.0}}, "lower bound must be above 0"),
        ({"r": {"lower": 0.0}}, r"domain_bounds\['r'\]: upper: Field required"),
    ],
)
def test_bad_bounds_are_named(bounds: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_domain(bounds)


def test_contracts_outside_the_domain_are_found() -> None:
    rows = np.array([ROW, [100, 200, 1, 0.03, 0.01, 0.9]])
    assert outside_domain(rows, DEFAULT_DOMAIN) == {"K": 1, "v": 1}


@pytest.mark.parametrize(
    ("field", "lower", "upper"),
    [
        ("T", 1, 365),
        ("T", 7, 730),
        ("T", 0.05, 61),
        ("r", 0, 8),
        ("r", -3, 0.5),
        ("d", 0, 4),
        ("d", 1, 2),
        ("v", 5, 60),
        ("v", 0.1, 80),
        ("v", 0.05, 5.5),
    ],
)
def test_a_domain_that_looks_like_days_or_percent_is_questioned(field: str, lower: float, upper: float) -> None:
    config = replace(small_config(), domain_bounds={field: BoundSpec(lower=lower, upper=upper)})
    with pytest.warns(UserWarning, match=rf"domain_bounds\['{field}'\] reaches .* is that the right unit.*{field} is "):
        GbmCVNNPricer(config)


@pytest.mark.parametrize(
    ("field", "lower", "upper"), [("T", 0.01, 60), ("r", -0.2, 1), ("d", 0, 1), ("v", 0.01, 5), ("X0", 1, 1e6)]
)
def test_a_wide_domain_is_not(field: str, lower: float, upper: float) -> None:
    GbmCVNNPricer(replace(small_config(), domain_bounds={field: BoundSpec(lower=lower, upper=upper)}))


@pytest.mark.parametrize(
    ("column", "wrong", "unit"),
    [
        (2, -1, "T is in years, so that 30 days are 0.082"),
        (2, np.nan, "T is in years"),
        (2, 30, "T is in years"),
        (3, np.inf, "r is per year, so that 5 % is 0.05"),
        (3, 5, "r is per year"),
        (4, 2, "d is per year"),
        (5, -0.2, "v is per square root of a year, so that 20 % is 0.2"),
        (5, 20, "v is per square root of a year"),
    ],
)
def test_a_refusal_names_the_unit_of_its_field(column: int, wrong: float, unit: str) -> None:
    row = [*ROW]
    row[column] = wrong
    pricer = GbmCVNNPricer(small_config())
    with pytest.raises(ConfigError, match=re.escape(unit)), warnings.catch_warnings(action="ignore"):
        pricer.predict_price([row])
