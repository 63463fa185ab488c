"""Input is read by its names and its types, or refused with what was wrong and where."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from jobs.recipes import Sweep, make_experiment, read_sweep, read_yaml
from jobs.search import Random, Range, Search
from smc.errors import ConfigError
from smc.learning.experiment import Experiment
from smc.learning.network import CVNNConfig
from smc.learning.plan import TrainingConfig
from smc.learning.pricer import GbmCVNNPricer
from smc.problem.contracts import FIELDS, BoundSpec, Contract, contract_array
from smc.simulation.engine import SimulationParams
from smc.storage import AsyncBlockchainModelStore
from smc.storage.objects import MemoryObjectStore
from tests.conftest import small_config, small_training

ROWS = np.array([[100, 105, 1.0, 0.03, 0.01, 0.25], [90, 80, 0.5, 0.0, 0.02, 0.4], [110, 111, 2, 0.01, 0.03, 0.1]])

# How a table with named columns may come: from the columns' order, the names and the rows.
TABLES = {
    "pandas": lambda names, rows: pd.DataFrame(rows, columns=list(names)),
    "pandas, nullable": lambda names, rows: pd.DataFrame(rows, columns=list(names)).convert_dtypes(),
    "pandas, objects": lambda names, rows: pd.DataFrame(rows, columns=list(names)).astype(object),
    "pandas, another index": lambda names, rows: pd.DataFrame(rows, columns=list(names), index=list("cab")),
    "polars": lambda names, rows: pl.DataFrame(dict(zip(names, rows.T, strict=True))),
    "records": lambda names, rows: np.array([tuple(r) for r in rows], dtype=[(n, float) for n in names]),
    "mapping of arrays": lambda names, rows: dict(zip(names, rows.T, strict=True)),
    "mapping of lists": lambda names, rows: dict(zip(names, rows.T.tolist(), strict=True)),
    "mapping of tensors": lambda names, rows: dict(zip(names, torch.from_numpy(rows.copy()).T, strict=True)),
    "list of mappings": lambda names, rows: [dict(zip(names, row, strict=True)) for row in rows.tolist()],
}


@pytest.mark.parametrize("kind", TABLES)
@given(order=st.permutations(range(6)))
def test_a_table_is_read_by_its_names_in_any_order(kind: str, order: list[int]) -> None:
    names = [FIELDS[i] for i in order]
    assert np.array_equal(contract_array(TABLES[kind](names, ROWS[:, order])), ROWS)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("S", *FIELDS[1:]), "'S' unknown"),
        (FIELDS[:5], "v missing"),
        ((*FIELDS, "id"), "'id' unknown"),
        (("K", "X0", "T", "r", "d", "vol"), "'vol' unknown"),
    ],
)
def test_a_table_with_other_columns_is_refused(kind: str, names: tuple[str, ...], message: str) -> None:
    rows = np.ones((3, len(names)))
    with pytest.raises(ConfigError, match=message):
        contract_array(TABLES[kind](names, rows))


def test_one_contract_in_every_form() -> None:
    fields = dict(zip(FIELDS, ROWS[0], strict=True))
    backwards = dict(reversed(fields.items()))
    for one in (
        Contract(**fields),
        backwards,
        [backwards],
        [Contract(**fields)],
        ROWS[0],
        ROWS[0].tolist(),
        pd.DataFrame([backwards]),
    ):
        assert np.array_equal(contract_array(one), ROWS[:1])
    assert np.array_equal(contract_array([Contract(**fields), backwards]), ROWS[[0, 0]])


class Quantity:
    """Whatever says that it is a number may be one."""

    def __float__(self) -> float:
        return 0.25


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.int8(1), Decimal("0.25"), Fraction(1, 4), Quantity()])
def test_whatever_is_a_number_is_taken(value: Any) -> None:
    row = [100, 105, 1.0, 0.03, 0.01, value]
    for contracts in ([row], np.array([row], dtype=object), dict(zip(FIELDS, row, strict=True))):
        assert contract_array(contracts)[0, 5] == float(value)


@pytest.mark.parametrize("value", ["0.25", b"0.25", True, np.True_, 0.25 + 1j, 0.25 + 0j, [0.25], "abc", {}, object()])
@pytest.mark.parametrize("form", ["rows", "objects", "mapping", "pandas", "polars"])
def test_what_is_no_number_is_refused_with_row_and_column(value: Any, form: str) -> None:
    rows = [*ROWS[:2].tolist(), [100, 105, 1.0, 0.03, 0.01, value]]
    columns: dict[str, Any] = {field: [row[i] for row in rows] for i, field in enumerate(FIELDS)}
    objects = np.empty((3, 6), dtype=object)
    for place in np.ndindex(3, 6):
        objects[place] = rows[place[0]][place[1]]
    contracts = {
        "rows": lambda: rows,
        "objects": lambda: objects,
        "mapping": lambda: [dict(zip(FIELDS, row, strict=True)) for row in rows],
        "pandas": lambda: pd.DataFrame(columns),
        "polars": lambda: pl.DataFrame({**columns, "v": pl.Series(columns["v"], dtype=pl.Object)}),
    }[form]()
    with pytest.raises(ConfigError, match=r"contracts(\[2\]\.v|: )"):
        contract_array(contracts)


@pytest.mark.parametrize(
    "contracts",
    [
        np.ma.array(ROWS, mask=[[0] * 6, [0, 0, 0, 0, 0, 1], [0] * 6]),
        {f: np.ma.array(c, mask=[0, f == "v", 0]) for f, c in zip(FIELDS, ROWS.T, strict=True)},
        pd.DataFrame(ROWS, columns=list(FIELDS)).mask(lambda t: t == 0.4),
        pd.DataFrame(ROWS, columns=list(FIELDS)).convert_dtypes().mask(lambda t: t == 0.4),
        pl.DataFrame({f: [None if x == 0.4 else x for x in c] for f, c in zip(FIELDS, ROWS.T, strict=True)}),
        [[None if x == 0.4 else x for x in row] for row in ROWS.tolist()],
        np.where(ROWS == 0.4, np.nan, ROWS),
    ],
)
def test_a_value_that_is_missing_is_not_priced(contracts: Any) -> None:
    with pytest.raises(ConfigError, match=r"contracts\[1\]\.v"):
        contract_array(contracts)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bool])
def test_a_tensor_of_no_numbers_is_refused(dtype: torch.dtype) -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(1))
    for ask in (pricer.predict_price, pricer.predict_distribution, pricer.predict_greeks):
        with pytest.raises(ConfigError, match=r"contracts\[0\]\.X0"):
            ask(torch.ones((2, 6), dtype=dtype))


def test_a_table_is_priced_as_its_array() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    backwards = pd.DataFrame(ROWS, columns=list(FIELDS))[list(reversed(FIELDS))]
    for ask in (
        pricer.predict_price,
        lambda c: pricer.predict_distribution(c).host_levels,
        lambda c: pricer.predict_greeks(c).delta,
    ):
        assert np.array_equal(ask(backwards), ask(ROWS))


# --- configurations take numbers only as numbers -------------------------------------------------------

SIM = {"timesteps": 4, "network_size": 32, "batches_per_mc_run": 8, "mc_seed": 7}
TRAIN = {"num_batches": 5, "batch_size": 4, "learning_rate": 0.1}
EXPERIMENT = {"name": "a", "simulation": {"sim_params": SIM}, "training": TRAIN}
NUMBERS: list[tuple[type[BaseModel], dict[str, Any], str, bool]] = [
    *((SimulationParams, SIM, name, True) for name in (*SIM, "threads_per_block", "buffer_size", "skip")),
    *((TrainingConfig, TRAIN, name, True) for name in ("num_batches", "batch_size", "fresh_per_batch", "warmup")),
    *((TrainingConfig, TRAIN, name, False) for name in ("learning_rate", "differential")),
    (CVNNConfig, {}, "seed", True),
    (Experiment, EXPERIMENT, "commit_interval", True),
    (Experiment, EXPERIMENT, "num_cpus", False),
    (Experiment, EXPERIMENT, "num_gpus", False),
    (BoundSpec, {"lower": 0.0, "upper": 9.0}, "lower", False),
    (Contract, dict(zip(FIELDS, ROWS[0], strict=True)), "v", False),
    (Sweep, {"experiments": {"a": None}}, "concurrency", True),
    (Random, {"count": 1, "parameters": {"training.learning_rate": {"low": 0.1, "high": 0.2}}}, "count", True),
    (Search, {"trials": 3, "parameters": {"training.learning_rate": {"low": 0.1, "high": 0.2}}}, "trials", True),
    (Range, {"low": 0.1, "high": 99.0}, "low", False),
]


@pytest.mark.parametrize(("model", "fields", "name", "whole"), NUMBERS)
@pytest.mark.parametrize(
    "value", [True, False, "5", b"5", "yes", Fraction(5), Decimal(5), 5 + 0j, None, [5], 5.0, math.nan]
)
def test_a_configuration_takes_numbers_only_as_numbers(
    model: type[BaseModel], fields: dict[str, Any], name: str, whole: bool, value: Any
) -> None:
    if (value == 5.0 and isinstance(value, float) and not whole) or (
        value is None and name in ("fresh_per_batch", "commit_interval", "concurrency")
    ):
        return
    with pytest.raises(ValidationError, match=name):
        model.model_validate({**fields, name: value})


@pytest.mark.parametrize(("model", "fields", "name", "whole"), NUMBERS)
def test_a_configuration_takes_the_numbers_of_numpy(
    model: type[BaseModel], fields: dict[str, Any], name: str, whole: bool
) -> None:
    value = 32 if name in ("network_size", "threads_per_block") else 1
    for given_value in (value, np.int64(value), np.uint8(value), *(() if whole else (np.float32(value), float(value)))):
        made = model.model_validate({**fields, name: given_value})
        assert getattr(made, name) == value
        assert type(getattr(made, name)) in (int, float)


@pytest.mark.parametrize("interval", [np.int64(2), np.uint8(2), 2])
def test_a_commit_interval_may_be_numpys(interval: Any) -> None:
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    result = GbmCVNNPricer(small_config()).train(
        small_training(4), blockchain_store=store, auto_commit=True, commit_interval=interval
    )
    assert len(result.commits) == 2
    for wrong in (True, 2.0, "2", np.bool_(True), 0, np.int64(-1)):
        with pytest.raises(ConfigError, match="commit_interval must be a whole number of batches, at least 1"):
            GbmCVNNPricer(small_config()).train(
                small_training(2),
                blockchain_store=store,
                auto_commit=True,
                commit_interval=wrong,  # type: ignore[arg-type]
            )


# --- YAML ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0123", 123),  # 83 in YAML 1.1
        ("yes", "yes"),  # true
        ("off", "off"),
        ("NO", "NO"),
        ("1:30", "1:30"),  # 90
        ("1e-3", 0.001),  # text
        ("1.5e3", 1500.0),
        ("0o17", 15),
        ("true", True),
        ("~", None),
        ("'5'", "5"),
    ],
)
def test_yaml_means_what_version_1_2_says(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_batches: yes", "training.num_batches: must be a whole number, not the str 'yes'"),
        ("num_batches: true", "training.num_batches: must be a whole number, not the bool True"),
        ("num_batches: '60'", "training.num_batches: must be a whole number, not the str '60'"),
        ("num_batches: 1:30", "training.num_batches: must be a whole number, not the str '1:30'"),
        ("num_batches: 60.0", "training.num_batches: must be a whole number, not the float 60.0"),
        ("num_batches: 2026-11-27", "training.num_batches: must be a whole number, not the date"),
        ("learning_rate: on", "training.learning_rate: must be a number, not the str 'on'"),
        ("learning_rate: true", "training.learning_rate: must be a number, not the bool True"),
        ("learning_rate: .nan", "training.learning_rate"),
        ("learning_rate: .inf", "training.learning_rate"),
    ],
)
def test_a_sweep_file_that_means_no_number_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"recipe: tiny\nexperiments: {{a: {{training: {{{setting}}}}}}}")
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert message in str(caught.value)


def test_a_seed_with_a_leading_zero_is_that_number(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("recipe: tiny\nexperiments: {a: {simulation: {sim_params: {mc_seed: 0123}}}}")
    assert read_sweep(path)[1][0].simulation.sim_params.mc_seed == 123


def test_names_in_a_sweep_file_are_read_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes("# größer\nrecipe: tiny\nexperiments: {a: {commit_message_template: 'größer {step}'}}".encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert read_sweep(path)[1][0].commit_message_template == "größer {step}"
    assert make_experiment("b", recipe="tiny").name == "b"
