"""The process that uploads a trainer's checkpoints, and a connection that takes renewed credentials."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import ray

from smc.errors import AccessDenied
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["Connection", "RemoteUploadActor", "UploadActor"]

T = TypeVar("T")


class Connection:
    """A store, opened when it is first asked for: a constructor cannot await, and many first calls come at once."""

    def __init__(self, uri: str, endpoint_url: str | None) -> None:
        self._uri, self._endpoint_url = uri, endpoint_url
        self.store: AsyncBlockchainModelStore | None = None
        self._opening = asyncio.Lock()
        self._calls: Counter[AsyncBlockchainModelStore] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, work: Callable[[AsyncBlockchainModelStore], Awaitable[T]]) -> T:
        """`work` with the store; once more, with one opened anew, where its credentials are refused.

        A store takes credentials when it opens, and nobody tells when they are renewed.
        """
        with suppress(AccessDenied):
            return await self._once(work)
        return await self._once(work)

    async def _once(self, work: Callable[[AsyncBlockchainModelStore], Awaitable[T]]) -> T:
        async with self._opening:
            if self.store is None:
                store = AsyncBlockchainModelStore(self._uri, endpoint_url=self._endpoint_url)
                self.store = await store.__aenter__()
        store = self.store
        self._calls[store] += 1
        try:
            return await work(store)
        except AccessDenied:
            if self.store is store:
                self.store = None
            raise
        finally:
            self._calls[store] -= 1
            if not self._calls[store]:
                del self._calls[store]
                if self.store is not store:  # refused, or closed meanwhile, and this was the last call that used it
                    self.beside(store.__aexit__(None, None, None))

    def beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that goes on by itself; the loop alone would not keep it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Close the store, now or with the last call that uses it."""
        store, self.store = self.store, None
        if store is not None and store not in self._calls:
            await store.__aexit__(None, None, None)


class UploadActor:
    """A trainer's process for its uploads, on its node: the bytes travel to S3 and nowhere else.

    An actor and not tasks: on a node whose CPUs are all taken, Ray ends a task's process that has been idle for some
    seconds, and each commit would start another (a second of a processor). It lives as long as the trainer's
    `committer`: one that stayed would keep its node from being drained, or scaled down.
    """

    def __init__(self, uri: str, endpoint_url: str | None, owner: str) -> None:
        self._owner = owner
        self._connection = Connection(uri, endpoint_url)
        self._uploads: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Upload({self._owner})"

    async def upload(self, boxed: list[Any]) -> tuple[str, int]:
        """Store the checkpoint behind the ref in `boxed`, which is fetched without a copy; -> its SHA-256 and size.

        Raises: AccessDenied, Busy, ConfigError, Unavailable.
        """
        task = asyncio.current_task()
        assert task is not None
        self._uploads.add(task)
        try:
            data = memoryview(await boxed[0])
            return await self._connection.call(lambda store: store.upload(data))
        finally:
            self._uploads.discard(task)

    async def close(self) -> None:
        """Cut short what is under way, and take it back from S3, where the parts of an upload would be paid for."""
        if uploads := set(self._uploads):
            for upload in uploads:
                upload.cancel()
            await asyncio.wait(uploads)
        await self._connection.close()


# A byte of memory, because Ray places an actor that asks for nothing at random, whatever node it is told.
RemoteUploadActor = ray.remote(num_cpus=0, memory=1, max_restarts=-1, max_task_retries=3)(UploadActor)
