"""A log as one process knows it: read once from near its end, then followed block by block."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from smc.errors import Corrupt
from smc.storage.chain import UNKNOWN, Announcements, Entry, Tail, block_key, check_after, parse_block
from smc.storage.identities import CommitIds
from smc.storage.limits import LIMITS
from smc.storage.log import Log
from smc.storage.objects import ObjectStore

__all__ = ["LONGEST_COLLECTION", "LogReader"]

# A collector that announced something longer ago than this is not at work any more.
LONGEST_COLLECTION: Final = timedelta(days=1)
# Entries kept as they are, for those who ask for a version or submit again; half as many commits are read at opening.
_SEGMENTS_AT_ONCE = 16
# Blocks that are asked for, round by round, before the end of the log is looked for further away.
_NEARBY = (1, 3, 12)


class LogReader:
    """The tail of a log, its newest entries, and what a writer has to know of the rest.

    Opening reads the newest thousand commits. Older commit ids and announcements are read when they are asked for, and
    from then on nothing is forgotten. One caller at a time. Raises, from every method: ConfigError, Corrupt,
    Unavailable.
    """

    def __init__(self, objects: ObjectStore, log: Log) -> None:
        self._objects, self.log = objects, log
        self.forget()

    def forget(self) -> None:
        """Know nothing of the log."""
        self.tail: Tail | None = None
        self.last_version: Entry | None = None
        self._recent: OrderedDict[str, Entry] = OrderedDict()
        self._versions: OrderedDict[int, Entry] = OrderedDict()
        self._ids = CommitIds()
        # The ids of all blocks from this one on are known. Its first entry names this hash, and this newest collection.
        self._ids_from, self._hash_before, self._collect_before = 0, "", -1
        self.announcements = Announcements()  # of what was read of the log
        self._announcements_known = False  # also those from before, of collectors that may be at work
        self.raw: dict[int, bytes] = {}  # the bytes of the last segments' blocks, for an index
        self.hinted: int | None = None  # the block that head.json named at opening

    async def find_version(self, counter: int) -> Entry | None:
        """The commit with this counter, or None if there is none yet."""
        tail = await self.refresh()
        if not 0 <= counter < tail.counter:
            return None
        if counter in self._versions:
            return self._versions[counter]
        low, high = 0, (tail.block - 1) // LIMITS.segment
        while low <= high:  # counters rise along the log: bisect by segment
            middle = here = (low + high) // 2
            commits: dict[int, Entry] = {}
            while here >= low and not commits:  # a segment without commits tells nothing: ask the one before
                blocks = await self.log.read_blocks(here * LIMITS.segment, min((here + 1) * LIMITS.segment, tail.block))
                commits = {e.counter: e for block in blocks for e in block if e.counter is not None}
                here -= 1
            if counter in commits:
                return commits[counter]
            if commits and counter < min(commits):
                high = here
            else:
                low = middle + 1
        raise Corrupt(f"counter {counter} is missing from the log")

    async def refresh(self) -> Tail:
        """Read what was appended since; the tail is then the log's end as of some moment in the call."""
        if self.tail is None:
            await self._open()
        assert self.tail is not None
        while True:
            for width in _NEARBY:  # most often nothing is new, or little
                found = await asyncio.gather(*(self.log.probe(self.tail.block + i) for i in range(width)))
                for entries in found:
                    if entries is None:
                        return self.tail
                    self.advance(entries)
            await self._advance_to(await self.log.end(self.tail.block))

    async def _advance_to(self, end: int) -> None:
        assert self.tail is not None
        while self.tail.block < end:
            stop = min(end, (self.tail.block // LIMITS.segment + _SEGMENTS_AT_ONCE) * LIMITS.segment)
            for entries in await self.log.read_blocks(self.tail.block, stop):
                self.advance(entries)

    async def _open(self) -> None:
        """Find the end of the log, from the hint or from a listing, and remember the latest commits."""
        hint = self.hinted = await self.log.hint()
        newest = beyond = None
        if hint is not None and hint >= 0:
            newest, beyond = await asyncio.gather(self.log.probe(hint), self.log.probe(hint + 1))
        if newest is None:
            # No usable hint: the log itself says where it ends. Only a readable, empty listing is new.
            keys = [info.key async for info in self._objects.list("log/") if info.key.endswith(".jsonl")]
            end = len(keys) - 1
            if keys and keys[-1] != block_key(end):
                missing = next(n for n, key in enumerate(keys) if key != block_key(n))
                reason = f"the block is missing, and {keys[missing]} is there"
                raise Corrupt(f"{block_key(missing)}: {reason}", ((block_key(missing), "the block is missing"),))
            if not keys:
                self.tail = Tail()
                self._announcements_known = True
                return
            newest = await self.log.existing(end)
        elif beyond is not None:
            # The hint is a little late, or an old one that somebody put back.
            newest = await self.log.existing(await self.log.end(beyond[0].block + 1) - 1)
        end = newest[0].block
        blocks, start = [newest], end
        while start > 0 and sum(e.kind == "commit" for block in blocks for e in block) < LIMITS.remembered // 2:
            width = max(1, len(blocks) // LIMITS.segment)  # segments in growing steps
            first = max(0, (start - 1) // LIMITS.segment - width + 1) * LIMITS.segment
            before = str(blocks[0][0].fields["parent_hash"])
            blocks = await self.log.read_blocks(first, start, end_hash=before) + blocks
            start = first
        counter = next((e.counter for block in blocks for e in block if e.counter is not None), 0)
        # The first block of the log has nothing before it.
        opening = Tail.before(blocks[0][0], counter) if start else Tail()
        self._ids_from, self._hash_before, self._collect_before = start, opening.parent_hash, opening.last_collect
        self._announcements_known = start == 0
        self.tail = opening
        for entries in blocks:
            self.advance(entries)

    def advance(self, entries: list[Entry]) -> None:
        """Take in the next block. Raises: Corrupt, before anything is changed."""
        assert self.tail is not None
        number = self.tail.block
        self.tail = check_after(self.tail, entries)
        self.raw[number] = b"".join(entry.line for entry in entries)
        self._ids.add(number, [entry.commit_id for entry in entries])
        for entry in entries:
            self._recent[entry.commit_id] = entry
            with contextlib.suppress(Corrupt):  # whoever reads what it says is told; appending goes on
                self.announcements.apply(entry)
            if entry.counter is not None:
                self.last_version = self._versions[entry.counter] = entry
        for remembered in (self._recent, self._versions):
            while len(remembered) > LIMITS.remembered:
                remembered.popitem(last=False)
        if number % LIMITS.segment == 0:  # a writer that needs more than the last two segments reads them again
            self.raw = {n: raw for n, raw in self.raw.items() if n >= number - LIMITS.segment}

    def recent_blocks(self, start: int, stop: int) -> list[list[Entry]]:
        """Those of blocks start ... stop - 1 at their end that are remembered; none if the last is not."""
        first = stop
        while first > start and first - 1 in self.raw:
            first -= 1
        return [parse_block(number, self.raw[number]) for number in range(first, stop)]

    async def known(self, commit_id: str) -> Entry | None:
        """The entry with this id, as far as ids are known."""
        if commit_id in self._recent:
            return self._recent[commit_id]
        for number in self._ids.blocks(commit_id):
            for entry in await self.log.existing(number):
                if entry.commit_id == commit_id:
                    return entry
        return None

    async def know_all_ids(self) -> None:
        """Read what stands before all that was read."""
        told: list[Entry] = []
        while self._ids_from > 0:
            first = max(0, (self._ids_from - 1) // LIMITS.segment - _SEGMENTS_AT_ONCE + 1) * LIMITS.segment
            blocks = await self.log.read_blocks(first, self._ids_from, end_hash=self._hash_before)
            for number, entries in enumerate(blocks, first):
                self._ids.add(number, [entry.commit_id for entry in entries])
            told = [e for block in blocks for e in block if e.kind == "collect"] + told
            self._ids_from, self._hash_before = first, str(blocks[0][0].fields["parent_hash"])
        assert self.tail is not None
        if self.tail.last_collect == UNKNOWN:
            self.tail = replace(self.tail, last_collect=told[-1].block if told else -1)
        if not self._announcements_known:
            self._announce_earlier(told)
            self._announcements_known = True

    async def know_announcements(self) -> None:
        """Read the collections before all that was read, of collectors that may still be at work.

        Every entry names the newest one before it, so that each is one request. What was written by earlier versions
        does not: there the whole log is read, once.
        """
        number = self._collect_before
        while not self._announcements_known:
            if number == UNKNOWN:
                return await self.know_all_ids()
            entries = await self.log.existing(number) if number >= 0 else []
            self._announcements_known = not self._announce_earlier([e for e in entries if e.kind == "collect"])
            number = entries[0].last_collect if entries else -1
        return None

    def _announce_earlier(self, collects: Sequence[Entry]) -> bool:
        """Take in announcements from before what was read; -> whether some of them are of collectors at work."""
        at_work = [entry for entry in collects if datetime.now(UTC) - entry.time < LONGEST_COLLECTION]
        for entry in reversed(at_work):
            with contextlib.suppress(Corrupt):
                self.announcements.apply_earlier(entry)
        return bool(at_work)
