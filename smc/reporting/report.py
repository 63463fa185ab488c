"""A page about a ledger: experiments, learning curves, versions in time, sizes, verification, and what was learnt."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from smc.errors import ConfigError, Corrupt, NotFound, NumericsError
from smc.prediction.evaluation import Measure, Predicts, distance, evaluate
from smc.problem.sobol_sampler import SobolSampler
from smc.reporting.history import runs_of
from smc.reporting.page import facts, figure, page, png, table
from smc.reporting.pictures import draw_learning, draw_quantiles, draw_runs, plain
from smc.serving.client import load_predictor
from smc.storage.catalog import Catalog
from smc.storage.chain import ModelVersion
from smc.storage.store import AsyncBlockchainModelStore
from smc.storage.verify import Verification

__all__ = ["Measured", "Report", "measured", "report_page"]

_SEED = 20_261_125
# Aliases whose versions are compared with the closed form, at most.
_MOST_MEASURED = 6


@dataclass(frozen=True)
class Measured:
    """A version against the best reference of its problem on a sample of its domain. Shapes: contracts (n, fields)."""

    version: ModelVersion
    predictor: Predicts
    contracts: np.ndarray[Any, np.dtype[np.float64]]
    measures: Mapping[str, Measure]

    def chosen(self) -> tuple[Sequence[str], np.ndarray[Any, np.dtype[np.float64]]]:
        """Four contracts by the rank of their distribution's error, and what they are called."""
        ranks = distance(self.measures).ranks
        return tuple(ranks), self.contracts[list(ranks.values())]


async def measured(
    store: AsyncBlockchainModelStore, version: ModelVersion, contracts: int, seed: int = _SEED
) -> Measured:
    """Load a version and compare it. Raises: Corrupt, NotFound if collected, ConfigError for want of a template."""
    predictor = await load_predictor(store, version)
    sample = SobolSampler(predictor.domain, seed=seed, schema=predictor.problem.schema).sample(contracts)
    return Measured(version, predictor, sample, evaluate(predictor, sample))


@dataclass(frozen=True)
class Report:
    """The page, and what it says in short."""

    html: str
    versions: int
    experiments: int
    ok: bool


async def report_page(
    store: AsyncBlockchainModelStore, *, contracts: int = 2048, blobs: bool = False, at: datetime | None = None
) -> Report:
    """Verify the ledger and draw the page. A ledger that is corrupt is reported as such.

    `at`: draw what the ledger said then, as `catalog_at` has it; it is verified as it is now.
    Raises: ConfigError, NotFound if there was no entry at that time.
    """
    if contracts < 8:
        raise ConfigError(f"contracts must be at least 8, got {contracts}")
    verification = await store.verify(blobs=blobs)
    title = f"Ledger {store.uri}"
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    about = {"ledger": store.uri, "written": written}
    if at is not None:
        about["as of"] = f"{at:%Y-%m-%d %H:%M:%S} UTC"
    parts = [_verification(verification, blobs), facts(about)]
    experiments = 0
    if verification.log_is_whole:
        catalog = await (store.catalog() if at is None else store.catalog_at(at))
        experiments = len(catalog.heads)
        if catalog.head is not None:
            stored = {info.key: info.size async for info in store.objects.list("blobs/")}
            parts += [*_history(catalog, stored), *await _learnt(store, catalog, contracts)]
        else:
            parts.append("<p>It has no versions.</p>")
    return Report(page(title, *parts), verification.versions, experiments, verification.ok)


def _verification(report: Verification, blobs: bool) -> str:
    how = "the bytes of every checkpoint" if blobs else "the size of every checkpoint, not its bytes"
    checked = f"{report.entries} entries in {report.blocks} blocks, {report.blobs} checkpoints ({how})"
    if report.ok:
        return f'<p class="good">Verified: {html.escape(checked)}; nothing is wrong.</p>'
    lines = "".join(f"<li>{html.escape(f'{key}: {reason}')}</li>" for key, reason in report.problems[:100])
    return f'<p class="bad">CORRUPT: {len(report.problems)} problems in {html.escape(checked)}.</p><ul>{lines}</ul>'


def _history(catalog: Catalog, stored: Mapping[str, int]) -> list[str]:
    tags = [
        (alias, v.version_id, v.experiment, str(v.step), v.content_hash[:16], _moved(catalog, alias))
        for alias, v in catalog.aliases.items()
    ]
    tag_columns = {"alias": "text", "version": "text", "experiment": "text", "step": "", "content": "text", "": "text"}
    collected = sum(catalog.collected_at(v.content_hash) is not None for v in catalog.versions)
    timeline, lineage = _lineage_pictures(catalog)
    return [
        "<h2>Experiments</h2>",
        table(_COLUMNS, [_experiment_row(catalog, name) for name in sorted(catalog.heads)]),
        "<h2>Aliases</h2>",
        table(tag_columns, tags) if tags else "<p>None.</p>",
        "<h2>Learning</h2>",
        figure(
            "learning", "Loss of each version, by its step and by its place in the ledger.", _learning_picture(catalog)
        ),
        "<h2>Versions in time</h2>",
        figure("timeline", "Every version when it was committed, and where the aliases point.", timeline),
        figure("lineage", "What was resumed from what; the newest 60 runs at most.", lineage),
        "<h2>Sizes</h2>",
        figure(
            "sizes",
            f"{len(stored)} checkpoints, {sum(stored.values()) / 1e6:.1f} MB stored; {collected} versions' collected.",
            _sizes_picture(catalog, stored),
        ),
    ]


_COLUMNS = {
    "experiment": "text", "versions": "", "runs": "", "newest": "text", "step": "", "loss": "", "least loss": "",
    "time (UTC)": "text", "checkpoints kept": "",
}  # fmt: skip


def _experiment_row(catalog: Catalog, name: str) -> tuple[str, ...]:
    head, own = catalog.heads[name], [v for v in catalog.versions if v.experiment == name]
    kept, losses = _kept(catalog, name), [v.loss for v in own if v.loss is not None]
    return (
        name or "(no experiment)",
        str(len(own)),
        str(sum(run.experiment == name for run in runs_of(catalog.versions))),
        head.version_id,
        str(head.step),
        f"{losses[-1]:.3e}" if losses else "",
        f"{min(losses):.3e}" if losses else "",
        f"{head.timestamp:%Y-%m-%d %H:%M}",
        f"{len(kept)}, {sum(kept.values()) / 1e6:.1f} MB",
    )


def _kept(catalog: Catalog, name: str) -> dict[str, int]:
    """Sizes of an experiment's checkpoints that were not collected, by hash."""
    own = (v for v in catalog.versions if v.experiment == name)
    return {v.content_hash: v.size for v in own if catalog.collected_at(v.content_hash) is None}


def _learning_picture(catalog: Catalog) -> bytes:
    curves = Figure(figsize=(12.5, 4.5), layout="constrained")
    left, right = curves.subplots(1, 2)
    for name in sorted(catalog.heads):
        known = [(v.step, v.counter, v.loss) for v in catalog.versions if v.experiment == name and v.loss]
        steps, counters, losses = [list(column) for column in zip(*known, strict=True)] if known else ([], [], [])
        draw_learning(left, steps, losses, "loss of the step", name=name or "(no experiment)")
        draw_learning(right, counters, losses, "loss of the step", name=name or "(no experiment)")
    right.set_xlabel("version")
    if catalog.heads:
        left.legend(frameon=False, fontsize=8)
    return png(curves)


def _lineage_pictures(catalog: Catalog) -> tuple[bytes, bytes]:
    """The runs by time and by version."""
    runs = runs_of(catalog.versions)
    height = 1.6 + 0.45 * len(catalog.heads)
    timeline = Figure(figsize=(12.5, height), layout="constrained")
    draw_runs(timeline.subplots(), runs, catalog.aliases, by="time")
    lineage = Figure(figsize=(12.5, 1.6 + 0.3 * min(len(runs), 60)), layout="constrained")
    draw_runs(lineage.subplots(), runs[-60:], catalog.aliases, by="version")
    return png(timeline), png(lineage)


def _sizes_picture(catalog: Catalog, stored: Mapping[str, int]) -> bytes:
    kept_by = {name: sum(_kept(catalog, name).values()) for name in sorted(catalog.heads)}
    versions = catalog.versions
    sizes = Figure(figsize=(12.5, 3.2), layout="constrained")
    left, right = sizes.subplots(1, 2)
    left.step(range(len(versions)), np.cumsum([v.size for v in versions]) / 1e6, where="post", label="as committed")
    left.axhline(sum(stored.values()) / 1e6, color="black", ls=":", label="stored now")
    left.set(xlabel="version", ylabel="checkpoints, MB", ylim=(0, None))
    left.legend(frameon=False)
    right.barh([plain(name or "(no experiment)") for name in kept_by], [size / 1e6 for size in kept_by.values()])
    right.set(xlabel="checkpoints kept, MB")
    return png(sizes)


def _moved(catalog: Catalog, alias: str) -> str:
    moves = [move for move in catalog.moves if move.alias == alias]
    last = moves[-1]
    times = "" if len(moves) == 1 else f", move {len(moves)}"
    return f"since {last.timestamp:%Y-%m-%d %H:%M}{times}" + (f": {last.message}" if last.message else "")


async def _learnt(store: AsyncBlockchainModelStore, catalog: Catalog, contracts: int) -> list[str]:
    """What the tagged versions learnt; the newest one, where none is tagged."""
    assert catalog.head is not None
    aliases: dict[int, list[str]] = {}
    for alias, version in catalog.aliases.items():
        aliases.setdefault(version.counter, []).append(alias)
    names = {counter: ", ".join(of) for counter, of in aliases.items()} or {catalog.head.counter: "the newest version"}
    parts: list[str] = ["<h2>Learnt and exact</h2>"]
    rows: list[dict[str, str]] = []
    columns = {"": "text", "version": "text", "problem": "text"}
    for counter, name in list(names.items())[:_MOST_MEASURED]:
        version = catalog.versions[counter]
        try:
            found = await measured(store, version, contracts)
        except (NotFound, ConfigError, Corrupt, NumericsError) as error:
            parts.append(f"<p>{html.escape(f'{name}: {error}')}</p>")
            continue
        problem = found.predictor.problem
        errors = {f"{m.name}, {m.unit}".removesuffix(", "): f"{m.rmse:.4g}" for m in found.measures.values()}
        compared = "; ".join(dict.fromkeys(m.compared for m in found.measures.values()))
        rows.append({"": name, "version": version.version_id, "problem": problem.name, **errors, "against": compared})
        columns |= dict.fromkeys(errors, "")
        drawn = Figure(figsize=(12.5, 7.5), layout="constrained")
        ranks, chosen = found.chosen()
        levels = found.predictor.predict_distribution(chosen).host_levels
        for axes, rank, contract, row in zip(drawn.subplots(2, 2).flat, ranks, chosen, levels, strict=True):
            draw_quantiles(axes, contract, row, problem)
            axes.set_title(f"{rank} W2 error\n{axes.get_title()}", fontsize=9)
        caption = (
            f"{name}, {version.version_id}: payoff distributions of {problem.title}, by the rank of their W2 error."
        )
        parts.append(figure(f"distribution of {version.version_id}", caption, png(drawn)))
    if rows:
        columns["against"] = "text small"
        note = (
            f"<p>RMSE over {contracts:,} contracts of each version's domain, or the first of them where that is dear: "
            "learnt against the problem's closed form, or what stands behind its errors.</p>"
        )
        parts[1:1] = [note, table(columns, [[row.get(name, "") for name in columns] for row in rows])]
    return parts
