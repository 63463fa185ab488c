"""The commands that look at an open ledger or copy from it: one coroutine a command; -> the exit status."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from smc.errors import ConfigError, NotFound
from smc.reporting.command_line import check_file, replace_file, say
from smc.reporting.history import difference, lineage_lines, runs_of
from smc.storage.catalog import Catalog
from smc.storage.chain import ModelVersion, blob_key, version_id
from smc.storage.memory import Seen, read_memory, write_memory
from smc.storage.store import AsyncBlockchainModelStore
from smc.storage.verify import Verification

Store = AsyncBlockchainModelStore
Options = argparse.Namespace


# --- looking -----------------------------------------------------------------------------------------


async def verify(store: Store, options: Options) -> int:
    """Recompute every hash of the ledger."""
    seen = read_memory(options.memory, store.uri)
    if seen is not None and options.since is not None:
        raise ConfigError(f"{options.memory} remembers an entry already: leave out --since")
    since = (seen.index, seen.hash) if seen is not None else options.since
    report = await store.verify(blobs=options.blobs, full=options.full, since=since)
    if not report.found and since is None:
        await store.require()
    if report.ok and options.memory is not None and report.last is not None:
        index, digest = report.last
        write_memory(options.memory, Seen(store.uri, report.blocks - 1, digest, index))
    if options.json:
        print_json({**vars(report), "ok": report.ok})
    else:
        for key, reason in report.problems:
            say(f"{key}: {reason}")
        checked = "bytes checked" if options.blobs else "sizes checked"
        say(
            f"{'ok' if report.ok else 'CORRUPT'}: {report.versions} versions, {report.entries} entries in "
            f"{report.blocks} blocks, {report.blobs} checkpoints ({checked}), {report.collected} collected, "
            f"{len(report.problems)} problems"
        )
        if report.ok and report.last is not None:
            say(f"newest entry {report.last[0]}:{report.last[1]}")
    return 0 if report.ok else 1


async def find_corruption(store: Store, options: Options) -> int:
    """Read every byte; say what is damaged, which versions that concerns, and what is still whole."""
    report = await store.verify(blobs=True, full=True)
    if not report.found:
        await store.require()
    if report.ok:
        if options.json:
            print_json({"ok": True, "problems": [], "affected": [], "sound": []})
        else:
            say(f"nothing is corrupt: {report.entries} entries and {report.blobs} checkpoints were read")
        return 0
    affected, sound = await _affected(store, report) if report.log_is_whole else ([], [])
    if options.json:
        problems = [{"object": key, "reason": reason} for key, reason in report.problems]
        names = {"affected": affected, "sound": sound}
        print_json({"ok": False, "problems": problems, **{k: [as_json(v) for v in vs] for k, vs in names.items()}})
        return 1
    for key, reason in report.problems:
        say(f"{key}: {reason}")
    if not report.log_is_whole:
        say("The log itself is damaged: restore the objects named above from a copy of the bucket, then verify again.")
        return 1
    if any(not key.startswith("blobs/") for key, _ in report.problems):
        say("What is derived from the log (head.json, index/) is made again by the next writer.")
    count = "1 version" if len(affected) == 1 else f"{len(affected)} versions"
    more = ", ..." if len(affected) > 12 else ""
    listed = ": " + ", ".join(v.version_id for v in affected[:12]) + more if affected else ""
    say(f"cannot be loaded: {count}{listed}")
    for version in sound:
        name = version.experiment or "(no experiment)"
        say(f"newest whole version of {name}: {version.version_id}, step {version.step}")
    return 1


async def _affected(store: Store, report: Verification) -> tuple[list[ModelVersion], list[ModelVersion]]:
    """Versions whose checkpoint is damaged, and the newest of each experiment whose is not."""
    damaged = {key for key, _ in report.problems}
    catalog = await store.catalog()
    affected = [v for v in catalog.versions if blob_key(v.content_hash) in damaged]
    whole = [v for v in catalog.versions if v not in affected and catalog.collected_at(v.content_hash) is None]
    return affected, list({version.experiment: version for version in whole}.values())


async def _catalog(store: Store, options: Options) -> Catalog:
    """The ledger as it is, or as it was at the time that was asked for."""
    return await (store.catalog() if options.at is None else store.catalog_at(options.at))


async def list_versions(store: Store, options: Options) -> int:
    """The versions that all filters let through, oldest first."""
    catalog = await _catalog(store, options)
    if options.tag is None:
        await store.require()
    if options.tag is not None and options.tag not in catalog.aliases:
        raise NotFound(f"there is no alias {options.tag!r}: there are {', '.join(catalog.aliases) or 'none'}")
    versions = [v for v in catalog.versions if _wanted(v, catalog, options)]
    if options.last is not None:
        versions = versions[max(0, len(versions) - options.last) :]
    if options.json:
        print_json([as_json(v, catalog) for v in versions])
        return 0
    width = max([10, *(len(v.experiment) for v in versions)])
    say(f"{'version':<13}{'time (UTC)':<21}{'experiment':<{width}}{'step':>9}  {'loss':>9}  {'hash':<10}message")
    for v in versions:
        loss = "" if v.loss is None else f"{v.loss:.3e}"
        names = catalog.aliases_of(v)
        marks = [*(["collected"] if catalog.collected_at(v.content_hash) is not None else []), *names]
        say(
            f"{v.version_id:<13}{v.timestamp:%Y-%m-%d %H:%M:%S}  {v.experiment:<{width}}{v.step:>9}  {loss:>9}  "
            f"{v.content_hash[:8]}  {v.commit_message}" + (f"  [{', '.join(marks)}]" if marks else "")
        )
    return 0


def _wanted(version: ModelVersion, catalog: Catalog, options: Options) -> bool:
    return (
        (options.experiment is None or version.experiment == options.experiment)
        and (options.message is None or options.message.lower() in version.commit_message.lower())
        and (options.tag is None or options.tag in catalog.aliases_of(version))
        and (options.since is None or version.timestamp >= options.since)
        and (options.until is None or version.timestamp <= options.until)
    )


async def inspect(store: Store, options: Options) -> int:
    """One version: its entry, its aliases, its settings and its tensors, every byte verified."""
    catalog = await _catalog(store, options)
    if catalog.head is None and options.version in (None, "head"):
        await store.require()
        print_json(None) if options.json else say(f"{store.uri} is empty")
        return 0
    version = catalog.resolve(options.version or "head")
    from smc.checkpoint.file import decode

    snapshot = decode(await store.load_checkpoint(version))
    shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in snapshot.tensors.items()}
    metadata = snapshot.metadata.model_dump(mode="json")
    if options.json:
        print_json({"version": as_json(version, catalog), "checkpoint": metadata, "tensors": shapes})
        return 0
    for name, value in as_json(version, catalog).items():
        text = ", ".join(value) if isinstance(value, list) else value
        say(f"{name:<16}{orjson.dumps(text).decode() if isinstance(text, dict) else text}")
    for name, value in metadata.items():
        say(f"{name:<16}{orjson.dumps(value).decode()}")
    for name, (dtype, *shape) in sorted(shapes.items()):
        say(f"  {name:<52}{dtype:<10}{' x '.join(map(str, shape))}")
    return 0


async def diff(store: Store, options: Options) -> int:
    """What differs between two versions: entry, settings, parameters."""
    catalog = await _catalog(store, options)
    a, b = catalog.resolve(options.a), catalog.resolve(options.b)
    found = await difference(store, a, b, whole=catalog.is_hash(options.a) or catalog.is_hash(options.b))
    if options.json:
        tensors = [{**asdict(t), "relative": t.relative} for t in found.tensors]
        said = {"fields": found.fields, "settings": found.settings, "tensors": tensors}
        print_json({"versions": [as_json(v, catalog) for v in found.versions], **said})
        return 0
    a, b = found.versions
    for heading, values in (("", found.fields), ("settings", found.settings)):
        if heading:
            say()
            say(heading if values else f"{heading}: the same")
        else:
            say(f"{'':<28}{a.version_id:<26}{b.version_id}")
        for name, (one, other) in values.items():
            say(f"{name:<28}{_short(one):<26}{_short(other)}")
    say()
    say(f"{'parameters, norms':<28}{a.version_id:<26}{b.version_id:<26}difference, of the first")
    for t in found.tensors:
        one, other = ("-" if norm is None else f"{norm:.6g}" for norm in t.norms)
        say(f"{t.name:<28}{one:<26}{other:<26}" + ("" if t.relative is None else f"{100 * t.relative:.3g} %"))
    return 0


def _short(value: object) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= 24 else text[:21] + "..."


async def lineage(store: Store, options: Options) -> int:
    """What was resumed from what: a tree, and a picture if one is asked for."""
    if options.out is not None:
        from smc.reporting.pictures import check_picture, save_lineage

        check_picture(options.out)
    catalog = await _catalog(store, options)
    await store.require()
    runs = runs_of(catalog.versions)
    if options.out is not None:
        save_lineage(options.out, runs, catalog.aliases)
    if options.json:
        print_json(
            [
                {
                    "experiment": run.experiment,
                    "resumed_from": run.origin.version_id if run.origin else None,
                    "versions": [v.version_id for v in run.versions],
                    "steps": [v.step for v in run.versions],
                }
                for run in runs
            ]
        )
        return 0
    for line in lineage_lines(runs):
        say(line)
    if options.out is not None:
        say(f"picture: {options.out}")
    return 0


async def alias_history(store: Store, options: Options) -> int:
    """Every move of an alias, or of all of them: when, to which version, and why."""
    catalog = await store.catalog()
    await store.require()
    moves = catalog.moves if options.name is None else catalog.moves_of(options.name)
    names = [None if move.counter is None else version_id(move.counter) for move in moves]
    if options.json:
        print_json(
            [
                {
                    "time": move.timestamp,
                    "alias": move.alias,
                    "version": name,
                    "content_hash": move.content_hash,
                    "entry": move.index,
                    "message": move.message,
                }
                for move, name in zip(moves, names, strict=True)
            ]
        )
        return 0
    width = max([5, *(len(move.alias) for move in moves)])
    say(f"{'time (UTC)':<21}{'alias':<{width}}  {'version':<13}{'hash':<10}{'entry':>7}  message")
    for move, name in zip(moves, names, strict=True):
        say(
            f"{move.timestamp:%Y-%m-%d %H:%M:%S}  {move.alias:<{width}}  {name or 'nothing':<13}"
            f"{(move.content_hash or '')[:8]:<10}{move.index:>7}  {move.message}"
        )
    return 0


# --- moving checkpoints ------------------------------------------------------------------------------


async def export(store: Store, options: Options) -> int:
    """Write one version's checkpoint, verified, as a file that any safetensors reader opens."""
    if not options.file.name or options.file.is_dir():
        raise ConfigError(f"{options.file} is a folder: give a file's name")
    check_file(options.file)
    if options.file.exists() and not options.force:
        raise ConfigError(f"{options.file} exists: give another name, or --force")
    version = (await _catalog(store, options)).resolve(options.version)
    data = await store.load_checkpoint(version)
    replace_file(options.file, data)
    if options.json:
        print_json({"version": as_json(version), "file": str(options.file)})
    else:
        say(f"{options.file}: {version.version_id}, {len(data):,} bytes, SHA-256 {version.content_hash}")
    return 0


# --- showing -----------------------------------------------------------------------------------------


async def tensorboard_log(store: Store, options: Options) -> int:
    """Write the ledger's history for TensorBoard: a run for each experiment."""
    from smc.reporting.ledger_tensorboard import write_history

    runs = await write_history(store, options.log_dir)
    if options.json:
        print_json({"log_dir": str(options.log_dir), "runs": runs})
        return 0
    for name, count in runs.items():
        say(f"{name or '(no experiment)'}: {count} versions")
    say(f"tensorboard --logdir={options.log_dir}")
    return 0


async def report(store: Store, options: Options) -> int:
    """One self-contained page about the ledger."""
    from smc.reporting.report import report_page

    made = await report_page(store, contracts=options.contracts, blobs=options.blobs, at=options.at)
    await store.require()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.out, made.html.encode())
    state = "ok" if made.ok else "CORRUPT"
    if options.json:
        print_json({"file": options.out, "versions": made.versions, "experiments": made.experiments, "ok": made.ok})
    else:
        say(f"{options.out}: {made.versions} versions of {made.experiments} experiments, ledger {state}")
    return 0 if made.ok else 1


# --- as text -----------------------------------------------------------------------------------------


def as_json(version: ModelVersion, catalog: Catalog | None = None) -> dict[str, Any]:
    """A version, with its aliases where the catalog is at hand."""
    fields = {"version": version.version_id, **version.model_dump(mode="json")}
    if catalog is not None:
        fields["aliases"] = catalog.aliases_of(version)
    return fields


def print_json(value: object) -> None:
    """On standard output, for programs."""

    def plain(item: object) -> object:
        if isinstance(item, datetime):
            return item.isoformat()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(type(item).__name__)

    print(orjson.dumps(value, default=plain, option=orjson.OPT_INDENT_2).decode())
