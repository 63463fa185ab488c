"""The append pipeline: one writer's view of the log, kept correct by conditional creates.

Block n is committed by whoever creates it. Everything here follows from that: group commit, rebasing on
another writer's block, telling an own write that went through from somebody else's, and never taking a
failure to read for an empty ledger. Plain asyncio; one instance serves one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Final

import orjson

from smc.errors import Busy, ConfigError, Conflict, Corrupt, NotFound, StorageError, Unavailable
from smc.storage.chain import (
    Announcements,
    Draft,
    Entry,
    Tail,
    blob_key,
    block_key,
    build_block,
    check_after,
    parse_block,
    version_id,
)
from smc.storage.index import SEGMENT, decode_index, encode_index, index_key
from smc.storage.objects import ObjectStore
from smc.storage.requests import RETRY_DELAYS, retried

__all__ = ["HEAD_KEY", "Ledger"]

HEAD_KEY: Final = "head.json"
# Entries remembered by commit_id, so that a repeated submission is recognised; half as many at opening.
_REMEMBERED = 2048
_READS_AT_ONCE = 48
_PROBES_AT_ONCE = 16
_MAX_BLOCK_ENTRIES = 256
_MAX_QUEUE = 4096
_HINT_INTERVAL = 1.0  # seconds: a hint for every block would be a third of the requests

logger = logging.getLogger("smc.storage")


@dataclass
class _Waiting:
    draft: Draft
    future: asyncio.Future[Entry] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Ledger:
    """Reads the log forward and appends to it.

    Raises, from every method: ConfigError, Corrupt, and Unavailable once retries after `retry_delays`
    seconds are used up.
    """

    def __init__(self, objects: ObjectStore, *, retry_delays: Sequence[float] = RETRY_DELAYS) -> None:
        self._objects = objects
        self._retry_delays = tuple(retry_delays)
        self._tail: Tail | None = None
        self._last_version: Entry | None = None
        self._recent: OrderedDict[str, Entry] = OrderedDict()
        self._recent_versions: dict[int, Entry] = {}
        self._announcements = Announcements()  # of what was read of the log
        self._raw: dict[int, bytes] = {}  # blocks of segments that have no index yet
        self._indexed: set[int] | None = None
        self._queue: deque[_Waiting] = deque()
        self._queued: dict[str, _Waiting] = {}
        self._sequencer: asyncio.Task[None] | None = None
        self._publisher: asyncio.Task[None] | None = None
        self._published = -2
        self._tail_lock = asyncio.Lock()
        self._proved = False
        self._at_once = asyncio.Event()  # hints do not wait
        self._block_seconds = 0.05

    # --- reading --------------------------------------------------------------------------------------

    async def refresh(self) -> Tail:
        """Read what others appended since; the tail is then the log's end as of some moment in the call."""
        async with self._tail_lock:
            return await self._refresh()

    async def newest_version(self) -> Entry | None:
        """The last commit of the log, or None."""
        await self.refresh()
        return self._last_version

    async def find_version(self, counter: int) -> Entry | None:
        """The commit with this counter, or None if there is none yet."""
        tail = await self.refresh()
        if counter >= tail.counter:
            return None
        if counter in self._recent_versions:
            return self._recent_versions[counter]
        low, high = 0, (tail.block - 1) // SEGMENT
        while low <= high:  # counters rise along the log: bisect by segment
            middle = (low + high) // 2
            blocks = await self.read_blocks(middle * SEGMENT, min((middle + 1) * SEGMENT, tail.block))
            commits = [e for block in blocks for e in block if e.kind == "commit"]
            match = next((e for e in commits if e.fields["counter"] == counter), None)
            if match is not None:
                return match
            # A segment without commits tells nothing: go by the one before.
            if not commits or counter < commits[0].fields["counter"]:
                high = middle - 1
            else:
                low = middle + 1
        raise Corrupt(f"counter {counter} is missing from the log")

    async def read_block(self, number: int) -> list[Entry]:
        """One block's entries, from the log itself. Raises: NotFound."""
        data = await retried(lambda: self._objects.get(block_key(number)), self._retry_delays)
        return parse_block(number, bytes(data))

    async def read_blocks(self, start: int, stop: int, *, end_hash: str | None = None) -> list[list[Entry]]:
        """Blocks start ... stop - 1, read concurrently, whole segments by their index where there is one.

        The last entry must have `end_hash` (that of the block in the log, if not given), and every
        entry the hash that the next one names: what an index says is taken only if it leads there.
        Raises: Corrupt if a block is missing or does not fit.
        """
        if start >= stop:
            return []
        gate = asyncio.Semaphore(_READS_AT_ONCE)
        blocks: dict[int, list[Entry]] = {}
        segments = range(-(-start // SEGMENT), stop // SEGMENT)

        async def from_log(number: int) -> None:
            async with gate:
                blocks[number] = await self._existing(number)

        async def from_index(segment: int) -> bool:
            async with gate:
                found = await self._index(segment)
            for offset, entries in enumerate(found or []):
                blocks[segment * SEGMENT + offset] = entries
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
            segment = number // SEGMENT
            if not indexed.pop(segment, False):
                reason = f"its last entry does not have the hash {expected[:12]}... that the next one names"
                raise Corrupt(f"{block_key(number)}: {reason}", ((block_key(number), reason),))
            logger.warning("%s does not fit the log and is passed over", index_key(segment))
            await asyncio.gather(*(from_log(segment * SEGMENT + offset) for offset in range(SEGMENT)))
        return [blocks[n] for n in range(start, stop)]

    async def _existing(self, number: int) -> list[Entry]:
        try:
            return await self.read_block(number)
        except NotFound:
            key, reason = block_key(number), "the block is missing"
            raise Corrupt(f"{key}: {reason}", ((key, reason),)) from None

    async def _index(self, segment: int) -> list[list[Entry]] | None:
        try:
            data = await retried(lambda: self._objects.get(index_key(segment)), self._retry_delays)
            raw = decode_index(segment, bytes(data))
            if raw is None:
                return None
            return [parse_block(segment * SEGMENT + offset, block) for offset, block in enumerate(raw)]
        except (NotFound, Corrupt):
            return None

    async def _refresh(self) -> Tail:
        if self._tail is None:
            await self._open()
        assert self._tail is not None
        step = 1
        while True:  # probe in growing windows: one request when nothing is new
            found = await asyncio.gather(*(self._probe(self._tail.block + i) for i in range(step)))
            for entries in found:
                if entries is None:
                    return self._tail
                self._advance(entries)
            step = min(step * 2, _PROBES_AT_ONCE)

    async def _open(self) -> None:
        """Find the end of the log and remember the latest commits, from the hint or from a listing."""
        end = await self._hint()
        newest = await self._probe(end) if end is not None and end >= 0 else None
        self._published = -2 if end is None else end
        if newest is None:
            # No usable hint: the log itself says where it ends. Only a readable, empty listing is new.
            keys = [info.key async for info in self._objects.list("log/") if info.key.endswith(".jsonl")]
            end = len(keys) - 1
            if keys and keys[-1] != block_key(end):
                missing = next(n for n, key in enumerate(keys) if key != block_key(n))
                raise Corrupt(f"{block_key(missing)}: the block is missing", ((block_key(missing), "missing"),))
            if not keys:
                self._tail = Tail()
                return
            newest = await self._existing(end)
        assert end is not None
        blocks, start = [newest], end
        while start > 0 and sum(e.kind == "commit" for block in blocks for e in block) < _REMEMBERED // 2:
            width = max(1, len(blocks) // SEGMENT)  # segments in growing steps
            first = max(0, (start - 1) // SEGMENT - width + 1) * SEGMENT
            blocks = await self.read_blocks(first, start, end_hash=str(blocks[0][0].fields["parent_hash"])) + blocks
            start = first
        opening = blocks[0][0]
        counter = next((int(e.fields["counter"]) for block in blocks for e in block if e.kind == "commit"), 0)
        self._tail = Tail(opening.block, opening.index, counter, str(opening.fields["parent_hash"]))
        for entries in blocks:
            self._advance(entries)

    async def _hint(self) -> int | None:
        try:
            data = await retried(lambda: self._objects.get(HEAD_KEY), self._retry_delays)
            block = orjson.loads(bytes(data))["block"]
            return block if isinstance(block, int) else None
        except (NotFound, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    async def _probe(self, number: int) -> list[Entry] | None:
        try:
            return await self.read_block(number)
        except NotFound:
            return None

    def _advance(self, entries: list[Entry]) -> None:
        assert self._tail is not None
        number = self._tail.block
        self._tail = check_after(self._tail, entries)
        self._raw[number] = b"".join(entry.line for entry in entries)
        for entry in entries:
            self._recent[entry.commit_id] = entry
            with contextlib.suppress(Corrupt):  # whoever reads what it says is told; appending goes on
                self._announcements.apply(entry)
            if entry.kind == "commit":
                self._last_version = entry
                self._recent_versions[int(entry.fields["counter"])] = entry
        while len(self._recent) > _REMEMBERED:
            _, old = self._recent.popitem(last=False)
            self._recent_versions.pop(int(old.fields.get("counter", -1)), None)
        done = number // SEGMENT * SEGMENT
        if self._indexed is not None and done // SEGMENT - 1 in self._indexed:
            self._raw = {n: raw for n, raw in self._raw.items() if n >= done}

    # --- appending ------------------------------------------------------------------------------------

    async def append(self, draft: Draft) -> Entry:
        """Append one entry, together with whatever else is waiting, and return it as stored.

        Entries of concurrent calls stand in the order of the calls. A commit_id that the recent ledger
        has already returns the entry it has. Raises: Busy when too many are waiting; Conflict if the draft names a
        checkpoint whose deletion was announced before its place in the log, unless it is `vetted`; ConfigError if
        nobody could read what the draft says.
        """
        _check_readable(draft)
        waiting = self._queued.get(draft.commit_id)
        if waiting is None:
            if len(self._queue) >= _MAX_QUEUE:
                rounds = -(-len(self._queue) // _MAX_BLOCK_ENTRIES)
                raise Busy(
                    f"{len(self._queue)} entries are waiting to be appended", retry_after=rounds * self._block_seconds
                )
            waiting = _Waiting(draft)
            self._queue.append(waiting)
            self._queued[draft.commit_id] = waiting
            if self._sequencer is None or self._sequencer.done():
                self._sequencer = asyncio.create_task(self._sequence())
        return await asyncio.shield(waiting.future)

    async def prepare(self) -> None:
        """Find the end of the log and prove that the server honours conditional writes.

        The first append does the same; calling it earlier tells before anything depends on it.
        """
        async with self._tail_lock:
            await self._refresh()
            if not self._proved:
                await self._prove_conditional_writes()
            self._publish()

    @property
    def known_head(self) -> str | None:
        """The newest version this instance has seen, without asking the server."""
        return version_id(int(self._last_version.fields["counter"])) if self._last_version else None

    @property
    def queue_depth(self) -> int:
        """Entries waiting for a block."""
        return len(self._queue)

    async def close(self) -> None:
        """Finish what was submitted, and leave the newest hint behind."""
        if self._sequencer is not None:
            await asyncio.wait({self._sequencer})
        await self.publish()

    async def publish(self) -> None:
        """Leave the newest hint behind, if this instance has written to the ledger."""
        if self._publisher is None:
            return
        self._at_once.set()
        try:
            await asyncio.wait({self._publisher})
            await self._write_derived()  # what failed a moment ago may succeed now
        finally:
            self._at_once.clear()

    async def _sequence(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _MAX_BLOCK_ENTRIES))]
            try:
                async with self._tail_lock:
                    await self._commit(batch)
            except Exception as error:
                # The outcome of the last attempt may be unknown: read the end again before going on.
                self._tail = None
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                        waiting.future.exception()  # retrieved: nobody may be waiting any more
            finally:
                for waiting in batch:
                    self._queued.pop(waiting.draft.commit_id, None)

    async def _commit(self, batch: list[_Waiting]) -> None:
        if self._tail is None:
            await self._refresh()
        if not self._proved:
            await self._prove_conditional_writes()
        rebases = 0
        while True:
            batch = self._settle_known(batch)
            if not batch:
                return
            assert self._tail is not None
            number = self._tail.block
            body = build_block(self._tail, [w.draft for w in batch])
            started = time.monotonic()
            stored = await self._create_or_read(number, body)
            self._block_seconds = 0.8 * self._block_seconds + 0.2 * (time.monotonic() - started)
            self._advance(parse_block(number, stored))
            self._publish()
            if stored != body:  # another writer has this number: go on behind it
                rebases += 1
                if rebases > 3:
                    await asyncio.sleep(random.uniform(0, 0.02 * min(rebases, 25)))

    def _settle_known(self, batch: list[_Waiting]) -> list[_Waiting]:
        left = []
        for waiting in batch:
            entry = self._recent.get(waiting.draft.commit_id)
            if entry is None:
                left.append(waiting)
            elif not waiting.future.done():
                waiting.future.set_result(entry)
        return [waiting for waiting in left if not self._is_collected(waiting)]

    def _is_collected(self, waiting: _Waiting) -> bool:
        content_hash = waiting.draft.payload.get("content_hash")
        if waiting.draft.vetted or content_hash not in self._announcements:
            return False
        if not waiting.future.done():
            waiting.future.set_exception(Conflict(f"{blob_key(str(content_hash))} is being collected"))
            waiting.future.exception()  # retrieved: nobody may be waiting any more
        return True

    async def _create_or_read(self, number: int, body: bytes) -> bytes:
        """Create block `number`, or find what is there: ours, if it equals `body`, or another writer's."""
        key = block_key(number)
        delays = iter(self._retry_delays)
        while True:
            try:
                await self._objects.create(key, body)
                return body
            except Conflict:
                return bytes(await retried(lambda: self._objects.get(key), self._retry_delays))
            except Unavailable as error:
                # It may have been applied, so look before trying again. A repeat of the same bytes is safe
                # whichever way it went.
                try:
                    return bytes(await self._objects.get(key))
                except (NotFound, Unavailable):
                    delay = next(delays, None)
                    if delay is None:
                        raise error from None
                    await asyncio.sleep(delay)

    async def _prove_conditional_writes(self) -> None:
        """Once per writer: a second create of the same key must be refused.

        The key is the head hint's, where a server that overwrites all the same does no harm.
        """
        for _ in range(2):
            try:
                await retried(lambda: self._objects.create(HEAD_KEY, self._head_hint()), self._retry_delays)
            except Conflict:
                self._proved = True
                return
        raise ConfigError(
            "the storage server does not honour If-None-Match: two conditional writes of one key both "
            "succeeded. A ledger needs it to keep its order; AWS S3, SeaweedFS and MinIO honour it"
        )

    # --- what is derived from the log -----------------------------------------------------------------

    def _publish(self) -> None:
        """Bring head.json and the indexes up to date, beside the acknowledgements and never in their way."""
        if self._publisher is None or self._publisher.done():
            self._publisher = asyncio.create_task(self._write_derived())

    def _derived_is_behind(self) -> bool:
        if self._tail is None:
            return False
        whole = self._tail.block // SEGMENT
        return self._published != self._tail.block - 1 or (whole > 0 and len(self._indexed or ()) < whole)

    async def _write_derived(self) -> None:
        try:
            while self._tail is not None and self._derived_is_behind():
                block, hint = self._tail.block - 1, self._head_hint()
                if self._published != block:
                    await retried(partial(self._objects.put, HEAD_KEY, hint), self._retry_delays)
                    self._published = block
                await self._write_indexes((block + 1) // SEGMENT)
                with contextlib.suppress(TimeoutError):  # under load one hint stands for many blocks
                    await asyncio.wait_for(self._at_once.wait(), _HINT_INTERVAL)
                # Of two writers' hints the older may arrive last. Whoever wrote last looks again, so the one
                # that stays is the newest.
                if self._tail is not None and self._tail.block - 1 == block and await self._probe(block + 1):
                    await self.refresh()
        except Corrupt as error:  # of the log, which was read to see whether the hint is the newest
            logger.error("%s", error)
        except (StorageError, ConfigError) as error:
            logger.info("head.json or an index not updated, readers do without: %s", error)

    async def _write_indexes(self, whole_segments: int) -> None:
        if whole_segments == 0:
            return
        if self._indexed is None:
            found = [info.key async for info in self._objects.list("index/")]
            self._indexed = {k for k in range(whole_segments) if index_key(k) in found}
        for segment in set(range(whole_segments)) - self._indexed:
            numbers = range(segment * SEGMENT, (segment + 1) * SEGMENT)
            if not all(n in self._raw for n in numbers):
                blocks = await self.read_blocks(numbers.start, numbers.stop)
                self._raw |= {n: b"".join(e.line for e in block) for n, block in zip(numbers, blocks, strict=True)}
            index = encode_index(segment, [self._raw[n] for n in numbers])
            await retried(partial(self._objects.put, index_key(segment), index), self._retry_delays)
            self._indexed.add(segment)
            for number in numbers:
                self._raw.pop(number, None)

    def _head_hint(self) -> bytes:
        tail = self._tail or Tail()
        return orjson.dumps({"block": tail.block - 1, "index": tail.index - 1, "hash": tail.parent_hash})


def _check_readable(draft: Draft) -> None:
    """An entry stays for ever, so one that readers refuse must not be written."""
    try:
        (entry,) = parse_block(0, build_block(Tail(), [draft]))
        if entry.kind != "spare":  # of an index that it does not have yet
            entry.check()
    except (Corrupt, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{block_key(0)}: entry 0: ").removeprefix(f"{block_key(0)}: ")
        raise ConfigError(f"a {draft.kind} entry that nobody could read: {reason}") from None


def _linked(entries: Sequence[Entry]) -> bool:
    return all(after.fields["parent_hash"] == before.hash for before, after in pairwise(entries))
