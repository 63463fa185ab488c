"""The LedgerActor: one per ledger and cluster, it puts every experiment's commits into one order.

It orders and carries no bytes: a checkpoint stays in the object store of the node that made it, is
uploaded by the trainer's UploadActor there, and only its hash and size come here. Everything the actor knows it can
read back from S3, so it may be killed at any moment; every call is idempotent and may be repeated.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.metrics import observe, observe_ledger
from smc.errors import Busy, ConfigError, Conflict, SpectralMCError, Unavailable
from smc.storage.address import endpoint_of
from smc.storage.spool import CommitRecord
from smc.storage.store import AsyncBlockchainModelStore

if TYPE_CHECKING:  # it needs torch, which nothing that runs here does
    from smc.storage.commits import CommitOutcome
from actors.code import code_version
from actors.upload import Connection, RemoteUploadActor

__all__ = ["NAMESPACE", "LedgerActor", "LedgerHandle", "address", "code_version", "ledger_actor"]


T = TypeVar("T")

NAMESPACE = "spectralmc"
# Between two looks of the metrics at what the actor does.
_OBSERVE_SECONDS = 2.0
_MAX_CALLS = 4096
_HINT_SECONDS = 5.0
_DRAIN_SECONDS = 60.0
_REPLACED_AT_ONCE = 100
# For uploads that are cut short to be aborted on S3.
_CUT_SECONDS = 2.0
# Of the actor while a driver waits for it: other drivers may replace it, and a node may be short of something.
_MOST_REPLACED, _MOST_DEATHS = 3, 30


class LedgerActor:
    """Appends to one ledger. A plain async class; `ledger_actor` starts it as an actor."""

    def __init__(self, uri: str, *, endpoint_url: str | None = None) -> None:
        self._uri = uri
        self._connection = Connection(uri, endpoint_url)
        self._committed = self._failed = self._replaced = self._calls = self._uploading = self._bytes = 0
        self._recent: deque[list[int]] = deque(maxlen=11)  # the latest seconds, each with its commits
        self._observer: asyncio.Task[None] | None = None
        self._appending: set[asyncio.Future[None]] = set()
        self._draining_until = 0.0
        self._started = time.time()

    def __repr__(self) -> str:
        return f"Ledger({self._uri})"

    async def prepare(self) -> str | None:
        """Check that the ledger can be appended to; -> its newest version id, or None.

        Raises: ConfigError, Unavailable, Corrupt.
        """

        async def newest(store: AsyncBlockchainModelStore) -> str | None:
            await store.ledger.prepare()
            head = await store.get_head()
            return head.version_id if head else None

        return await self._with_store(newest)

    async def upload(self, boxed: list[Any], uploader: Any, size: int) -> tuple[str, int]:
        """Let `uploader`, an UploadActor, store the checkpoint of `size` bytes behind the ref in `boxed`.

        -> its SHA-256 and size. The ref travels in a list so that it is not fetched on the way here.
        Raises: Busy, Unavailable if the uploader is gone, and what storing raises.
        """
        self._admit()
        self._uploading += 1
        self._bytes += size
        try:
            result: tuple[str, int] = await _unwrapped(uploader.upload.remote(boxed))
            if self._connection.store is not None:
                self._connection.store.note_uploaded(*result)
            return result
        except (ActorDiedError, ActorUnavailableError) as error:
            self._failed += 1
            reason = str(error).strip().splitlines()[-1].strip()
            state = "gone" if isinstance(error, ActorDiedError) else "being started again"
            raise Unavailable(f"the process that uploads to {self._uri} is {state}: {reason}") from None
        except Exception:
            self._failed += 1
            raise
        finally:
            self._uploading -= 1
            self._bytes -= size

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        """Enter an uploaded checkpoint in the ledger; -> its version id. Idempotent in the commit_id.

        Raises: Busy, and what appending raises.
        """
        self._admit()
        self._calls += 1
        done = asyncio.get_running_loop().create_future()
        self._appending.add(done)
        try:
            version = await self._with_store(lambda store: store.append_commit(record, content_hash, size))
        except Conflict:  # it was collected meanwhile: the trainer uploads it again
            raise
        except Exception:
            self._failed += 1
            raise
        finally:
            self._calls -= 1
            self._appending.discard(done)
            done.set_result(None)
        self._committed += 1
        second = int(time.monotonic())
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append([second, 0])
        self._recent[-1][1] += 1
        return version.version_id

    async def note_replaced(self, count: int = 1) -> None:
        """Count snapshots that trainers replaced by newer ones before they were committed."""
        self._replaced += count

    async def status(self) -> dict[str, Any]:
        """What the actor knows and does. Reads nothing, so that it answers under load."""
        now = time.monotonic()
        store = self._connection.store
        ledger = store.ledger if store else None
        lately = sum(count for second, count in self._recent if now - second < 10)
        return {
            "ledger": self._uri,
            "head": ledger.known_head if ledger else None,
            "queue_depth": ledger.queue_depth if ledger else 0,
            "uploading": self._uploading,
            "bytes_in_flight": self._bytes,
            "commits_per_s": lately / min(10.0, max(0.1, time.time() - self._started)),
            "committed": self._committed,
            "replaced": self._replaced,
            "failed": self._failed,
            "uptime_s": time.time() - self._started,
            "pid": os.getpid(),
            "version": code_version(),
        }

    async def version(self) -> str:
        """The code this actor runs; see `code_version`."""
        return code_version()

    async def flush(self) -> None:
        """Return when what was submitted so far is settled, also what waits for this actor to open its ledger."""
        if self._appending:
            await asyncio.wait(set(self._appending))
        store = self._connection.store
        if store is not None:  # and its hint is written, unless others go on appending
            await asyncio.wait({self._connection.beside(store.ledger.close())}, timeout=_HINT_SECONDS)

    async def drain(self) -> None:
        """Refuse what is new with Busy, and return when everything else is settled: this actor is to go."""
        self._draining_until = time.monotonic() + _DRAIN_SECONDS  # whoever asked may die before it ends this actor
        while self._calls or self._uploading:  # noqa: ASYNC110  an event for every call would say no more
            await asyncio.sleep(0.02)
        await self.flush()

    async def close(self) -> None:
        """Settle everything and close the connection; the next call opens it again."""
        if self._observer is not None:
            self._observer.cancel()
            self._observer = None
        await self.flush()
        await self._connection.close()

    def _admit(self) -> None:
        if time.monotonic() < self._draining_until:
            raise Busy(f"{self!r} is being replaced by newer code", retry_after=1.0)
        if self._uploading + self._calls >= _MAX_CALLS:
            raise Busy(f"{self!r} has {_MAX_CALLS} commits under way", retry_after=0.5)

    async def _with_store(self, work: Callable[[AsyncBlockchainModelStore], Awaitable[T]]) -> T:
        if self._observer is None and ray.is_initialized():
            self._observer = asyncio.create_task(self._observe())
        return await self._connection.call(work)

    async def _observe(self) -> None:
        while True:
            observe_ledger(await self.status())
            await asyncio.sleep(_OBSERVE_SECONDS)


class LedgerHandle:
    """A ledger reached through its actor: what a pricer in a TrainerActor commits to."""

    def __init__(self, uri: str, actor: Any, *, endpoint_url: str | None = None) -> None:
        self._uri, self._actor, self._endpoint_url = uri, actor, endpoint_url

    @property
    def uri(self) -> str:
        return self._uri

    @asynccontextmanager
    async def committer(self) -> AsyncIterator[_ActorCommitter]:
        """Background commits through the actor."""
        committer = _ActorCommitter(self._uri, self._actor, self._endpoint_url)
        try:
            yield committer
        finally:
            await committer.close()


class _ActorCommitter:
    def __init__(self, uri: str, actor: Any, endpoint_url: str | None = None) -> None:
        self._uri, self._actor, self._endpoint_url = uri, actor, endpoint_url
        context = ray.get_runtime_context()
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True)
        owner = context.get_actor_name() or uri
        self._uploader = RemoteUploadActor.options(scheduling_strategy=here).remote(uri, endpoint_url, owner)
        self._replaced = 0  # not told yet: a call for each, some hundred a second, would be felt

    async def put(self, data: memoryview) -> tuple[list[Any], int]:
        # As an array: one copy, made without Python's lock. The ref is owned here until the commit is settled, so
        # that the actor's death does not lose it.
        return [await asyncio.to_thread(ray.put, np.frombuffer(data, dtype=np.uint8))], len(data)

    async def upload(self, placed: tuple[list[Any], int]) -> tuple[str, int]:
        boxed, size = placed
        result: tuple[str, int] = await self._call("upload", boxed, self._uploader, size)
        return result

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        return str(await self._call("append", record, content_hash, size))

    def settled(self, outcome: CommitOutcome, experiment: str) -> None:
        observe(outcome, experiment)
        if outcome.status == "replaced":
            self._replaced += 1
        if self._replaced and (outcome.status != "replaced" or self._replaced == _REPLACED_AT_ONCE):
            self._actor.note_replaced.remote(self._replaced)
            self._replaced = 0

    async def close(self) -> None:
        """End the process that uploads."""
        if not ray.is_initialized():  # it ended with Ray, and to kill it would start another Ray
            return
        try:
            with suppress(TimeoutError, RayError):
                await asyncio.wait_for(self._uploader.close.remote(), _CUT_SECONDS)
        finally:
            ray.kill(self._uploader)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call the actor; if it is gone for good (replaced by newer code), its successor."""
        attempts = 4
        while True:
            ref = getattr(self._actor, method).remote(*arguments)
            try:
                return await _unwrapped(ref)
            except asyncio.CancelledError:
                if method == "upload":  # nobody wants it any more, and it would slow down those that are wanted
                    ray.cancel(ref)
                raise
            except ActorDiedError as error:
                attempts -= 1
                if attempts == 0:
                    raise Unavailable(f"the LedgerActor of {self._uri} is gone: {str(error).splitlines()[0]}") from None
            await asyncio.sleep(0.2)
            self._actor = await asyncio.to_thread(_get_or_start, self._uri, self._endpoint_url)


def ledger_actor(uri: str, *, endpoint_url: str | None = None) -> Any:
    """The ledger's actor, started if this cluster has none: named, detached, restarted for ever.

    One that runs other code than ours is drained and replaced. It runs on a node with the custom
    resource `ledger` where the cluster has one.

    Raises: ConfigError if what is started there has other code again and again; Unavailable if it does not start.
    """
    deaths = replaced = 0
    while True:
        actor = _get_or_start(uri, endpoint_url)
        try:
            theirs = ray.get(actor.version.remote())
            if theirs == code_version():
                return actor
            if replaced == _MOST_REPLACED:
                raise ConfigError(
                    f"the LedgerActor of {uri} runs code {theirs}, this job {code_version()}, also after it was "
                    f"started again {replaced} times: give every node the same code (`ray job submit --working-dir .`)"
                )
            ray.get(actor.drain.remote())
            ray.kill(actor, no_restart=True)
            replaced += 1
        except (ActorDiedError, ActorUnavailableError) as error:  # another driver is replacing it just now
            deaths += 1
            if error.actor_init_failed or deaths == _MOST_DEATHS:
                reason = str(error).strip().splitlines()[-1].strip()
                raise Unavailable(f"the LedgerActor of {uri} does not start: {reason}") from None
            time.sleep(0.1)


def address(uri: str, endpoint_url: str | None = None) -> str:
    """A ledger's name in those of actors: its address, and the server's, for one address on two servers is two ledgers.

    Raises: ConfigError if the server's cannot be found out.
    """
    endpoint = endpoint_of(endpoint_url)
    return uri if endpoint is None else f"{uri}@{quote(endpoint, safe='')}"


def _get_or_start(uri: str, endpoint_url: str | None) -> Any:
    placed = {"ledger": 0.01} if ray.cluster_resources().get("ledger") else {}
    return RemoteLedgerActor.options(
        name=f"ledger:{address(uri, endpoint_url)}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_MAX_CALLS + 100,  # so that it answers, and says that it is busy
        num_cpus=0,
        resources=placed,
    ).remote(uri, endpoint_url=endpoint_of(endpoint_url))  # that of its node's environment may be another


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
