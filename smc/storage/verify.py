"""Verification: recompute every hash, and say which object is wrong and how."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import orjson

from smc.errors import Corrupt, NotFound
from smc.storage.chain import Entry, ModelVersion, Tail, blob_key, block_key, check_after, parse_block
from smc.storage.ledger import HEAD_KEY
from smc.storage.objects import ObjectStore

__all__ = ["Verification", "verify_ledger"]

_AT_ONCE = 32


@dataclass
class Verification:
    """What a verification found. `problems` are (object key, reason) in the order of the log."""

    blocks: int = 0
    entries: int = 0
    versions: int = 0
    blobs: int = 0
    collected: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the ledger is what its writers wrote."""
        return not self.problems


async def verify_ledger(
    objects: ObjectStore, *, blobs: bool = False, progress: Callable[[int], None] | None = None
) -> Verification:
    """Check the whole log, and with `blobs` the bytes of every checkpoint too.

    Without `blobs`, checkpoints are checked to be there with their sizes. Never raises Corrupt: every
    problem is in the result. Raises: Unavailable, ConfigError.
    """
    report = Verification()
    listed = {info.key: info.size async for info in objects.list("log/")}
    numbers = [int(k[4:14]) for k in listed if k.endswith(".jsonl") and len(k) == 20 and k[4:14].isdigit()]
    for key in sorted(listed):
        if not (key.endswith(".sig") or (key.endswith(".jsonl") and len(key) == 20 and key[4:14].isdigit())):
            report.problems.append((key, "not an object of this format"))
    last = max(numbers, default=-1)
    head = await _head(objects, report)
    if head is not None and head[0] > last:
        report.problems.append((block_key(head[0]), "the block is missing: head.json has seen it"))
    blocks = await _all_blocks(objects, last + 1, report)
    head_hash = head[1] if head is not None and head[0] == last else None
    versions, collected = _check_chain(blocks, head_hash, report)
    if head is not None and head[0] <= last and blocks[head[0]] is not None:
        entries = blocks[head[0]]
        if entries and entries[-1].hash != head[1]:
            report.problems.append((HEAD_KEY, "its hash is not that of the block it names"))
    await _check_blobs(objects, versions, collected, report, contents=blobs, progress=progress)
    return report


async def _head(objects: ObjectStore, report: Verification) -> tuple[int, str] | None:
    try:
        fields = orjson.loads(await objects.get(HEAD_KEY))
        return int(fields["block"]), str(fields["hash"])
    except NotFound:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        report.problems.append((HEAD_KEY, "not a head hint"))
        return None


async def _all_blocks(objects: ObjectStore, count: int, report: Verification) -> list[list[Entry] | None]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> list[Entry] | None:
        async with gate:
            try:
                return parse_block(number, await objects.get(block_key(number)))
            except NotFound:
                report.problems.append((block_key(number), "the block is missing"))
            except Corrupt as error:
                report.problems.extend(error.problems)
            return None

    blocks = list(await asyncio.gather(*(one(n) for n in range(count))))
    report.problems.sort()
    return blocks


def _attributed(
    blocks: Sequence[list[Entry] | None], number: int, head_hash: str | None, error: Corrupt
) -> Sequence[tuple[str, str]]:
    """Which of two blocks that do not fit was changed: not the one that the block after it still fits."""
    before, here = blocks[number - 1] if number else None, blocks[number]
    assert here is not None
    if not before or here[0].fields["parent_hash"] == before[-1].hash:
        return error.problems
    after = blocks[number + 1] if number + 1 < len(blocks) else None
    expected = after[0].fields["parent_hash"] if after else head_hash if number + 1 == len(blocks) else None
    if expected != here[-1].hash:
        return error.problems
    reason = (
        f"its last entry, {before[-1].index}, has hash {before[-1].hash[:12]}..., "
        f"but {block_key(number)} was written after {here[0].fields['parent_hash'][:12]}..."
    )
    return ((block_key(number - 1), reason),)


def _check_chain(
    blocks: Sequence[list[Entry] | None], head_hash: str | None, report: Verification
) -> tuple[list[ModelVersion], set[str]]:
    versions: list[ModelVersion] = []
    collected: set[str] = set()
    seen: dict[str, int] = {}
    tail: Tail | None = Tail()
    for number, entries in enumerate(blocks):
        report.blocks += 1
        if entries is None:
            tail = None
            continue
        if tail is not None:
            try:
                check_after(tail, entries)
            except Corrupt as error:
                report.problems.extend(_attributed(blocks, number, head_hash, error))
        for entry in entries:
            report.entries += 1
            first = seen.setdefault(entry.commit_id, entry.index)
            if first != entry.index:
                reason = f"entry {entry.index} repeats commit_id {entry.commit_id} of entry {first}"
                report.problems.append((block_key(number), reason))
            try:
                version = entry.version
            except Corrupt as error:
                report.problems.append((block_key(number), str(error)))
                continue
            if version is not None:
                versions.append(version)
            elif entry.kind == "collect":
                collected.update(str(h) for h in entry.fields.get("content_hashes", []))
        # After a problem the chain is followed from what is there, so that one fault is one report.
        counter = versions[-1].counter + 1 if versions else 0
        tail = Tail(number + 1, entries[-1].index + 1, counter, entries[-1].hash)
    report.versions = len(versions)
    return versions, collected


async def _check_blobs(
    objects: ObjectStore,
    versions: Sequence[ModelVersion],
    collected: set[str],
    report: Verification,
    *,
    contents: bool,
    progress: Callable[[int], None] | None,
) -> None:
    wanted = {v.content_hash: v for v in versions}
    if not wanted:
        return
    sizes = {info.key: info.size async for info in objects.list("blobs/")}
    gate = asyncio.Semaphore(4)

    async def one(version: ModelVersion) -> None:
        key = blob_key(version.content_hash)
        if key not in sizes:
            if version.content_hash in collected:
                report.collected += 1
            else:
                report.problems.append((key, f"the checkpoint of {version.version_id} is missing"))
            return
        report.blobs += 1
        if sizes[key] != version.size:
            reason = f"the checkpoint of {version.version_id} has {sizes[key]} bytes, its entry says {version.size}"
            report.problems.append((key, reason))
        elif contents:
            async with gate:
                data = await objects.get(key)
                digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
            if digest != version.content_hash:
                report.problems.append((key, f"the bytes of {version.version_id} do not have the hash in its name"))
            if progress is not None:
                progress(1)

    await asyncio.gather(*(one(v) for v in wanted.values()))
