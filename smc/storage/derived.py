"""What a writer derives from the log, for readers to start from: head.json, and indexes that repeat blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import orjson

from smc.errors import ConfigError, Corrupt, StorageError
from smc.storage.chain import Tail
from smc.storage.index import encode_index, index_key
from smc.storage.limits import LIMITS
from smc.storage.log import HEAD_KEY, Log
from smc.storage.objects import ObjectStore
from smc.storage.reader import LogReader
from smc.storage.requests import retried

__all__ = ["Derived", "head_hint"]

_HINT_INTERVAL = 1.0  # seconds: a hint for every block would be a third of the requests

logger = logging.getLogger("smc.storage")


def head_hint(tail: Tail | None) -> bytes:
    """What head.json says of a log that ends there."""
    tail = tail or Tail()
    return orjson.dumps({"block": tail.block - 1, "index": tail.index - 1, "hash": tail.parent_hash})


class Derived:
    """Keeps what is derived from the log up to date with what `reader` knows of it; `refresh` reads on.

    Whatever fails here is logged and tried again: readers do without.
    """

    def __init__(
        self,
        objects: ObjectStore,
        log: Log,
        reader: LogReader,
        *,
        refresh: Callable[[], Awaitable[Tail]],
        retry_delays: Sequence[float],
    ) -> None:
        self._objects, self._log, self._reader = objects, log, reader
        self._refresh, self._retry_delays = refresh, tuple(retry_delays)
        self._indexed: set[int] | None = None
        self._published: int | None = None
        self._publisher: asyncio.Task[None] | None = None
        self._at_once = asyncio.Event()  # hints do not wait

    def publish(self) -> None:
        """Bring head.json and the indexes up to date, beside the acknowledgements and never in their way."""
        if self._is_behind() and (self._publisher is None or self._publisher.done()):
            self._publisher = asyncio.create_task(self._write())

    async def settle(self) -> None:
        """Leave the newest hint behind now, if anything was to be written since this instance reads the log."""
        if self._publisher is None:
            return
        self._at_once.set()
        try:
            await asyncio.wait({self._publisher})
            await self._write()  # what failed a moment ago may succeed now
        finally:
            self._at_once.clear()

    def _is_behind(self) -> bool:
        tail = self._reader.tail
        if tail is None:
            return False
        indexed = (self._indexed or set()) - self._log.wrong_indexes
        return self._hinted() != tail.block - 1 or len(indexed) < tail.block // LIMITS.segment

    def _hinted(self) -> int | None:
        """The block that head.json names, as far as this instance knows."""
        return self._reader.hinted if self._published is None else self._published

    async def _write(self) -> None:
        try:
            while (tail := self._reader.tail) is not None and self._is_behind():
                block, hint = tail.block - 1, head_hint(tail)
                if self._hinted() != block:
                    await retried(partial(self._objects.put, HEAD_KEY, hint), self._retry_delays)
                    self._published = block
                await self._write_indexes((block + 1) // LIMITS.segment)
                with contextlib.suppress(TimeoutError):  # under load one hint stands for many blocks
                    await asyncio.wait_for(self._at_once.wait(), _HINT_INTERVAL)
                # Of two writers' hints the older may arrive last. Whoever wrote last looks again, so the one
                # that stays is the newest.
                tail = self._reader.tail
                if tail is not None and tail.block - 1 == block and await self._log.probe(block + 1):
                    await self._refresh()
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
        # One that is there and wrong is made again like one that is missing.
        self._indexed -= self._log.wrong_indexes
        raw = self._reader.raw
        for segment in set(range(whole_segments)) - self._indexed:
            numbers = range(segment * LIMITS.segment, (segment + 1) * LIMITS.segment)
            texts = [raw[n] for n in numbers if n in raw]
            if len(texts) < LIMITS.segment:
                blocks = await self._log.read_blocks(numbers.start, numbers.stop)
                texts = [b"".join(entry.line for entry in block) for block in blocks]
            await retried(
                partial(self._objects.put, index_key(segment), encode_index(segment, texts)), self._retry_delays
            )
            self._indexed.add(segment)
            self._log.wrong_indexes.discard(segment)
