"""Experiments that are known to work, and the reading of experiment files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from jobs.search import Random, Search, draws, grid, nested, search_prefix, trial_name
from smc.errors import ConfigError
from smc.learning.experiment import Experiment
from smc.numeric_fields import WholeNumber
from smc.problem.conditional import is_conditional
from smc.problem.contracts import resolve_domain
from smc.problem.problem import Problem, process_of, product_of
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.simulation.config import CONFIG_TAGS, ProblemConfig

__all__ = ["RECIPES", "Sweep", "make_experiment", "make_trial", "overlaid", "read_sweep", "read_yaml"]

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    # A minute or two on two CPU cores: 0.1 bp of spot, see README.
    "default": {
        "simulation": {
            "sim_params": {
                "timesteps": 16,
                "network_size": 256,
                "batches_per_mc_run": 16,
                "mc_seed": 42,
                "buffer_size": 32_768,
            },
        },
        "training": {
            "num_batches": 6_000,
            "batch_size": 128,
            "learning_rate": 0.01,
            "fresh_per_batch": 8,
            "differential": 0.3,
            "held_back": 256,
        },
        "commit_interval": 1_000,
    },
    # Seconds: for trying things out, and for tests.
    "tiny": {
        "simulation": {
            "sim_params": {
                "timesteps": 4,
                "network_size": 32,
                "batches_per_mc_run": 8,
                "mc_seed": 42,
                "buffer_size": 256,
            }
        },
        "network": {"hidden": [16, 16]},
        "training": {"num_batches": 60, "batch_size": 16, "learning_rate": 0.01},
        "commit_interval": 20,
    },
    # A minute of an H100, by pseudo-random paths alone.
    "gpu": {
        "simulation": {
            "sim_params": {"timesteps": 16, "network_size": 256, "batches_per_mc_run": 512, "mc_seed": 42},
            "normalize_forwards": True,
        },
        "network": {"hidden": [128, 128, 128]},
        "training": {
            "num_batches": 14_000,
            "batch_size": 256,
            "learning_rate": 0.006,
            "differential": 0.3,
            "held_back": 256,
        },
        "commit_interval": 1_000,
        "num_gpus": 1,
    },
}


class Sweep(BaseModel):
    """A file of experiments: a recipe, defaults laid over it, and each experiment's own settings over both.

    Experiments are listed by name, or made by `grid` (every combination), `random` (draws) or `search` (Optuna), which
    name parameters with dots; any of these together. `concurrency`: how many run at a time, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ledger: str | None = None
    recipe: str = "default"
    defaults: dict[str, Any] = Field(default_factory=dict)
    experiments: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    random: Random | None = None
    search: Search | None = None
    concurrency: WholeNumber | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_some(self) -> Sweep:
        if not (self.experiments or self.grid or self.random or self.search):
            raise ValueError("no experiments: give experiments, grid, random or search")
        if empty := [name for name, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self


def make_experiment(
    name: str,
    *layers: Mapping[str, Any],
    recipe: str = "default",
    where: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> Experiment:
    """An experiment from a recipe and settings laid over it, the last one winning, key by key.

    `parameters` are what a sweep chose. Raises: ConfigError naming the key that is unknown or wrong, and what is
    allowed.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"{where}recipe {recipe!r} is unknown; there are {', '.join(RECIPES)}")
    settings: dict[str, Any] = dict(RECIPES[recipe])
    if any({"process", "product"} & set(layer.get("simulation") or {}) for layer in layers):
        # What a recipe says of geometric Brownian motion is not meant for another problem.
        known = settings["simulation"].items()
        settings["simulation"] = {key: value for key, value in known if key in ProblemConfig.model_fields}
    for layer in layers:
        settings = overlaid(settings, layer)
    settings = _fitted(settings, layers)
    if given := _GIVEN & settings.keys():
        allowed = ", ".join(_fields_at(Experiment, ()))
        raise ConfigError(f"{where}experiment {name!r}: unknown key {min(given)!r}; allowed are {allowed}")
    try:
        return Experiment.model_validate({**settings, "name": name, "parameters": dict(parameters or {})})
    except ValidationError as error:
        raise ConfigError(f"{where}experiment {name!r}: {_explained(error, Experiment)}") from None


def _fitted(settings: dict[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings with what a recipe says of geometric Brownian motion fitted to the process, unless some layer says it.

    Time steps are as many as the process needs over the domain; a recipe's own number stays where steps have no bias.
    Where paths or payoffs may jump as a contract moves, derivatives are no labels.
    Settings that are wrong are left as they are: what reads them says what is wrong.
    """
    simulation = settings.get("simulation") or {}
    try:
        process, product = (simulation.get(part) for part in ("process", "product"))
        problem = Problem(
            GeometricBrownianMotion() if process is None else process_of(process), product_of(product or {})
        )
        steps = problem.default_steps(resolve_domain(settings.get("domain") or {}, problem.schema))
        if problem.process.exact:
            known = simulation["sim_params"]["timesteps"]
            dates = 1 if problem.product.continuous else max(1, problem.product.dates)
            steps = dates * -(-known // dates)
        if not any("timesteps" in ((layer.get("simulation") or {}).get("sim_params") or {}) for layer in layers):
            settings = overlaid(settings, {"simulation": {"sim_params": {"timesteps": steps}}})
        smooth = problem.process.lipschitz and (
            problem.product.lipschitz or (is_conditional(problem) and simulation.get("conditional", True))
        )
        if not smooth and not any("differential" in (layer.get("training") or {}) for layer in layers):
            settings = overlaid(settings, {"training": {"differential": 0.0}})
    except (ConfigError, TypeError, AttributeError, KeyError, ValueError):
        return settings
    return settings


def read_sweep(path: Path) -> tuple[Sweep, list[Experiment]]:
    """The sweep in a YAML file, and its experiments.

    Raises: ConfigError with the file, the key and what is allowed.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no sweep file {path}") from None
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(Sweep.model_fields)}")
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explained(error, Sweep)}") from None
    made = [
        make_experiment(name, sweep.defaults, settings or {}, recipe=sweep.recipe, where=f"{path}: ")
        for name, settings in sweep.experiments.items()
    ]
    chosen = [*(grid(sweep.grid) if sweep.grid else ()), *(draws(sweep.random) if sweep.random else ())]
    made += [make_trial(sweep, trial_name(path.stem, parameters), parameters, path) for parameters in chosen]
    if sweep.search is not None:  # a parameter that no experiment has is refused now, not after the first trials
        first = draws(Random(count=1, seed=sweep.search.seed, parameters=sweep.search.parameters))
        make_trial(sweep, f"{search_prefix(path)}/000", next(first), path)
    twice = [name for name, count in Counter(experiment.name for experiment in made).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: two experiments are called {twice[0]!r}")
    return sweep, made


def make_trial(sweep: Sweep, name: str, parameters: Mapping[str, Any], path: Path) -> Experiment:
    """An experiment of a sweep whose parameters were chosen. Raises: ConfigError."""
    where = f"{path}: "
    settings = sweep.defaults, nested(parameters, where)
    return make_experiment(name, *settings, recipe=sweep.recipe, where=where, parameters=parameters)


def read_yaml(text: str) -> Any:
    """The content of a text in YAML 1.2, in which `yes` is a word and 0123 the number 123.

    Raises: YAMLError; a key that stands twice is an error.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        key = re.match(r'found duplicate key "(.*?)" with', error.problem or "")
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YAMLError(f"the key {key[1] if key else ''!r} twice, in line {line}") from None


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others, key by key."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = overlaid(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explained(error: ValidationError, model: type[BaseModel]) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if part not in CONFIG_TAGS)
    if problem["type"] == "extra_forbidden":
        allowed = _fields_at(model, problem["loc"][:-1])
        return f"unknown key {path!r}" + (f"; allowed are {', '.join(allowed)}" if allowed else "")
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], dict | list) else f", got {problem['input']!r}"
    return f"{path}: {message}{got}" if path else message


# What an experiment has that no settings give.
_GIVEN: Final = frozenset({"name", "parameters"})


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if part in CONFIG_TAGS:
            model = CONFIG_TAGS[str(part)]
            continue
        if str(part) == "simulation":  # which of the two, the next part says
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [name for name in model.model_fields if model is not Experiment or name not in _GIVEN]
