"""Grids, draws and searches: the same whenever they are read, and rebuilt from what the ledger has."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import sweep
from jobs.recipes import read_sweep
from jobs.search import PastTrial, Random, Range, Search, Trials, draws, grid, nested, trial_name
from smc.errors import ConfigError
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord


def read(text: str, tmp_path: Path, name: str = "lr") -> list[tuple[str, dict[str, object]]]:
    path = tmp_path / f"{name}.yaml"
    path.write_text("recipe: tiny\n" + text)
    return [(e.name, e.parameters) for e in read_sweep(path)[1]]


def test_a_grid_is_every_combination_named_by_its_parameters(tmp_path: Path) -> None:
    text = "grid: {training.learning_rate: [0.001, 0.01], network.hidden: [[8], [16, 16]]}"
    assert read(text, tmp_path) == [
        ("lr/learning_rate=0.001_hidden=8", {"training.learning_rate": 0.001, "network.hidden": [8]}),
        ("lr/learning_rate=0.001_hidden=16x16", {"training.learning_rate": 0.001, "network.hidden": [16, 16]}),
        ("lr/learning_rate=0.01_hidden=8", {"training.learning_rate": 0.01, "network.hidden": [8]}),
        ("lr/learning_rate=0.01_hidden=16x16", {"training.learning_rate": 0.01, "network.hidden": [16, 16]}),
    ]
    path = tmp_path / "lr.yaml"
    experiments = read_sweep(path)[1]
    assert [e.training.learning_rate for e in experiments] == [0.001, 0.001, 0.01, 0.01]
    assert [list(e.network.hidden) for e in experiments] == [[8], [16, 16]] * 2
    assert list(grid({"a": [1, 2], "b": ["x"]})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trial_name("s", {"x.lr": 1e-05, "on": True, "odd": "a b+c"}) == "s/lr=1e-05_on=True_odd=a-b-c"


def test_draws_are_spread_and_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    space = {
        "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "training.batch_size": {"choices": [16, 32, 64]},
        "network.seed": {"low": 0, "high": 9},
    }
    many = list(draws(Random.model_validate({"count": 400, "seed": 3, "parameters": space})))
    few = list(draws(Random.model_validate({"count": 5, "seed": 3, "parameters": space})))
    assert many[:5] == few
    assert many != list(draws(Random.model_validate({"count": 400, "seed": 4, "parameters": space})))
    rates = np.log10([d["training.learning_rate"] for d in many])
    assert np.histogram(rates, bins=3, range=(-4, -1))[0].min() > 90
    assert {d["training.batch_size"] for d in many} == {16, 32, 64}
    assert {d["network.seed"] for d in many} == set(range(10))
    text = "random: {count: 3, parameters: {training.learning_rate: {low: 0.001, high: 0.1}}}"
    first, again = read(text, tmp_path), read(text, tmp_path)
    assert first == again
    assert len(first) == 3
    whole = [Range(low=1, high=1000, log=True).draw(np.random.default_rng(i)) for i in range(50)]
    assert all(isinstance(value, int) and 1 <= value <= 1000 for value in whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {training.lr: [1]}", "unknown key 'training.lr'"),
        ("grid: {training.learning_rate: []}", "grid.training.learning_rate has no values"),
        ("grid: {training.learning_rate: [0.1, 0.1]}", "two experiments are called 'lr/learning_rate=0.1'"),
        ("random: {count: 0, parameters: {a: {choices: [1]}}}", "random.count: Input should be greater than"),
        ("random: {count: 1, parameters: {training.learning_rate: {low: 2, high: 1}}}", "low must be below high"),
        ("random: {count: 1, parameters: {training.learning_rate: {low: 0, high: 1, log: true}}}", "must be above 0"),
        ("search: {trials: 2, objective: profit, parameters: {a: {choices: [1]}}}", "objective 'profit' is unknown"),
        ("search: {trials: 2, parameters: {training.lr: {low: 0.1, high: 1}}}", "unknown key 'training.lr'"),
        ("concurrency: 0\nexperiments: {a: }", "concurrency: Input should be greater than"),
        ("grid: {training: [5], training.batch_size: [8]}", "training is given a value as a whole as well"),
        ("grid: {name: [a, b]}", "unknown key 'name'"),
        ("grid: {parameters.x: [1]}", "unknown key 'parameters'"),
        ("random: {count: 1, seed: -1, parameters: {a: {choices: [1]}}}", "random.seed: Input should be greater"),
        ("search: {trials: 1, seed: -1, parameters: {a: {choices: [1]}}}", "search.seed: Input should be greater"),
        ("random: {count: 1, parameters: {a: {low: 1, high: 9223372036854775808}}}", "whole bounds must be below"),
        ("random: {count: 1, parameters: {a: {low: -1.7e308, high: 1.7e308}}}", "their difference must be finite"),
        (f"random: {{count: 1, parameters: {{a: {{low: 0, high: {'9' * 400}}}}}}}", "whole bounds must be below"),
    ],
)
def test_a_bad_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(text, tmp_path)
    assert message in str(refused.value)
    assert "lr.yaml: " in str(refused.value)


SEARCH = Search.model_validate(
    {"trials": 12, "parameters": {"x": {"low": 0.0, "high": 1.0}, "h": {"choices": [[8], [16, 16]]}}}
)


def test_a_search_learns_and_ends() -> None:
    trials = Trials("s", SEARCH, {})
    names, values = [], []
    while (trial := trials.ask()) is not None:
        value = (trial.parameters["x"] - 0.3) ** 2
        names.append(trial.name)
        values.append(value)
        trials.tell(trial, value)
    assert names == [f"s/{i:03d}" for i in range(12)]
    assert trials.best is not None
    assert trials.best[1] == min(values)
    assert trials.best[0]["h"] in ([8], [16, 16])


def test_a_draw_is_within_its_bounds_also_when_it_is_rounded() -> None:
    space = Range(low=1.23456e-5, high=1.23457e-5)
    assert all(space.low <= space.draw(np.random.default_rng(i)) <= space.high for i in range(20))  # type: ignore[operator]


def test_a_number_is_one_however_it_is_written(tmp_path: Path) -> None:
    written, plain = (f"grid: {{training.learning_rate: [{value}]}}" for value in ("1e-3", "0.001"))
    assert read(written, tmp_path) == read(plain, tmp_path)


def test_equal_draws_are_one_experiment(tmp_path: Path) -> None:
    text = "random: {count: 30, parameters: {training.batch_size: {choices: [8, 16]}}}"
    assert sorted(name for name, _ in read(text, tmp_path)) == ["lr/batch_size=16", "lr/batch_size=8"]


def test_a_search_whose_file_was_changed_takes_no_name_again() -> None:
    past = asyncio.run(past_trials({f"s/{i:03d}": ([100], 0.5, False) for i in range(4)}))
    found = ({"x": 0.5, "h": [8]}, {"x": 7.0, "h": [8]}, {"x": 0.5}, {"x": 0.5, "h": [3]})
    for (name, trial), parameters in zip(list(past.items()), found, strict=True):
        past[name] = replace(trial, versions=[trial.versions[0].model_copy(update={"parameters": parameters})])
    trials = Trials("s", SEARCH, past)
    names = []
    while (trial := trials.ask()) is not None:
        names.append(trial.name)
        trials.tell(trial, 1.0)
    assert names == [f"s/{i:03d}" for i in range(4, 15)]  # 12 trials of these ranges, of which one is there


def test_trials_far_behind_are_given_up() -> None:
    trials = Trials("s", SEARCH, {})
    given_up = []
    for i in range(6):
        trial = trials.ask()
        assert trial is not None
        loss = 1.0 if i < 4 else (5.0 if i == 4 else 0.5)
        stops = [trial.should_stop(step, 100, loss) for step in range(0, 100, 4)]
        given_up.append(any(stops))
        assert not any(stops[:3])  # asked at tenths, of which the first is at step 10
        trials.tell(trial, None if any(stops) else loss, pruned=any(stops))
    assert given_up == [False, False, False, False, True, False]
    assert not Trials("s", SEARCH.model_copy(update={"prune": False}), {}).ask().should_stop(50, 100, math.inf)  # type: ignore[union-attr]


async def past_trials(plan: dict[str, tuple[list[int], float | None, bool]]) -> dict[str, PastTrial]:
    past = {}
    async with AsyncBlockchainModelStore("memory", objects=MemoryObjectStore()) as store:
        for name, (steps, value, pruned) in plan.items():
            versions: list[ModelVersion] = []
            for step in steps:
                record = CommitRecord(
                    ledger="x",
                    message="",
                    step=step,
                    loss=1.0,
                    experiment=name,
                    parameters={"x": 0.25 + 0.01 * len(past), "h": [16, 16]},
                    pruned=pruned and step == steps[-1],
                )
                versions.append(await store.commit(f"{name}{step}".encode(), record))
            past[name] = PastTrial(versions, 100, value)
    return past


def test_a_search_goes_on_from_the_ledger() -> None:
    past = asyncio.run(
        past_trials(
            {
                "s/000": ([50, 100], 0.5, False),
                "s/001": ([50], None, False),  # interrupted
                "s/002": ([50], None, True),  # given up
                "s/004": ([100], 0.1, False),
                "s/notes": ([100], 0.0, False),  # not one of its trials
            }
        )
    )
    trials = Trials("s", SEARCH, past)
    assert trials.best == ({"x": 0.28, "h": [16, 16]}, 0.1)
    first = trials.ask()
    assert first is not None
    assert (first.name, first.parameters) == ("s/001", {"x": 0.26, "h": [16, 16]})
    trials.tell(first, 0.05)
    assert trials.best == ({"x": 0.26, "h": [16, 16]}, 0.05)
    names = []
    while (trial := trials.ask()) is not None:
        names.append(trial.name)
        trials.tell(trial, 1.0)
    assert names == ["s/003", *(f"s/{i:03d}" for i in range(5, 12))]


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_on_the_cluster_ends_at_its_number_of_trials(
    tmp_path: Path, on_seaweed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tune.yaml"
    text = (
        "recipe: tiny\ndefaults: {{training: {{num_batches: 30}}}}\n"
        "search: {{trials: {}, parameters: {{training.learning_rate: {{low: 0.001, high: 0.1, log: true}}}}}}\n"
    )
    path.write_text(text.format(1))
    assert sweep.main([str(path), "--ledger", on_seaweed, "--concurrency", "1"]) == 0
    assert "best price: " in capfd.readouterr().out
    path.write_text(text.format(2))
    assert sweep.main([str(path), "--ledger", on_seaweed]) == 0  # goes on: one more
    out = capfd.readouterr().out
    assert "1 of 1 experiments done" in out
    path.write_text(text.format(3).replace("num_batches: 30", "num_batches: 40"))
    assert sweep.main([str(path), "--ledger", on_seaweed]) == 2  # what its trials came to says nothing of these
    assert "other settings" in capfd.readouterr().err

    async def heads() -> dict[str, ModelVersion]:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            return dict((await store.catalog()).heads)

    found = asyncio.run(heads())
    assert sorted(found) == ["tune/000", "tune/001"]
    assert all(v.step == 30 and set(v.parameters) == {"training.learning_rate"} for v in found.values())
    assert len({v.parameters["training.learning_rate"] for v in found.values()}) == 2  # type: ignore[type-var]


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_parameters_that_do_not_go_together_fail_their_trial_alone(
    tmp_path: Path, on_seaweed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(
        "recipe: tiny\n"
        "search: {trials: 3, objective: loss, seed: 14, parameters: {training.fresh_per_batch: {choices: [4, 32]}}}\n"
    )
    assert sweep.main([str(path), "--ledger", on_seaweed, "--concurrency", "1"]) == 2
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("tune/00") and "contracts_per_s" not in line]
    failed = [line for line in lines if "fresh_per_batch must be at most batch_size 16, got 32" in line]
    assert len(lines) == 3
    assert 0 < len(failed) < 3
    assert f"{3 - len(failed)} of 3 experiments done, {len(failed)} failed" in out
    assert "best loss: " in out
