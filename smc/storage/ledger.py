"""The append pipeline: one writer's view of the log, kept correct by conditional creates.

Block n is committed by whoever creates it. Everything here follows from that: group commit, rebasing on
another writer's blocks, telling an own write that went through from somebody else's, and never taking a
failure to read for an empty ledger. Plain asyncio; one instance serves one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from smc.errors import Busy, ConfigError, Conflict, Corrupt, NotFound, Unavailable
from smc.storage.chain import (
    LARGEST_BLOCK,
    LARGEST_ENTRY,
    Draft,
    Entry,
    Tail,
    blob_key,
    block_key,
    build_block,
    parse_block,
    version_id,
)
from smc.storage.derived import Derived, head_hint
from smc.storage.log import HEAD_KEY, Log
from smc.storage.objects import ObjectStore
from smc.storage.reader import LogReader
from smc.storage.requests import RETRY_DELAYS, retried
from smc.storage.turns import Turns

__all__ = ["HEAD_KEY", "Ledger"]

_MAX_BLOCK_ENTRIES: Final = 256
_MAX_QUEUE: Final = 4096
# The numbers that an entry gets with its place have more digits than those of the first entry.
_ROOM_FOR_NUMBERS: Final = 64

logger = logging.getLogger("smc.storage")


@dataclass
class _Waiting:
    draft: Draft
    size: int
    future: asyncio.Future[Entry] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # It counts as retrieved, because nobody may be waiting any more.


class Ledger:
    """Reads the log forward and appends to it.

    A draft that is `vetted` counts as such for `vetted_seconds`. Raises, from every method: ConfigError, Corrupt, and
    Unavailable once retries after `retry_delays` seconds are used up.
    """

    def __init__(
        self,
        objects: ObjectStore,
        *,
        retry_delays: Sequence[float] = RETRY_DELAYS,
        vetted_seconds: float = 30.0,
    ) -> None:
        self._objects = objects
        self._retry_delays = tuple(retry_delays)
        self._vetted_seconds = vetted_seconds
        self._log = Log(objects, retry_delays)
        self._reader = LogReader(objects, self._log)
        self._turns = Turns(objects)
        self._derived = Derived(objects, self._log, self._reader, refresh=self.refresh, retry_delays=self._retry_delays)
        self._lock = asyncio.Lock()
        self._stale = False  # the outcome of the last append is unknown
        self._forgotten = False  # also what was read before the log contradicted it
        self._queue: deque[_Waiting] = deque()
        self._queued: dict[str, _Waiting] = {}
        self._sequencer: asyncio.Task[None] | None = None
        self._proved = False
        self._block_seconds = 0.05

    # --- reading --------------------------------------------------------------------------------------

    async def refresh(self) -> Tail:
        """Read what others appended since; the tail is then the log's end as of some moment in the call."""
        async with self._lock:
            return await self._reader.refresh()

    async def is_there(self) -> bool:
        """Whether anybody has written here, or prepared to."""
        tail = await self.refresh()
        return tail.block > 0 or self._reader.hinted is not None

    async def newest_version(self) -> Entry | None:
        """The last commit of the log, or None."""
        await self.refresh()
        return self._reader.last_version

    async def find_version(self, counter: int) -> Entry | None:
        """The commit with this counter, or None if there is none yet."""
        async with self._lock:
            return await self._reader.find_version(counter)

    async def find(self, commit_id: str) -> Entry | None:
        """The entry with this id, however old it is, or None."""
        async with self._lock:
            await self._reader.refresh()
            await self._reader.know_all_ids()
            return await self._reader.known(commit_id)

    async def read_block(self, number: int) -> list[Entry]:
        """One block's entries, from the log itself. Raises: NotFound."""
        return await self._log.read_block(number)

    async def read_blocks(self, start: int, stop: int, *, end_hash: str | None = None) -> list[list[Entry]]:
        """As `Log.read_blocks`; the newest blocks, which this instance has just read, are not read again."""
        recent = self._reader.recent_blocks(start, stop)
        if not recent or (end_hash is not None and recent[-1][-1].hash != end_hash):
            return await self._log.read_blocks(start, stop, end_hash=end_hash)
        before = str(recent[0][0].fields["parent_hash"])
        return await self._log.read_blocks(start, stop - len(recent), end_hash=before) + recent

    # --- appending ------------------------------------------------------------------------------------

    async def append(self, draft: Draft) -> Entry:
        """Append one entry, together with whatever else is waiting, and return it as stored.

        Entries of concurrent calls stand in the order of the calls. A commit_id that the ledger has already returns
        the entry it has, however old that is. Raises: Busy when too many are waiting; Conflict if the draft names a
        checkpoint whose deletion was announced before its place in the log, unless it is `vetted`; ConfigError if
        nobody could read what the draft says, if it is too large, or if its commit_id names another checkpoint.
        """
        size = _size_of(draft)
        waiting = self._queued.get(draft.commit_id)
        if waiting is not None:
            _check_same(draft, waiting.draft.payload, "another entry that is being appended")
        else:
            if len(self._queue) >= _MAX_QUEUE:
                rounds = -(-len(self._queue) // _MAX_BLOCK_ENTRIES)
                raise Busy(
                    f"{len(self._queue)} entries are waiting to be appended", retry_after=rounds * self._block_seconds
                )
            waiting = _Waiting(draft, size)
            self._queue.append(waiting)
            self._queued[draft.commit_id] = waiting
            if self._sequencer is None or self._sequencer.done():
                self._sequencer = asyncio.create_task(self._sequence())
        return await asyncio.shield(waiting.future)

    async def prepare(self) -> None:
        """Find the end of the log and prove that the server honours conditional writes.

        The first append does the same; calling it earlier tells before anything depends on it.
        """
        async with self._lock:
            await self._reader.refresh()
            if not self._proved:
                await self._prove_conditional_writes()
            self._derived.publish()

    @property
    def known_head(self) -> str | None:
        """The newest version this instance has seen, without asking the server."""
        version = self._reader.last_version
        counter = version.counter if version else None
        return None if counter is None else version_id(counter)

    @property
    def collector_seconds(self) -> float:
        """How long a request of a collector whose announcement this instance has read may take."""
        return self._reader.announcements.request_seconds

    @property
    def queue_depth(self) -> int:
        """Entries waiting for a block."""
        return len(self._queue)

    async def close(self) -> None:
        """Finish what was submitted, and leave the newest hint behind."""
        if self._sequencer is not None:
            await asyncio.wait({self._sequencer})
        self._turns.close()
        await self.publish()

    async def publish(self) -> None:
        """Leave the newest hint behind, if this instance has written to the ledger."""
        await self._derived.settle()

    async def _sequence(self) -> None:
        while self._queue:
            batch = [self._queue.popleft()]
            size = batch[0].size
            while self._queue and len(batch) < _MAX_BLOCK_ENTRIES and size + self._queue[0].size <= LARGEST_BLOCK:
                batch.append(self._queue.popleft())
                size += batch[-1].size
            try:
                async with self._lock:
                    await self._commit(batch)
            except Exception as error:
                # What was read stays true, but the outcome of the last attempt may be unknown. A log that contradicts
                # what was read is read anew, as far as it is there.
                self._stale = True
                if isinstance(error, Corrupt):
                    self._reader.forget()
                    self._forgotten = True
                for waiting in batch:
                    waiting.fail(error)
            finally:
                for waiting in batch:
                    self._queued.pop(waiting.draft.commit_id, None)

    async def _commit(self, batch: list[_Waiting]) -> None:
        reader = self._reader
        if reader.tail is None or self._stale:
            await reader.refresh()
            self._stale = False
        if not self._proved:
            await self._prove_conditional_writes()
        # Only an id that was made since this instance reads the log cannot be in what it has not read.
        if self._forgotten or not all(waiting.draft.fresh for waiting in batch):
            await reader.know_all_ids()
            self._forgotten = False
        await reader.know_announcements()
        overtaken, begun = 0, time.monotonic()
        while True:
            batch = await self._settle_known(batch)
            if not batch:
                self._derived.publish()  # the writer of what was known already may have died before it did
                return
            if await self._turns.leave_room(self._block_seconds):
                await reader.refresh()
                continue
            tail = reader.tail
            assert tail is not None
            body = build_block(tail, [w.draft for w in batch])
            started = time.monotonic()
            stored = await self._create_or_read(tail.block, body)
            self._block_seconds = 0.8 * self._block_seconds + 0.2 * (time.monotonic() - started)
            reader.advance(parse_block(tail.block, stored))
            self._derived.publish()
            if stored == body:
                self._turns.appended()
                continue
            overtaken += 1  # another writer has this number: go on behind it, and behind what it wrote since
            seconds, begun = time.monotonic() - begun, time.monotonic()
            await self._turns.overtaken(overtaken, seconds)
            await reader.refresh()
            if overtaken > 1:
                await asyncio.sleep(random.uniform(0.0, min(self._block_seconds, 0.1)))

    async def _settle_known(self, batch: list[_Waiting]) -> list[_Waiting]:
        left = []
        for waiting in batch:
            entry = await self._reader.known(waiting.draft.commit_id)
            if entry is None:
                left.append(waiting)
            elif not waiting.future.done():
                try:
                    _check_same(waiting.draft, entry.fields, f"entry {entry.index}")
                    waiting.future.set_result(entry)
                except ConfigError as error:
                    waiting.fail(error)
        return [waiting for waiting in left if not self._is_collected(waiting)]

    def _is_collected(self, waiting: _Waiting) -> bool:
        content_hash, vetted = waiting.draft.payload.get("content_hash"), waiting.draft.vetted
        if content_hash not in self._reader.announcements or (vetted and vetted.seconds < self._vetted_seconds):
            return False
        waiting.fail(Conflict(f"{blob_key(str(content_hash))} is being collected"))
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
                await retried(lambda: self._objects.create(HEAD_KEY, head_hint(self._reader.tail)), self._retry_delays)
            except Conflict:
                self._proved = True
                return
        raise ConfigError(
            "the storage server does not honour If-None-Match: two conditional writes of one key both "
            "succeeded. A ledger needs it to keep its order; AWS S3, SeaweedFS and MinIO honour it"
        )


def _size_of(draft: Draft) -> int:
    """How many bytes an entry will have at most.

    An entry stays for ever. Raises: ConfigError if it is too large, or if readers would refuse it.
    """
    try:
        line = build_block(Tail(), [draft])
        (entry,) = parse_block(0, line)
        if entry.kind != "spare":  # of an index that it does not have yet
            entry.check()
    except (Corrupt, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{block_key(0)}: entry 0: ").removeprefix(f"{block_key(0)}: ")
        raise ConfigError(f"a {draft.kind} entry that nobody could read: {reason}") from None
    size = len(line) + _ROOM_FOR_NUMBERS
    if size > LARGEST_ENTRY:
        name, value = max(draft.payload.items(), key=lambda item: len(orjson.dumps(item[1])))
        raise ConfigError(
            f"a {draft.kind} entry of {size:,} bytes: {LARGEST_ENTRY:,} are allowed; its largest field, {name}, "
            f"has {len(orjson.dumps(value)):,}"
        )
    return size


def _check_same(draft: Draft, fields: Mapping[str, Any], where: str) -> None:
    """Raises: ConfigError if an id that is known was given to another checkpoint."""
    ours, theirs = draft.payload.get("content_hash"), fields.get("content_hash")
    if ours is not None and ours != theirs:
        raise ConfigError(
            f"commit_id {draft.commit_id!r} belongs to {where}, which names {blob_key(str(theirs))} and not "
            f"{blob_key(str(ours))}: an id is for one checkpoint"
        )
