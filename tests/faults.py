"""An object store whose requests fail as they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from smc.errors import Unavailable
from smc.storage.objects import ObjectInfo, ObjectStore

FAULTS = ("fails", "applied", "hangs", "hangs-applied", "truncated", "crash-before", "crash-after")


class Crash(BaseException):
    """The process is gone: nothing after this line of it runs."""


class FaultStore:
    """Wraps any object store. `plan(call, operation, key)` names a fault for a request, or None.

    `fails` answers 503; `applied` does the work and then resets the connection; `hangs` never answers,
    `hangs-applied` neither, after doing the work; `truncated` breaks off half way; `crash-*` ends the process.
    """

    def __init__(self, inner: ObjectStore, plan: Callable[[int, str, str], str | None]) -> None:
        self.inner, self.plan = inner, plan
        self.calls = 0
        self.log: list[tuple[str, str]] = []
        self.crashed = asyncio.Event()

    async def _do(self, operation: str, key: str, *arguments: Any) -> Any:
        if self.crashed.is_set():
            raise Crash
        call, self.calls = self.calls, self.calls + 1
        self.log.append((operation, key))
        fault = self.plan(call, operation, key)
        if fault == "fails":
            raise Unavailable(f"{key}: 503 Service Unavailable")
        if fault == "crash-before":
            self.crashed.set()
            raise Crash
        if fault == "hangs":
            await asyncio.sleep(3600)
        result = None
        # A body that breaks off is not stored; a listing is done by the caller.
        if operation != "list" and (fault != "truncated" or operation.startswith("get")):
            result = await getattr(self.inner, operation)(key, *arguments)
        if fault in ("applied", "truncated"):
            raise Unavailable(f"{key}: connection reset")
        if fault == "crash-after":
            self.crashed.set()
            raise Crash
        if fault == "hangs-applied":
            await asyncio.sleep(3600)
        return result

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes | bytearray:
        result: bytes = await self._do("get", key, size, on_bytes)
        return result

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        result: bytes = await self._do("get_range", key, start, stop)
        return result

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        result: tuple[bytes, str] | None = await self._do("get_if_changed", key, etag)
        return result

    async def put(self, key: str, data: bytes | bytearray) -> None:
        await self._do("put", key, data)

    async def create(self, key: str, data: bytes) -> None:
        await self._do("create", key, data)

    async def stat(self, key: str) -> ObjectInfo:
        result: ObjectInfo = await self._do("stat", key)
        return result

    async def delete(self, key: str) -> None:
        await self._do("delete", key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await self._do("list", prefix)
        async for info in self.inner.list(prefix):
            yield info
