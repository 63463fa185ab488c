"""How much may be on its way to the server at a time, and what is told to whoever wants more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from smc.errors import Busy

__all__ = ["UploadBudget"]


class UploadBudget:
    """At most `max_count` uploads and `max_bytes` bytes at a time, first come first served.

    One upload larger than `max_bytes` may go alone. Up to `max_waiting` wait for their turn; the next is
    told Busy, with a delay after which it may well have one.
    """

    def __init__(self, *, max_count: int = 64, max_bytes: int = 2 * 2**30, max_waiting: int = 1024) -> None:
        self._max_count, self._max_bytes, self._max_waiting = max_count, max_bytes, max_waiting
        self._count = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.bytes_in_flight = 0
        self._seconds = 0.1  # of a recent upload

    @asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[None]:
        """Wait for room for one upload of this size, and hold it. Raises: Busy."""
        loop = asyncio.get_running_loop()
        if self._waiting or not self._fits(size):
            if len(self._waiting) >= self._max_waiting:
                wait = self._seconds * (1 + len(self._waiting) / self._max_count)
                raise Busy(f"{len(self._waiting)} uploads are waiting", retry_after=wait)
            turn = loop.create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release(size)
                else:
                    with suppress(ValueError):
                        self._waiting.remove((size, turn))
                raise
        else:
            self._take(size)
        started = loop.time()
        try:
            yield
        finally:
            self._seconds = 0.8 * self._seconds + 0.2 * (loop.time() - started)
            self._release(size)

    def _fits(self, size: int) -> bool:
        return self._count == 0 or (self._count < self._max_count and self.bytes_in_flight + size <= self._max_bytes)

    def _take(self, size: int) -> None:
        self._count += 1
        self.bytes_in_flight += size

    def _release(self, size: int) -> None:
        self._count -= 1
        self.bytes_in_flight -= size
        while self._waiting and self._fits(self._waiting[0][0]):
            waiting, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(waiting)
                turn.set_result(None)
