"""The LedgerActor: one per ledger and cluster, it puts every experiment's commits into one order.

It orders and carries no bytes: a checkpoint stays in the object store of the node that made it, is
uploaded by a task on that node, and only its hash and size come here. Everything the actor knows it can
read back from S3, so it may be killed at any moment; every call is idempotent and may be repeated.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from smc.errors import SpectralMCError
from smc.spool import CommitRecord
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["NAMESPACE", "LedgerActor", "LedgerHandle", "ledger_actor"]

NAMESPACE = "spectralmc"
_UPLOADS_PER_NODE = 4

Uploader = Callable[[str, list[Any], str], Awaitable[tuple[str, int]]]


@ray.remote(num_cpus=0, max_retries=3)
def _upload_task(uri: str, boxed: list[Any]) -> tuple[str, int]:
    """Runs where the checkpoint lies: fetches it without a copy, hashes and stores it."""

    async def upload(data: bytes) -> tuple[str, int]:
        async with AsyncBlockchainModelStore(uri) as store:
            return await store.upload(data)

    return asyncio.run(upload(ray.get(boxed[0])))


async def _upload_on_node(uri: str, boxed: list[Any], node_id: str) -> tuple[str, int]:
    strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=True)
    result: tuple[str, int] = await _upload_task.options(scheduling_strategy=strategy).remote(uri, boxed)
    return result


class LedgerActor:
    """Appends to one ledger. A plain async class; `ledger_actor` starts it as an actor."""

    def __init__(self, uri: str, *, uploader: Uploader = _upload_on_node) -> None:
        self._uri = uri
        self._uploader = uploader
        self._store: AsyncBlockchainModelStore | None = None
        self._opening = asyncio.Lock()
        # Every upload at a time on a node is a worker process there.
        self._upload_gates: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_UPLOADS_PER_NODE)
        )
        self._committed = self._failed = self._uploading = 0
        self._started = time.time()

    def __repr__(self) -> str:
        return f"Ledger({self._uri})"

    async def prepare(self) -> str | None:
        """Check that the ledger can be appended to; -> its newest version id, or None.

        Raises: ConfigError, Unavailable, Corrupt.
        """
        store = await self._opened()
        await store.ledger.prepare()
        head = await store.get_head()
        return head.version_id if head else None

    async def upload(self, boxed: list[Any], node_id: str) -> tuple[str, int]:
        """Store the checkpoint behind the ref in `boxed`; -> its SHA-256 and size.

        The ref travels in a list so that it is not fetched on the way here.
        """
        self._uploading += 1
        try:
            async with self._upload_gates[node_id]:
                return await self._uploader(self._uri, boxed, node_id)
        except RayTaskError as error:
            raise _cause(error) from None
        finally:
            self._uploading -= 1

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        """Enter an uploaded checkpoint in the ledger; -> its version id. Idempotent in the commit_id."""
        store = await self._opened()
        try:
            version = await store.append_commit(record, content_hash, size)
        except Exception:
            self._failed += 1
            raise
        self._committed += 1
        return version.version_id

    async def status(self) -> dict[str, Any]:
        """What the actor has done since it started, and what it is doing."""
        queued = self._store.ledger.queue_depth if self._store else 0
        return {
            "ledger": self._uri,
            "committed": self._committed,
            "failed": self._failed,
            "uploading": self._uploading,
            "queued": queued,
            "uptime_s": time.time() - self._started,
            "pid": os.getpid(),
        }

    async def flush(self) -> None:
        """Return when what was submitted so far is settled."""
        if self._store is not None:
            await self._store.ledger.close()

    async def close(self) -> None:
        """Settle everything and close the connection; the next call opens it again."""
        store, self._store = self._store, None
        if store is not None:
            await store.__aexit__(None, None, None)

    async def _opened(self) -> AsyncBlockchainModelStore:
        async with self._opening:  # __init__ cannot await, and many first calls come at once
            if self._store is None:
                self._store = await AsyncBlockchainModelStore(self._uri).__aenter__()
        return self._store


class LedgerHandle:
    """A ledger reached through its actor: what a pricer in a TrainerActor commits to."""

    def __init__(self, uri: str, actor: Any) -> None:
        self._uri, self._actor = uri, actor

    @property
    def uri(self) -> str:
        return self._uri

    @asynccontextmanager
    async def committer(self) -> AsyncIterator[_ActorCommitter]:
        """Background commits through the actor."""
        yield _ActorCommitter(self._actor)


class _ActorCommitter:
    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._node_id = ray.get_runtime_context().get_node_id()

    async def upload(self, data: bytes) -> tuple[str, int]:
        ref = ray.put(data)  # owned here until the call returns: the actor's death does not lose it
        result: tuple[str, int] = await _unwrapped(self._actor.upload.remote([ref], self._node_id))
        return result

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        return str(await _unwrapped(self._actor.append.remote(record, content_hash, size)))


def ledger_actor(uri: str) -> Any:
    """The ledger's actor, started if this cluster has none: named, detached, restarted for ever.

    It runs on a node with the custom resource `ledger` where the cluster has one.
    """
    placed = {"ledger": 0.01} if ray.cluster_resources().get("ledger") else {}
    return RemoteLedgerActor.options(
        name=f"ledger:{uri}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,
        num_cpus=0,
        resources=placed,
    ).remote(uri)


async def _unwrapped(ref: Awaitable[Any]) -> Any:
    try:
        return await ref
    except RayTaskError as error:
        raise _cause(error) from None


def _cause(error: RayTaskError) -> Exception:
    """The error as the actor raised it: Ray's wrapper prints a remote traceback for a message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, SpectralMCError) else error


RemoteLedgerActor = ray.remote(LedgerActor)
