"""The commands that change a ledger: aliases, checkpoint files, the spool, collection; -> the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smc.errors import ConfigError, Corrupt, NotFound
from smc.reporting.command_line import say
from smc.reporting.commands import Options, Store, as_json, print_json
from smc.storage.chain import ModelVersion
from smc.storage.gc import CollectionPlan, RetentionPolicy, collect, plan_collection
from smc.storage.recovery import recover
from smc.storage.spool import CommitRecord, Spool


async def tag(store: Store, options: Options) -> int:
    """Let an alias name a version."""
    version = await store.resolve(options.version)
    return await _tagged(store, options, options.name, version)


async def _tagged(store: Store, options: Options, name: str, version: ModelVersion) -> int:
    before = (await store.catalog()).aliases.get(name)
    entry = await store.tag(name, version, options.message)
    was = before.version_id if before else None
    if options.json:
        print_json({"alias": name, "version": version.version_id, "was": was, "entry": entry.index})
    else:
        say(f"{name}: {version.version_id}" + (f", was {was}" if was else "") + f" (entry {entry.index})")
    return 0


async def untag(store: Store, options: Options) -> int:
    """Let an alias name nothing any more."""
    was = (await store.catalog()).aliases.get(options.name)
    entry = await store.untag(options.name, options.message)
    if options.json:
        print_json({"alias": options.name, "version": None, "was": was and was.version_id, "entry": entry.index})
    else:
        say(f"{options.name}: nothing, was {was.version_id if was else 'nothing'} (entry {entry.index})")
    return 0


async def rollback(store: Store, options: Options) -> int:
    """Move an alias back: to what it named before, or to a version. Its history stays."""
    catalog = await store.catalog()
    if options.version is not None:
        version = catalog.resolve(options.version)
        if options.name not in catalog.aliases:
            raise NotFound(f"there is no alias {options.name!r}: there are {', '.join(catalog.aliases) or 'none'}")
    else:
        version = catalog.before(options.name)
    options.message = options.message or "rollback"
    return await _tagged(store, options, options.name, version)


async def import_(store: Store, options: Options) -> int:
    """Commit a checkpoint file as a new version."""
    from smc.checkpoint.file import check_described, decode
    from smc.checkpoint.tensor_header import model_hash

    data = options.file.read_bytes()
    try:
        snapshot = decode(data)
        check_described(snapshot)
    except Corrupt as error:  # the file, not the ledger
        raise ConfigError(f"{options.file}: {error}") from None
    record = CommitRecord(
        ledger=store.uri,
        message=options.message or f"imported from {options.file.name}",
        step=snapshot.metadata.global_step,
        loss=None,
        experiment=options.experiment,
        model_hash=model_hash(data),
    )
    version = await store.commit(data, record, fresh=True)
    if options.json:
        print_json(as_json(version))
    else:
        say(f"{version.version_id}  step {version.step}  {version.content_hash[:8]}  {version.commit_message}")
    return 0


async def recover_spool(store: Store, options: Options) -> int:
    """Commit what the local spool keeps for this ledger."""
    versions: list[ModelVersion] = []
    try:
        await recover(store, Spool(options.spool), told=versions.append)
    finally:  # what was recovered is said, whatever could not be
        if options.json:
            print_json([as_json(v) for v in versions])
        else:
            for v in versions:
                say(f"{v.version_id}  step {v.step}  {v.content_hash[:8]}  {v.commit_message}")
            say(f"{len(versions)} commits recovered into {store.uri}")
    return 0


async def gc_preview(store: Store, options: Options) -> int:
    """What a collection would keep and delete, and how many bytes."""
    plan = await plan_collection(store, await _policy(store, options))
    await store.require()
    if options.json:
        print_json(_plan_as_json(plan))
        return 0
    _print_plan(plan)
    return 0


async def gc_run(store: Store, options: Options) -> int:
    """Delete what the policy does not keep. Nothing without --yes."""
    policy = await _policy(store, options)
    plan = await plan_collection(store, policy)
    if not options.yes:
        print_json(_plan_as_json(plan)) if options.json else _print_plan(plan)
        raise ConfigError("nothing was deleted: add --yes to delete this")
    await store.require()
    result = await collect(store, policy, plan)
    if options.json:
        kept = {} if result.freed else {"hidden": True}
        print_json({"deleted": result.deleted, "bytes": result.bytes, "spared": result.spared, **kept})
        return 0
    spared = f", {result.spared} spared: they had been written or wanted again" if result.spared else ""
    freed = "freed" if result.freed else "hidden: the bucket keeps earlier versions until its lifecycle removes them"
    say(f"{result.deleted} checkpoints deleted, {_size(result.bytes)} {freed}{spared}; {len(plan.kept)} versions kept")
    return 0


async def _policy(store: Store, options: Options) -> RetentionPolicy:
    catalog = await store.catalog()
    protect = frozenset(catalog.resolve(name).counter for name in options.protect_tags)
    return RetentionPolicy(
        keep_last=options.keep,
        protect=protect,
        keep_heads=not options.no_heads,
        keep_lineage=options.lineage,
        keep_once_named=not options.no_alias_history,
        min_age=options.min_age,
    )


def _print_plan(plan: CollectionPlan) -> None:
    say(f"keeps {len(plan.kept)} versions:")
    reasons: dict[str, list[int]] = {}
    for counter, reason in sorted(plan.kept.items()):
        reasons.setdefault(reason, []).append(counter)
    for reason, counters in reasons.items():
        say(f"  {reason:<32}{_ranges(counters)}")
    size = sum(info.size for info in plan.orphans)
    say(f"deletes {len(plan.blobs)} checkpoints, {_size(plan.bytes)}:")
    say(f"  {f'{len(plan.versions)} versions':<32}{_ranges([v.counter for v in plan.versions]) or 'none'}")
    say(f"  {len(plan.orphans)} uploads that no version names, {_size(size)}")
    if plan.young:
        say(f"leaves {plan.young} more until they are older")


def _plan_as_json(plan: CollectionPlan) -> dict[str, Any]:
    return {
        "kept": [{"version": f"v{counter:010d}", "reason": reason} for counter, reason in sorted(plan.kept.items())],
        "deleted": [v.version_id for v in plan.versions],
        "orphans": [info.key for info in plan.orphans],
        "young": plan.young,
        "checkpoints": len(plan.blobs),
        "bytes": plan.bytes,
    }


def _ranges(counters: Sequence[int]) -> str:
    """1, 2, 3, 7 as v1 to v3, v7."""
    spans: list[list[int]] = []
    for counter in counters:
        if spans and spans[-1][1] == counter - 1:
            spans[-1][1] = counter
        else:
            spans.append([counter, counter])
    return ", ".join(f"v{a}" if a == b else f"v{a} to v{b}" for a, b in spans)


def _size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
