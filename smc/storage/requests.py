"""Time limits and retries of requests to an object store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

from smc.errors import Busy, Unavailable
from smc.storage.objects import Body, ObjectInfo, ObjectStore

__all__ = ["RETRY_DELAYS", "TimedObjects", "retried"]

RETRY_DELAYS: Final = (1.0, 2.0, 4.0)
# A transfer slower than this, in bytes per second, has stalled.
_SLOWEST = 256 * 1024

logger = logging.getLogger("smc.storage")
T = TypeVar("T")


async def retried(request: Callable[[], Awaitable[T]], delays: Sequence[float] = RETRY_DELAYS) -> T:
    """The request's result, tried again after each delay while it is Unavailable.

    Raises: Unavailable when the delays are used up; anything else, and Busy, at once.
    """
    for delay in delays:
        try:
            return await request()
        except Busy:
            raise
        except Unavailable as error:
            logger.info("%s; again in %g s", error, delay)
            await asyncio.sleep(delay)
    return await request()


class TimedObjects:
    """An object store whose requests end: Unavailable after `timeout` seconds, more for large bodies."""

    def __init__(self, inner: ObjectStore, timeout: float = 30.0) -> None:
        self._inner, self._timeout = inner, timeout

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes | bytearray:
        return await self._limited(self._inner.get(key, size, on_bytes), key, size or 0)

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        return await self._limited(self._inner.get_range(key, start, stop), key, stop - start)

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        return await self._limited(self._inner.get_if_changed(key, etag), key, 0)

    async def put(self, key: str, data: Body) -> None:
        await self._limited(self._inner.put(key, data), key, len(data))

    async def create(self, key: str, data: Body) -> None:
        await self._limited(self._inner.create(key, data), key, len(data))

    async def stat(self, key: str) -> ObjectInfo:
        return await self._limited(self._inner.stat(key), key, 0)

    async def delete(self, key: str) -> bool:
        return await self._limited(self._inner.delete(key), key, 0)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        pages = self._inner.list(prefix)
        while True:
            try:
                yield await self._limited(anext(pages), prefix, 0)
            except StopAsyncIteration:
                return

    async def _limited(self, request: Awaitable[T], key: str, size: int) -> T:
        limit = self._timeout + size / _SLOWEST
        try:
            async with asyncio.timeout(limit):
                return await request
        except TimeoutError:
            raise Unavailable(f"{key}: no answer within {limit:.3g} s") from None
