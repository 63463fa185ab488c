"""Which experiments a sweep consists of: named ones, a grid, random draws, or a search that learns from the results.

Every one of them is the same whenever the file is read: names and settings of a grid or of random draws depend on the
file alone, and a search takes what it tried before from the ledger.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from smc.errors import ConfigError
from smc.numeric_fields import RealNumber, WholeNumber
from smc.prediction.evaluation import QUANTITIES

if TYPE_CHECKING:
    import optuna

    from smc.storage import ModelVersion

__all__ = [
    "Choices",
    "PastTrial",
    "Random",
    "Range",
    "Search",
    "Trial",
    "Trials",
    "draws",
    "grid",
    "nested",
    "require_optuna",
    "search_prefix",
    "trial_name",
]

# Whole numbers that NumPy draws.
_MOST: Final = 2**63


class Choices(BaseModel):
    """A parameter that is one of these values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: list[JsonValue] = Field(min_length=1)

    def draw(self, generator: np.random.Generator) -> JsonValue:
        """One of them, each as likely."""
        return self.choices[int(generator.integers(len(self.choices)))]


class Range(BaseModel):
    """A parameter between two bounds: whole if both are, spread over orders of magnitude if `log`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: WholeNumber | RealNumber
    high: WholeNumber | RealNumber
    log: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if any(isinstance(bound, int) and abs(bound) >= _MOST for bound in (self.low, self.high)):
            raise ValueError(f"whole bounds must be below {_MOST:.2g}")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"low, high and their difference must be finite, got {self.low:g} and {self.high:g}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 for log, got {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, generator: np.random.Generator) -> JsonValue:
        """A value, each (each order of magnitude) as likely."""
        if self.whole and not self.log:
            return int(generator.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(generator.uniform(low, high))
        value = math.exp(value) if self.log else value
        # Four digits are enough, and names stay short.
        value = round(value) if self.whole else float(f"{value:.4g}")
        return min(max(value, self.low), self.high)


def _kind(value: Any) -> str:
    return "choices" if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value) else "range"


# Told apart by their keys, so that an error is about the right one.
Space = Annotated[Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")], Discriminator(_kind)]


class Random(BaseModel):
    """So many experiments with parameters drawn at random, by dotted names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: WholeNumber = Field(ge=1)
    seed: WholeNumber = Field(default=0, ge=0)
    parameters: dict[str, Space] = Field(min_length=1)


class Search(BaseModel):
    """So many trials whose parameters Optuna chooses from what the ones before came to (extra `search`).

    `objective`: a quantity of `smc.prediction.evaluation`, whose RMSE against the closed form is made small, or `loss`.
    Trials whose loss is worse than the median of others as far in training are given up, unless `prune` is false.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: WholeNumber = Field(ge=1)
    seed: WholeNumber = Field(default=0, ge=0)
    objective: str = "price"
    prune: bool = True
    parameters: dict[str, Space] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_an_objective(self) -> Search:
        if self.objective not in ("loss", *QUANTITIES):
            raise ValueError(f"objective {self.objective!r} is unknown; there are loss, {'; '.join(QUANTITIES)}")
        return self


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination, the last parameter changing fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def draws(random: Random) -> Iterator[dict[str, Any]]:
    """The draws: number i is the same for every count."""
    drawn = []
    for i in range(random.count):
        generator = np.random.default_rng([random.seed, i])
        draw = {name: space.draw(generator) for name, space in random.parameters.items()}
        if draw not in drawn:  # of choices, some come twice: that is one experiment
            drawn.append(draw)
            yield draw


def trial_name(prefix: str, parameters: Mapping[str, Any]) -> str:
    """A name that tells parameters, by the last part of their own names."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return "x".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    told = "_".join(f"{name.rsplit('.', 1)[-1]}={text(value)}" for name, value in parameters.items())
    return _as_name(f"{prefix}/{told}")


def search_prefix(path: Path) -> str:
    """What the names of a search's trials begin with: its file's."""
    return _as_name(path.stem)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._/=-]", "-", text)


def nested(parameters: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted names as nested settings. Raises: ConfigError if one is a part of another."""
    settings: dict[str, Any] = {}
    for path, value in parameters.items():
        *above, last = path.split(".")
        level = settings
        for key in above:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise ConfigError(f"{where}{path}: {key} is given a value as a whole as well")
        level[last] = value
    return settings


def require_optuna() -> None:
    """Raises: ConfigError if Optuna is not installed, before anything is trained in vain."""
    if find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna: pip install 'spectralmc[search]'")


def _could_be_chosen(parameters: Mapping[str, Any], spaces: Mapping[str, Any]) -> bool:
    """Whether a search of these spaces could have chosen them: its file may have changed since."""
    import optuna

    if set(parameters) != set(spaces):
        return False
    params = {key: _as_optuna(value) for key, value in parameters.items()}
    try:
        optuna.trial.create_trial(params=params, distributions=dict(spaces), value=0.0)
    except ValueError:
        return False
    return True


class Trial:
    """One trial of a search: its name, its parameters, and whether it should go on."""

    def __init__(self, name: str, parameters: Mapping[str, Any], trial: optuna.Trial, prune: bool) -> None:
        self.name, self.parameters, self.optuna, self._prune = name, parameters, trial, prune
        self._reported = 0

    def should_stop(self, step: int, end: int, loss: float) -> bool:
        """Whether to give it up, given its loss at a step: asked at every tenth of its training."""
        tenth = _tenth(step, end)
        if not self._prune or tenth <= self._reported or not math.isfinite(loss):
            return False
        self._reported = tenth
        self.optuna.report(loss, tenth)
        return bool(self.optuna.should_prune())


@dataclass(frozen=True)
class PastTrial:
    """What the ledger has of a trial: its versions, its last step if it is finished, and what it came to then."""

    versions: Sequence[ModelVersion]
    end: int
    value: float | None


class Trials:
    """Asks Optuna for trials and tells it how they ended. All state is the ledger's: `past` are its trials, by name."""

    def __init__(self, prefix: str, search: Search, past: Mapping[str, PastTrial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search, self._prefix = search, prefix
        self._spaces = {name: _distribution(space) for name, space in search.parameters.items()}
        # Its first choices are random: not those that it made before.
        seed = int(np.random.SeedSequence([search.seed, len(past)]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        self._study = optuna.create_study(sampler=sampler, pruner=pruner)
        self._unfinished: list[tuple[str, Mapping[str, Any]]] = []
        self._taken, known = set(), 0
        for name, trial in sorted(past.items()):
            newest = trial.versions[-1]
            number = name.removeprefix(f"{prefix}/")
            if not number.isdecimal():
                continue
            self._taken.add(int(number))
            if not _could_be_chosen(newest.parameters, self._spaces):
                continue
            known += 1
            if trial.value is None and not newest.pruned:
                self._unfinished.append((name, newest.parameters))
                continue
            finished = trial.value is not None
            self._study.add_trial(
                optuna.trial.create_trial(
                    params={key: _as_optuna(value) for key, value in newest.parameters.items()},
                    distributions=self._spaces,
                    value=trial.value,
                    state=optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.PRUNED,
                    intermediate_values={_tenth(v.step, trial.end): v.loss for v in trial.versions if v.loss},
                )
            )
        self._left = search.trials - known

    def ask(self) -> Trial | None:
        """The next trial: an interrupted one first; None when there are to be no more."""
        if self._unfinished:
            name, parameters = self._unfinished.pop(0)
            self._study.enqueue_trial({key: _as_optuna(value) for key, value in parameters.items()})
            return Trial(name, parameters, self._study.ask(self._spaces), self._search.prune)
        if self._left <= 0:
            return None
        self._left -= 1
        number = next(i for i in itertools.count() if i not in self._taken)
        self._taken.add(number)
        trial = self._study.ask(self._spaces)
        parameters = {name: _from_optuna(value) for name, value in trial.params.items()}
        return Trial(f"{self._prefix}/{number:03d}", parameters, trial, self._search.prune)

    def tell(self, trial: Trial, value: float | None, *, pruned: bool = False) -> None:
        """How a trial ended: with a value, given up, or (neither) without a result."""
        from optuna.trial import TrialState

        if pruned:
            self._study.tell(trial.optuna, state=TrialState.PRUNED)
        elif value is None or not math.isfinite(value):
            self._study.tell(trial.optuna, state=TrialState.FAIL)
        else:
            self._study.tell(trial.optuna, value)

    @property
    def best(self) -> tuple[Mapping[str, Any], float] | None:
        """Parameters and value of the best finished trial."""
        try:
            best = self._study.best_trial
        except ValueError:  # none is finished
            return None
        assert best.value is not None
        return {name: _from_optuna(value) for name, value in best.params.items()}, best.value


def _tenth(step: int, end: int) -> int:
    return 10 * step // max(1, end)


def _distribution(space: Choices | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(space, Choices):
        return CategoricalDistribution([_as_optuna(value) for value in space.choices])
    if space.whole:
        return IntDistribution(int(space.low), int(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)


def _as_optuna(value: Any) -> Any:
    """A list as text: Optuna's choices are plain values."""
    return "json:" + orjson.dumps(value).decode() if isinstance(value, list | dict) else value


def _from_optuna(value: Any) -> Any:
    return orjson.loads(value[5:]) if isinstance(value, str) and value.startswith("json:") else value
