"""Verification: recompute every hash, and say which object is wrong and how."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from smc.checkpoint.tensor_header import model_hash
from smc.errors import Corrupt, NotFound
from smc.storage.chain import (
    UNKNOWN,
    Announcements,
    Entry,
    ModelVersion,
    Tail,
    blob_key,
    block_key,
    check_after,
    is_content_hash,
    parse_block,
)
from smc.storage.ledger import HEAD_KEY
from smc.storage.limits import LIMITS
from smc.storage.objects import ObjectInfo, ObjectStore
from smc.storage.requests import retried
from smc.storage.verify_derived import check_head, check_indexes, read_head, read_indexes, settled_head

__all__ = ["Verification", "verify_ledger"]

_AT_ONCE = 48
_BLOCK_KEY = re.compile(r"^log/[0-9]{10}\.jsonl$")
_SIGNATURE_KEY = re.compile(r"^log/[0-9]{10}\.sig$")
# Blocks that may be missing one after the other in a log. What stands further behind was never part of it.
_LONGEST_GAP = 256
# A first checkpoint is there before the first block that names it, by what it takes to write one.
_LOOKS_FOR_A_LOG, _UNTIL_A_LOG = 13, 0.25


@dataclass
class Verification:
    """What a verification found. `problems` are (object key, reason) in the order of the log."""

    blocks: int = 0
    entries: int = 0
    read: int = 0  # blocks read one by one; the rest an index repeats and the server vouches for
    versions: int = 0
    blobs: int = 0
    collected: int = 0
    found: bool = True  # whether anything of a ledger is there
    last: tuple[int, str] | None = None  # index and hash of the last entry
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def log_is_whole(self) -> bool:
        """Whether the log itself can be followed; checkpoints and what is derived from the log may be wrong."""
        return not any(key.startswith("log/") for key, _ in self.problems)

    @property
    def ok(self) -> bool:
        """Whether the ledger is what its writers wrote."""
        return not self.problems


async def verify_ledger(
    objects: ObjectStore,
    *,
    blobs: bool = False,
    full: bool = False,
    since: tuple[int | None, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check the whole log, and with `blobs` the bytes of every checkpoint too.

    Without `blobs`, checkpoints are checked to be there with their sizes. A block whose bytes an index
    repeats is not read again if the server states the same size and MD5 for it, unless `full`. `since` is the index and
    the hash of an entry that was there before, like (41, "3f..."): the log has to go on from it. Never raises Corrupt:
    every problem is in the result. Raises: Unavailable, ConfigError.
    """
    for _ in range(_LOOKS_FOR_A_LOG):
        report = await _verified(objects, blobs, full, since, progress)
        if not report.problems or any(key != "log/" for key, _ in report.problems):
            break
        # Checkpoints without a log: a fault, unless somebody is just about to write the first block.
        await asyncio.sleep(_UNTIL_A_LOG)
    return report


async def _verified(
    objects: ObjectStore,
    blobs: bool,
    full: bool,
    since: tuple[int | None, str] | None,
    progress: Callable[[int], None] | None,
) -> Verification:
    report = Verification()
    seen = await read_head(objects)  # before the log, which may grow meanwhile
    listed = {info.key: info async for info in objects.list("log/")}
    numbers = [int(key[4:14]) for key in listed if _BLOCK_KEY.match(key)]
    for key in sorted(listed):
        if not (_BLOCK_KEY.match(key) or _SIGNATURE_KEY.match(key)):
            report.problems.append((key, "not an object of this format"))
    last = _end_of(sorted(numbers)) - 1
    for number in sorted(number for number in numbers if number > last):
        reason = f"not a block of this log, which ends at block {last}: more than {_LONGEST_GAP} before it are missing"
        report.problems.append((block_key(number), reason))
    indexes = await read_indexes(objects, (last + 1) // LIMITS.segment)
    blocks = await _all_blocks(objects, last + 1, listed, {} if full else indexes, report)
    if seen is not None and seen[0] > last:
        report.problems.append((block_key(seen[0]), "the block is missing: head.json has seen it"))
    head = await settled_head(objects, last) if listed or seen is not None else None
    report.found = bool(listed) or seen is not None
    head_hash = head[1] if head is not None and head[0] == last else None
    said = _check_chain(blocks, head_hash, report)
    if last >= 0:
        check_head(head, blocks, report.problems)
    if since is not None:
        _check_since(since, blocks, report)
    await check_indexes(objects, indexes, blocks, report.problems)
    await _check_blobs(objects, said, report, contents=blobs, progress=progress)
    return report


def _end_of(numbers: Sequence[int]) -> int:
    """How many blocks a log with these has, missing ones included; what a long gap separates from it does not count."""
    end = 0
    for number in numbers:
        if number - end > _LONGEST_GAP:
            break
        end = number + 1
    return end


def _check_since(since: tuple[int | None, str], blocks: Sequence[list[Entry] | None], report: Verification) -> None:
    index, digest = since
    entries = [entry for block in blocks for entry in block or ()]
    found = next((entry for entry in entries if index in (entry.index, None) and entry.hash == digest), None)
    if found is not None:
        return
    found = next((entry for entry in entries if entry.index == index), None)
    if found is None:
        name = "the entry" if index is None else f"entry {index}"
        end = entries[-1].index if entries else -1
        reason = f"{name} with hash {digest[:12]}..., which was there, is not: the log ends with entry {end}"
        report.problems.append((HEAD_KEY, reason))
    else:
        reason = f"entry {index} has hash {found.hash[:12]}..., and the one that was there had {digest[:12]}..."
        report.problems.append((block_key(found.block), reason))


async def _all_blocks(
    objects: ObjectStore,
    count: int,
    listed: Mapping[str, ObjectInfo],
    indexes: Mapping[int, list[bytes] | None],
    report: Verification,
) -> list[list[Entry] | None]:
    gate = asyncio.Semaphore(_AT_ONCE)
    missing = [n for n in range(count) if block_key(n) not in listed]
    report.problems += [(block_key(n), "the block is missing") for n in missing]

    async def one(number: int) -> list[Entry] | None:
        key = block_key(number)
        if key not in listed:
            return None
        segment = indexes.get(number // LIMITS.segment)
        data = segment[number % LIMITS.segment] if segment else None
        if data is None or not _server_states(listed[key], data):
            async with gate:
                data = bytes(await retried(lambda: objects.get(key)))
                report.read += 1
        try:
            return parse_block(number, data)
        except Corrupt as error:
            report.problems.extend(error.problems)
            return None

    blocks = list(await asyncio.gather(*(one(n) for n in range(count))))
    report.problems.sort()
    return blocks


def _server_states(info: ObjectInfo, data: bytes) -> bool:
    if info.etag is None or info.size != len(data):
        return False
    return info.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()


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


@dataclass
class _Said:
    """What the entries of a log say of its checkpoints."""

    versions: list[ModelVersion] = field(default_factory=list)
    announcements: Announcements = field(default_factory=Announcements)
    aliases: dict[str, str] = field(default_factory=dict)  # the content hash that each names

    def take(self, entry: Entry) -> str | None:
        """Take in the next entry; -> what is wrong with it."""
        try:
            version, move = entry.version, entry.alias_move
            self.announcements.apply(entry)
        except Corrupt as error:
            return str(error)
        if version is not None:
            self.versions.append(version)
        elif move is not None and move.counter is None:
            self.aliases.pop(move.alias, None)
        elif move is not None and move.counter is not None and move.content_hash is not None:
            named = self.versions[move.counter].content_hash if move.counter < len(self.versions) else None
            if named != move.content_hash:
                return f"entry {entry.index}: alias {move.alias} names a version that is not before it"
            self.aliases[move.alias] = move.content_hash
        return None

    def may_be_gone(self, content_hash: str) -> bool:
        """Whether a collector may have deleted it: announced, and neither the genesis nor named by an alias."""
        kept = {*self.aliases.values(), *(version.content_hash for version in self.versions[:1])}
        return content_hash in self.announcements and content_hash not in kept


def _check_chain(blocks: Sequence[list[Entry] | None], head_hash: str | None, report: Verification) -> _Said:
    said = _Said()
    seen: dict[str, int] = {}
    tail: Tail | None = Tail()
    last_collect = -1
    for number, entries in enumerate(blocks):
        report.blocks += 1
        if entries is None:
            tail, last_collect = None, UNKNOWN  # it may have announced a collection
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
            if (wrong := said.take(entry)) is not None:
                report.problems.append((block_key(number), wrong.removeprefix(f"{block_key(number)}: ")))
        # After a problem the chain is followed from what is there, so that one fault is one report.
        counter = said.versions[-1].counter + 1 if said.versions else 0
        if any(entry.kind == "collect" for entry in entries):
            last_collect = number
        tail = Tail(number + 1, entries[-1].index + 1, counter, entries[-1].hash, last_collect)
        report.last = entries[-1].index, entries[-1].hash
    report.versions = len(said.versions)
    return said


async def _check_blobs(
    objects: ObjectStore,
    said: _Said,
    report: Verification,
    *,
    contents: bool,
    progress: Callable[[int], None] | None,
) -> None:
    wanted: dict[str, list[ModelVersion]] = {}
    for version in said.versions:
        wanted.setdefault(version.content_hash, []).append(version)
    sizes = {info.key: info.size async for info in objects.list("blobs/")}
    if not said.versions and report.blocks == 0:
        checkpoints = [key for key in sizes if is_content_hash(key.removeprefix("blobs/").removesuffix(".safetensors"))]
        report.found |= bool(sizes)
        if checkpoints:
            report.problems.append(("log/", f"there is no log, and there are {len(checkpoints)} checkpoints"))
    gate = asyncio.Semaphore(4)
    missing: list[ModelVersion] = []

    async def one(named: Sequence[ModelVersion]) -> None:
        version = named[-1]
        key = blob_key(version.content_hash)
        if key not in sizes:
            missing.append(version)
            return
        if sizes[key] != version.size:
            reason = f"the checkpoint of {version.version_id} has {sizes[key]} bytes, its entry says {version.size}"
            report.problems.append((key, reason))
        elif contents:
            async with gate:
                try:
                    data = await retried(lambda: objects.get(key, version.size))
                except NotFound:  # deleted since it was listed
                    missing.append(version)
                    return
                digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
                of_model = await asyncio.to_thread(lambda: model_hash(data))
            if digest != version.content_hash:
                report.problems.append((key, f"the bytes of {version.version_id} do not have the hash in its name"))
            for v in named:
                if v.model_hash not in (None, of_model) and digest == v.content_hash:
                    report.problems.append((key, f"its model does not have the hash in the entry of {v.version_id}"))
            if progress is not None:
                progress(1)
        report.blobs += 1

    await asyncio.gather(*(one(named) for named in wanted.values()))
    if any(not said.may_be_gone(version.content_hash) for version in missing):
        await _take_newer(objects, report.blocks, said)  # a collector may be at work
    for version in missing:
        if said.may_be_gone(version.content_hash):
            report.collected += 1
        else:
            reason = f"the checkpoint of {version.version_id} is missing"
            report.problems.append((blob_key(version.content_hash), reason))


async def _take_newer(objects: ObjectStore, number: int, said: _Said) -> None:
    """What was appended since the log was read."""
    with suppress(NotFound, Corrupt):
        while True:
            key = block_key(number)
            data = await retried(lambda: objects.get(key))  # noqa: B023  awaited here
            for entry in parse_block(number, bytes(data)):
                said.take(entry)
            number += 1
