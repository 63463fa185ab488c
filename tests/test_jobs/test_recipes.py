from __future__ import annotations

from pathlib import Path

import pytest

from jobs.recipes import RECIPES, make_experiment, read_sweep
from smc.errors import ConfigError


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_is_an_experiment(recipe: str) -> None:
    assert make_experiment("x", recipe=recipe).device == ("cuda" if recipe == "gpu" else "cpu")


def test_settings_overlay_key_by_key() -> None:
    experiment = make_experiment(
        "x", {"training": {"batch_size": 8}}, {"training": {"learning_rate": 0.5}, "num_gpus": 0.5}, recipe="tiny"
    )
    assert (experiment.training.batch_size, experiment.training.learning_rate) == (8, 0.5)
    assert experiment.training.num_batches == 60
    assert experiment.device == "cuda"


@pytest.mark.parametrize("path", sorted(Path("sweeps").glob("*.yaml")), ids=str)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    sweep, experiments = read_sweep(path)
    assert experiments or sweep.search


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "experiments: {a: {training: {lr: 1}}}",
            r"experiment 'a': unknown key 'training.lr'; allowed are num_batches",
        ),
        ("experiments: {a: }\nepochs: 3", "unknown key 'epochs'; allowed are ledger, recipe, defaults, experiments"),
        ("experiments: {a: {colour: red}}", "unknown key 'colour'; allowed are simulation, domain, network"),
        ("experiments: {a: {simulation: {sim_params: {paths: 1}}}}", "unknown key 'simulation.sim_params.paths'"),
        ("experiments: {a: {training: {batch_size: -1}}}", "training.batch_size: Input should be greater than"),
        ("experiments: {a: {domain: {v: {lower: 1, upper: 0.1}}}}", "domain.v: lower must be below upper"),
        ("experiments: {a: {domain: {sigma: {lower: 0, upper: 0.1}}}}", "unknown field 'sigma'; allowed are X0"),
        ("experiments: {a: {commit_message_template: '{epoch}'}}", "unknown variable {epoch}"),
        ("experiments: {'a b': }", "name: String should match pattern"),
        ("experiments: {}", "no experiments: give experiments, grid, random or search"),
        ("recipe: huge\nexperiments: {a: }", "recipe 'huge' is unknown; there are default, tiny, gpu"),
        ("experiments: [a", "not YAML"),
        ("experiments: {a: , a: {training: {batch_size: 8}}}", "the key 'a' twice"),
        ("experiments: {a: {name: b}}", "unknown key 'name'; allowed are simulation"),
        ("experiments: " + "[" * 5000, "not YAML"),
        ("just text", "expected a mapping with the keys ledger"),
    ],
)
def test_a_bad_sweep_file_is_refused_with_the_key_and_what_is_allowed(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_sweep_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no sweep file"):
        read_sweep(tmp_path / "nothing.yaml")
