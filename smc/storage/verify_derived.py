"""Verification of what is derived from the log: the head hint, and the indexes that repeat blocks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import orjson

from smc.errors import NotFound
from smc.storage.chain import (
    Entry,
    block_key,
)
from smc.storage.index import decode_index, index_key
from smc.storage.ledger import HEAD_KEY
from smc.storage.limits import LIMITS
from smc.storage.objects import ObjectStore
from smc.storage.requests import retried

__all__ = ["check_head", "check_indexes", "read_head", "read_indexes", "settled_head"]

Problems = list[tuple[str, str]]

_AT_ONCE = 48
_INDEX_KEY = re.compile(r"^index/[0-9]{10}\.json$")


async def read_head(objects: ObjectStore) -> tuple[int, str, int] | None:
    """What head.json says: block, hash, index; None if it says nothing usable."""
    try:
        data = bytes(await retried(lambda: objects.get(HEAD_KEY)))
        fields = orjson.loads(data)
        block, index, digest = fields["block"], fields["index"], fields["hash"]
        if type(block) is not int or type(index) is not int or type(digest) is not str:
            return None
        if orjson.dumps({"block": block, "index": index, "hash": digest}) == data:
            return block, digest, index
    except (NotFound, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        pass
    return None


async def settled_head(objects: ObjectStore, last: int) -> tuple[int, str, int] | None:
    """The head hint, given a moment to catch up: a writer writes it after the block, once a second."""
    for delay in (0.2, 0.8, 1.0, 0.0):
        head = await read_head(objects)
        if head is not None and head[0] >= last:
            break
        await asyncio.sleep(delay)
    return head


def check_head(head: tuple[int, str, int] | None, blocks: Sequence[list[Entry] | None], problems: Problems) -> None:
    """Add to `problems` what is wrong with the head hint of a log with these blocks."""
    if head is None:
        problems.append((HEAD_KEY, "the head hint is missing or not one"))
        return
    block, digest, index = head
    if 0 <= block < len(blocks):
        entries = blocks[block]
        if entries and (entries[-1].hash != digest or entries[-1].index != index):
            # One of the two was changed, and nothing here tells which.
            problems.append((HEAD_KEY, "its hash or index is not that of the block it names"))
            problems.append((block_key(block), "its last entry does not have the hash that head.json names"))
    if block < len(blocks) - 1:
        reason = (
            f"it is {len(blocks) - 1 - block} blocks behind the log: an old one was put back, or a writer "
            "ended before it wrote it; the next writer renews it"
        )
        problems.append((HEAD_KEY, reason))


async def read_indexes(objects: ObjectStore, segments: int) -> dict[int, list[bytes] | None]:
    """The raw blocks that each index repeats; None for an index that is missing or broken."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(segment: int) -> list[bytes] | None:
        async with gate:
            try:
                return decode_index(segment, bytes(await retried(lambda: objects.get(index_key(segment)))))
            except NotFound:
                return None

    return dict(zip(range(segments), await asyncio.gather(*(one(k) for k in range(segments))), strict=True))


async def check_indexes(
    objects: ObjectStore,
    indexes: dict[int, list[bytes] | None],
    blocks: Sequence[list[Entry] | None],
    problems: Problems,
) -> None:
    """Add to `problems` what is wrong with the indexes: each repeats the blocks of its segment."""
    listed = {info.key async for info in objects.list("index/")}
    for key in sorted(listed - {index_key(k) for k in indexes}):
        if not (_INDEX_KEY.match(key) and int(key[6:16]) == len(indexes)):  # one just written by a writer at work
            problems.append((key, "not an index of this log"))
    for segment, raw in indexes.items():
        if raw is None:
            # A writer may be at work on the last one.
            raw = (await read_indexes(objects, segment + 1))[segment] if segment == len(indexes) - 1 else None
        key = index_key(segment)
        if raw is None:
            reason = "not an index" if key in listed else "the index is missing; the next writer makes it again"
            problems.append((key, reason))
            continue
        for offset, block in enumerate(raw):
            entries = blocks[segment * LIMITS.segment + offset]
            if entries is not None and b"".join(e.line for e in entries) != block:
                problems.append((key, f"it differs from {block_key(segment * LIMITS.segment + offset)}"))
                break
