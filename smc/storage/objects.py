"""The seam between the ledger and whatever stores its objects: eight operations, one exception tree."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from smc.errors import Conflict, NotFound

__all__ = ["Body", "MemoryObjectStore", "ObjectInfo", "ObjectStore"]

Body = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object without sending it."""

    key: str
    size: int
    modified: datetime
    etag: str | None = None  # MD5 of the bytes as the server states it, where it does


class ObjectStore(Protocol):
    """Keys are relative to the ledger's prefix. Any operation may raise Unavailable or ConfigError.

    After Unavailable it is unknown whether a write took effect.
    """

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes | bytearray:
        """The object's bytes; with its size known, a large one comes in parallel ranges. Raises: NotFound.

        `on_bytes` is given them all, in order, while the rest arrives: the place for a hash.
        """
        ...

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes from `start` to before `stop`; fewer where the object ends before. Raises: NotFound."""
        ...

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """The object and its ETag, or None if that is `etag` (`If-None-Match`). Raises: NotFound."""
        ...

    async def put(self, key: str, data: Body) -> None:
        """Write or overwrite; a large body goes in parallel parts and appears as a whole or not at all."""
        ...

    async def create(self, key: str, data: Body) -> None:
        """Write only if there is nothing (`If-None-Match: *`), large bodies as `put`. Raises: Conflict if there is."""
        ...

    async def stat(self, key: str) -> ObjectInfo:
        """Size and time. Raises: NotFound."""
        ...

    async def delete(self, key: str) -> bool:
        """Remove; no error if it is not there. -> False if the server only hid it and keeps its earlier versions."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in key order."""
        ...


class MemoryObjectStore:
    """Objects in a dict, for tests and dry runs. Shared by every event loop that uses it."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes:
        await asyncio.sleep(0)
        if key not in self.objects:
            raise NotFound(f"no object {key}")
        data = self.objects[key][0]
        if on_bytes is not None:
            on_bytes(memoryview(data))
        return data

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        return (await self.get(key))[start:stop]

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        data = await self.get(key)
        now = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return None if now == etag else (data, now)

    async def put(self, key: str, data: Body) -> None:
        await asyncio.sleep(0)
        self.objects[key] = (bytes(memoryview(data)), datetime.now(UTC))

    async def create(self, key: str, data: Body) -> None:
        await asyncio.sleep(0)
        # Copied: what orjson returns lies in a buffer of kilobytes, whatever its length.
        value = (bytes(memoryview(data)), datetime.now(UTC))
        if self.objects.setdefault(key, value) is not value:
            raise Conflict(f"object {key} exists")

    async def stat(self, key: str) -> ObjectInfo:
        await asyncio.sleep(0)
        if key not in self.objects:
            raise NotFound(f"no object {key}")
        return self._info(key)

    async def delete(self, key: str) -> bool:
        await asyncio.sleep(0)
        self.objects.pop(key, None)
        return True

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await asyncio.sleep(0)
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield self._info(key)

    def _info(self, key: str) -> ObjectInfo:
        data, modified = self.objects[key]
        return ObjectInfo(key, len(data), modified, hashlib.md5(data, usedforsecurity=False).hexdigest())
