"""The append pipeline: one writer's view of the log, kept correct by conditional creates.

Block n is committed by whoever creates it. Everything here follows from that: group commit, rebasing on
another writer's block, telling an own write that went through from somebody else's, and never taking a
failure to read for an empty ledger. Plain asyncio; one instance serves one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import orjson

from smc.errors import Busy, ConfigError, Conflict, Corrupt, NotFound, StorageError, Unavailable
from smc.storage.chain import Draft, Entry, Tail, block_key, build_block, check_after, parse_block
from smc.storage.objects import ObjectStore

__all__ = ["RETRY_DELAYS", "Ledger"]

RETRY_DELAYS: Final = (1.0, 2.0, 4.0)
REMEMBERED_COMMITS: Final = 4096
HEAD_KEY: Final = "head.json"
_PROBE_KEY: Final = ".conditional-write-probe"
_READ_AHEAD = 16
_MAX_BLOCK_ENTRIES = 256
_MAX_QUEUE = 4096

logger = logging.getLogger("smc.ledger")
T = TypeVar("T")


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
        self._queue: deque[_Waiting] = deque()
        self._queued: dict[str, _Waiting] = {}
        self._sequencer: asyncio.Task[None] | None = None
        self._publisher: asyncio.Task[None] | None = None
        self._tail_lock = asyncio.Lock()
        self._proved = False

    # --- reading --------------------------------------------------------------------------------------

    async def refresh(self) -> Tail:
        """Read what others appended since; the tail is then the log's end as of some moment in the call."""
        async with self._tail_lock:
            return await self._refresh()

    async def newest_version(self) -> Entry | None:
        """The last commit of the log, or None."""
        await self.refresh()
        return self._last_version

    async def read_block(self, number: int) -> list[Entry]:
        """One block's entries. Raises: NotFound."""
        return parse_block(number, await self._retried(lambda: self._objects.get(block_key(number))))

    async def read_blocks(self, start: int, stop: int) -> list[list[Entry]]:
        """Blocks start ... stop - 1, read concurrently. Raises: Corrupt if one is missing."""
        gate = asyncio.Semaphore(_READ_AHEAD * 2)

        async def one(number: int) -> list[Entry]:
            async with gate:
                try:
                    return await self.read_block(number)
                except NotFound:
                    key, reason = block_key(number), "the block is missing"
                    raise Corrupt(f"{key}: {reason}", ((key, reason),)) from None

        return list(await asyncio.gather(*(one(n) for n in range(start, stop))))

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
            step = min(step * 2, _READ_AHEAD)

    async def _open(self) -> None:
        """Find the end of the log and remember the latest commits, from the hint or from a listing."""
        hint = await self._hint()
        if hint is None or await self._probe(hint) is None:
            # No usable hint: the log itself says where it ends. Only a readable, empty listing is new.
            numbers = [info.key async for info in self._objects.list("log/") if info.key.endswith(".jsonl")]
            hint = len(numbers) - 1
            if numbers and numbers[-1] != block_key(hint):
                missing = next(n for n, key in enumerate(numbers) if key != block_key(n))
                raise Corrupt(f"{block_key(missing)}: the block is missing", ((block_key(missing), "missing"),))
        if hint < 0:
            self._tail = Tail()
            return
        blocks: list[list[Entry]] = []
        start = hint + 1
        while start > 0 and sum(e.kind == "commit" for b in blocks for e in b) < REMEMBERED_COMMITS // 2:
            first = max(0, start - max(_READ_AHEAD, len(blocks)))
            blocks = await self.read_blocks(first, start) + blocks
            start = first
        counter = next((int(e.fields["counter"]) for b in blocks for e in b if e.kind == "commit"), 0)
        opening = blocks[0][0]
        self._tail = Tail(opening.block, opening.index, counter, str(opening.fields["parent_hash"]))
        for entries in blocks:
            self._advance(entries)

    async def _hint(self) -> int | None:
        try:
            fields = orjson.loads(await self._retried(lambda: self._objects.get(HEAD_KEY)))
            block = fields["block"]
            return block if isinstance(block, int) and block >= 0 else None
        except (NotFound, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    async def _probe(self, number: int) -> list[Entry] | None:
        try:
            return await self.read_block(number)
        except NotFound:
            return None

    def _advance(self, entries: list[Entry]) -> None:
        assert self._tail is not None
        self._tail = check_after(self._tail, entries)
        for entry in entries:
            self._recent[entry.commit_id] = entry
            if entry.kind == "commit":
                self._last_version = entry
        while len(self._recent) > REMEMBERED_COMMITS:
            self._recent.popitem(last=False)

    # --- appending ------------------------------------------------------------------------------------

    async def append(self, draft: Draft) -> Entry:
        """Append one entry, together with whatever else is waiting, and return it as stored.

        Entries of concurrent calls stand in the order of the calls. A commit_id that the recent ledger
        has already returns the entry it has. Raises: Busy when too many are waiting.
        """
        waiting = self._queued.get(draft.commit_id)
        if waiting is None:
            if len(self._queue) >= _MAX_QUEUE:
                raise Busy(f"{len(self._queue)} entries are waiting to be appended", retry_after=1.0)
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

    @property
    def queue_depth(self) -> int:
        """Entries waiting for a block."""
        return len(self._queue)

    async def close(self) -> None:
        """Finish what was submitted, and leave the newest hint behind."""
        for task in (self._sequencer, self._publisher):
            if task is not None:
                await asyncio.wait({task})

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
            stored = await self._create_or_read(number, body)
            self._advance(parse_block(number, stored))
            self._publish_head()
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
        return left

    async def _create_or_read(self, number: int, body: bytes) -> bytes:
        """Create block `number`, or find what is there: ours, if it equals `body`, or another writer's."""
        key = block_key(number)
        delays = iter(self._retry_delays)
        while True:
            try:
                await self._objects.create(key, body)
                return body
            except Conflict:
                return await self._retried(lambda: self._objects.get(key))
            except Unavailable as error:
                # It may have been applied, so look before trying again. A repeat of the same bytes is safe
                # whichever way it went.
                try:
                    return await self._objects.get(key)
                except (NotFound, Unavailable):
                    delay = next(delays, None)
                    if delay is None:
                        raise error from None
                    await asyncio.sleep(delay)

    async def _retried(self, request: Callable[[], Awaitable[T]]) -> T:
        for delay in self._retry_delays:
            try:
                return await request()
            except Unavailable as error:
                logger.info("%s; again in %g s", error, delay)
                await asyncio.sleep(delay)
        return await request()

    async def _prove_conditional_writes(self) -> None:
        """Once per writer: a second create of the same key must be refused."""
        for _ in range(2):
            try:
                await self._retried(lambda: self._objects.create(_PROBE_KEY, b"spectralmc\n"))
            except Conflict:
                self._proved = True
                return
        raise ConfigError(
            "the storage server does not honour If-None-Match: two conditional writes of one key both "
            "succeeded. A ledger needs it to keep its order; AWS S3, SeaweedFS and MinIO honour it"
        )

    def _publish_head(self) -> None:
        if self._publisher is None or self._publisher.done():
            self._publisher = asyncio.create_task(self._write_heads())

    async def _write_heads(self) -> None:
        written = -1
        while self._tail is not None and (block := self._tail.block - 1) > written:
            hint = {"block": block, "index": self._tail.index - 1, "hash": self._tail.parent_hash}
            try:
                await self._objects.put(HEAD_KEY, orjson.dumps(hint))
            except (StorageError, ConfigError) as error:
                logger.info("head.json not updated, readers probe instead: %s", error)
                return
            written = block
