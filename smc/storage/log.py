"""Reading the log: single blocks, long stretches of it by their indexes, and where it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import orjson

from smc.errors import Corrupt, NotFound
from smc.storage.chain import Entry, block_key, parse_block
from smc.storage.index import decode_index, index_key
from smc.storage.limits import LIMITS
from smc.storage.objects import ObjectStore
from smc.storage.requests import retried

__all__ = ["HEAD_KEY", "Log"]

HEAD_KEY: Final = "head.json"
_READS_AT_ONCE = 48
# How far beyond the last known block the end is looked for in one round of requests, and into how many parts the
# stretch that must have it is then divided.
_DOUBLINGS = 14
_PARTS = 16
_NONE_MISSING = 10**10

logger = logging.getLogger("smc.storage")


class Log:
    """The blocks of one ledger, as they are stored.

    Raises, from every method: ConfigError, Corrupt, and Unavailable once retries after `retry_delays` seconds are used
    up. `wrong_indexes` are segments whose index was found to differ from the log.
    """

    def __init__(self, objects: ObjectStore, retry_delays: Sequence[float]) -> None:
        self._objects, self._retry_delays = objects, tuple(retry_delays)
        self.wrong_indexes: set[int] = set()

    async def read_block(self, number: int) -> list[Entry]:
        """One block's entries, from the log itself. Raises: NotFound."""
        data = await retried(lambda: self._objects.get(block_key(number)), self._retry_delays)
        return parse_block(number, bytes(data))

    async def probe(self, number: int) -> list[Entry] | None:
        """One block's entries, or None where the log has no such block."""
        try:
            return await self.read_block(number)
        except NotFound:
            return None

    async def existing(self, number: int) -> list[Entry]:
        """One block's entries. Raises: Corrupt if the block is missing."""
        entries = await self.probe(number)
        if entries is None:
            raise _missing(number)
        return entries

    async def read_blocks(self, start: int, stop: int, *, end_hash: str | None = None) -> list[list[Entry]]:
        """Blocks start ... stop - 1, read concurrently, whole segments by their index where there is one.

        The last entry must have `end_hash` (that of the block in the log, if not given), and every
        entry the hash that the next one names: what an index says is taken only if it leads there.
        Raises: Corrupt if a block is missing or does not fit.
        """
        if start >= stop:
            return []
        width = LIMITS.segment
        gate = asyncio.Semaphore(_READS_AT_ONCE)
        blocks: dict[int, list[Entry]] = {}
        segments = range(-(-start // width), stop // width)

        async def from_log(number: int) -> None:
            async with gate:
                blocks[number] = await self.existing(number)

        async def from_index(segment: int) -> bool:
            async with gate:
                found = await self._index(segment)
            for offset, entries in enumerate(found or []):
                blocks[segment * width + offset] = entries
            return found is not None

        indexed = dict(zip(segments, await asyncio.gather(*(from_index(k) for k in segments)), strict=True))
        wanted = [n for n in range(start, stop) if n not in blocks]
        if end_hash is None and stop - 1 not in wanted:
            wanted.append(stop - 1)
        await asyncio.gather(*(from_log(n) for n in wanted))
        expected = blocks[stop - 1][-1].hash if end_hash is None else end_hash
        number = stop - 1
        while number >= start:
            if blocks[number][-1].hash == expected and _linked(blocks[number]):
                expected = str(blocks[number][0].fields["parent_hash"])
                number -= 1
                continue
            segment = number // width
            if not indexed.pop(segment, False):
                reason = f"its last entry does not have the hash {expected[:12]}... that the next one names"
                raise Corrupt(f"{block_key(number)}: {reason}", ((block_key(number), reason),))
            logger.warning("%s does not fit the log and is passed over", index_key(segment))
            self.wrong_indexes.add(segment)
            await asyncio.gather(*(from_log(segment * width + offset) for offset in range(width)))
        return [blocks[n] for n in range(start, stop)]

    async def _index(self, segment: int) -> list[list[Entry]] | None:
        """What a segment's index repeats; None if it is missing, or not the index of these blocks."""
        try:
            data = await retried(lambda: self._objects.get(index_key(segment)), self._retry_delays)
            raw = decode_index(segment, bytes(data))
            first = segment * LIMITS.segment
            blocks = [parse_block(first + offset, block) for offset, block in enumerate(raw or ())]
            if blocks and all(_of_one_block(block) for block in blocks):
                return blocks
        except (NotFound, Corrupt):
            pass
        self.wrong_indexes.add(segment)
        return None

    async def hint(self) -> int | None:
        """The block that head.json names; None if it names none."""
        try:
            data = await retried(lambda: self._objects.get(HEAD_KEY), self._retry_delays)
            block = orjson.loads(bytes(data))["block"]
            return block if type(block) is int else None
        except (NotFound, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    async def end(self, known: int) -> int:
        """How many blocks the log has, given that it has blocks 0 ... known - 1.

        In a few rounds of requests, however many blocks there are. Raises: Corrupt if one is missing.
        """
        if not await self._exists(known):  # most often
            return known
        end, missing = known + 1, _NONE_MISSING
        while missing == _NONE_MISSING:
            end, missing = await self._narrowed(end, missing, [end + 2**k - 1 for k in range(_DOUBLINGS + 1)])
        while end < missing:
            part = -(-(missing - end) // _PARTS)
            end, missing = await self._narrowed(end, missing, range(end, missing, part))
        return end

    async def _narrowed(self, end: int, missing: int, numbers: Sequence[int]) -> tuple[int, int]:
        """Ask for some blocks; -> how many there are at least, and the first that is known not to be there."""
        there = await asyncio.gather(*(self._exists(number) for number in numbers))
        count = sum(there)
        for number, is_there in zip(numbers[:count], there, strict=False):
            # It may have been written after it was asked for.
            if not is_there and not await self._exists(number):
                raise _missing(number)
        if count < len(numbers):
            missing = numbers[count]
        return (numbers[count - 1] + 1 if count else end), missing

    async def _exists(self, number: int) -> bool:
        try:
            await retried(lambda: self._objects.get(block_key(number)), self._retry_delays)
        except NotFound:
            return False
        return True


def _missing(number: int) -> Corrupt:
    return Corrupt(f"{block_key(number)}: the block is missing", ((block_key(number), "the block is missing"),))


def _linked(entries: Sequence[Entry]) -> bool:
    return all(after.fields["parent_hash"] == before.hash for before, after in pairwise(entries))


def _of_one_block(entries: Sequence[Entry]) -> bool:
    """Whether an index can be right that these entries are a block, for entries of earlier versions too.

    Where a block ends is in no hash of theirs. But the entries of a block were written at one time, and every other
    way to divide a segment into its blocks joins entries of two.
    """
    told = all("block" in entry.fields for entry in entries)
    return all(entry.is_in_place for entry in entries) and (told or len({e.fields["timestamp"] for e in entries}) == 1)
