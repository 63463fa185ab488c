"""What a ledger's versions have to do with each other: which came from which, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from smc.checkpoint.tensor_header import Place, TensorHeader
from smc.storage.chain import ModelVersion
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["Difference", "Run", "TensorDifference", "difference", "lineage_lines", "runs_of", "settings_of"]

_NUMPY: Final[Mapping[str, str]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1", "C64": "<c8",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Versions of one experiment from one start, in order; `origin` is the version it was resumed from."""

    experiment: str
    versions: Sequence[ModelVersion]
    origin: ModelVersion | None

    @property
    def name(self) -> str:
        """The experiment's, for people."""
        return self.experiment or "(no experiment)"

    @property
    def line(self) -> str:
        """All but the name, on one line for people."""
        first, last = self.versions[0], self.versions[-1]
        count = f"{len(self.versions)} version{'s' * (len(self.versions) > 1)}"
        loss = "" if last.loss is None else f", loss {last.loss:.3e}"
        origin = f", resumed from {self.origin.version_id}" if self.origin else ""
        span = first.version_id if first is last else f"{first.version_id} to {last.version_id}"
        steps = f"step {last.step}" if first is last else f"steps {first.step} to {last.step}"
        return f"{span}, {count}, {steps}{loss}{origin}"


def runs_of(versions: Sequence[ModelVersion]) -> list[Run]:
    """A ledger's runs, by their first version.

    A run ends where its experiment's next version was resumed from elsewhere, or has no later step.
    """
    by_name = {version.version_id: version for version in versions}
    open_runs: dict[str, list[ModelVersion]] = {}
    runs: list[list[ModelVersion]] = []
    for version in versions:
        run = open_runs.get(version.experiment)
        if run is None or run[-1].resumed_from != version.resumed_from or run[-1].step >= version.step:
            run = open_runs[version.experiment] = []
            runs.append(run)
        run.append(version)

    def origin_of(first: ModelVersion) -> ModelVersion | None:
        origin = by_name.get(first.resumed_from or "")
        return origin if origin is not None and origin.counter < first.counter else None  # else of another ledger

    return [Run(run[0].experiment, run, origin_of(run[0])) for run in runs]


def lineage_lines(runs: Sequence[Run]) -> Iterator[str]:
    """What was resumed from what, as a tree."""
    run_of = {version.counter: run for run in runs for version in run.versions}
    children: dict[int, list[Run]] = {}
    roots = []
    for run in runs:
        if run.origin is None:
            roots.append(run)
        else:
            children.setdefault(id(run_of[run.origin.counter]), []).append(run)
    # Without recursion: an experiment resumed a thousand times is a thousand deep.
    waiting = [(run, "", "", "") for run in reversed(roots)]
    width = max((len(run.name) for run in runs), default=0)
    while waiting:
        run, before, corner, beside = waiting.pop()
        yield f"{before + corner}{run.name:<{width}}  {run.line}"
        below = children.get(id(run), [])
        for i, child in reversed(list(enumerate(below))):
            last = i == len(below) - 1
            waiting.append((child, before + beside, "└─ " if last else "├─ ", "   " if last else "│  "))


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of the model in two versions: its norms, and the norm of the difference; None where there is none."""

    name: str
    norms: tuple[float | None, float | None]
    distance: float | None

    @property
    def relative(self) -> float | None:
        """The difference as a share of the first norm."""
        return self.distance / self.norms[0] if self.distance is not None and self.norms[0] else None


@dataclass(frozen=True)
class Difference:
    """What differs between two versions; `fields` and `settings` hold only what is not equal, by name."""

    versions: tuple[ModelVersion, ModelVersion]
    fields: Mapping[str, tuple[Any, Any]]
    settings: Mapping[str, tuple[Any, Any]]
    tensors: Sequence[TensorDifference]


async def difference(
    store: AsyncBlockchainModelStore, a: ModelVersion, b: ModelVersion, *, whole: bool = False
) -> Difference:
    """Entries, settings and parameters of two versions, compared.

    `whole` as for `load_model`. Raises: Corrupt, NotFound if one was collected.
    """
    header_a, parts_a = await store.load_model(a, whole=whole)
    header_b, parts_b = await store.load_model(b, whole=whole)
    said_a, said_b = (_flat(v.model_dump(mode="json", include=_SAID)) for v in (a, b))
    names = [*parts_a, *(name for name in parts_b if name not in parts_a)]
    tensors = [
        _compared(
            name.removeprefix("model."),
            _array(header_a.places.get(name), parts_a.get(name)),
            _array(header_b.places.get(name), parts_b.get(name)),
        )
        for name in names
        if name.startswith("model.")
    ]
    settings = _unequal(settings_of(header_a), settings_of(header_b))
    return Difference((a, b), _unequal(said_a, said_b), settings, tensors)


_SAID = {
    "experiment", "step", "loss", "metrics", "parameters", "plan_end", "pruned", "commit_message", "resumed_from",
    "size", "content_hash",
}  # fmt: skip


def settings_of(header: TensorHeader) -> dict[str, Any]:
    """A checkpoint's settings with dotted names, as its file says them."""
    try:
        return _flat({key: orjson.loads(text) for key, text in header.metadata.items()}.get("spectralmc", {}))
    except orjson.JSONDecodeError:  # a file that somebody else made
        return dict(header.metadata)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    return {path: value} if path else {}


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _array(place: Place | None, data: memoryview | None) -> npt.NDArray[Any] | None:
    if place is None or data is None:
        return None
    if place.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if place.dtype not in _NUMPY:
        return None
    values = np.frombuffer(data, dtype=_NUMPY[place.dtype])
    return values.astype(np.complex128 if place.dtype == "C64" else np.float64)


def _compared(name: str, a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> TensorDifference:
    norms = tuple(None if values is None else float(np.linalg.norm(values)) for values in (a, b))
    same_shape = a is not None and b is not None and a.shape == b.shape
    distance = float(np.linalg.norm(a - b)) if same_shape and a is not None and b is not None else None
    return TensorDifference(name, (norms[0], norms[1]), distance)
