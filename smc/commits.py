"""Commits beside training: the request, its outcome, and the thread that carries it out.

The training thread hands over a snapshot and goes on. Encoding, uploading and appending happen in a
thread with an event loop of its own, so `train()` works alike inside and outside a running loop.
"""

from __future__ import annotations

import asyncio
import logging
import string
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeVar

from smc.checkpoint import Snapshot, encode
from smc.errors import Busy, ConfigError
from smc.spool import CommitRecord, Spool

__all__ = [
    "DEFAULT_MESSAGE",
    "BackgroundCommits",
    "CommitOutcome",
    "CommitRequest",
    "CommitTarget",
    "Committer",
    "check_template",
]

DEFAULT_MESSAGE = "Training checkpoint: step={step}, loss={loss:.6f}"

logger = logging.getLogger("smc.commits")
T = TypeVar("T")
# Seconds that a commit waits for a ledger that has too much to do.
_BUSY_LIMIT: Final = 60.0


@dataclass(frozen=True)
class CommitRequest:
    """A snapshot on its way to the ledger, with what its entry will say."""

    snapshot: Snapshot
    record: CommitRecord
    final: bool = False


@dataclass(frozen=True)
class CommitOutcome:
    """What became of one commit.

    `version_id` is set when committed; `reason` and `spooled` (a path, or None if that failed too) when not.
    """

    step: int
    status: Literal["committed", "replaced", "failed"]
    version_id: str | None = None
    content_hash: str | None = None
    reason: str | None = None
    spooled: str | None = None


class Committer(Protocol):
    """The two halves of a commit, on the event loop that opened it."""

    async def upload(self, data: bytes) -> tuple[str, int]:
        """Store a checkpoint by content; -> its SHA-256 and size."""
        ...

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        """Enter it in the ledger; -> its version id. Idempotent in `record.commit_id`."""
        ...

    async def note_replaced(self, count: int) -> None:
        """Tell how many snapshots were replaced by newer ones, for whoever watches the ledger."""
        ...


class CommitTarget(Protocol):
    """Something a pricer can commit to: a store, or a LedgerActor's handle."""

    @property
    def uri(self) -> str:
        """Where the ledger is, for the spool."""
        ...

    def committer(self) -> AbstractAsyncContextManager[Committer]:
        """A connection of its own, opened and closed on the loop that uses it."""
        ...


def check_template(template: str) -> None:
    """Refuse a commit message template that could fail later.

    Raises: ConfigError (a ValueError) naming what is wrong; {step}, {loss}, {batch} are allowed.
    """
    try:
        for _, name, _, _ in string.Formatter().parse(template):
            if name is not None and name not in ("step", "loss", "batch"):
                raise ConfigError(
                    f"commit_message_template: unknown variable {{{name}}}; allowed are {{step}}, {{loss}}, {{batch}}"
                )
        template.format(step=1, loss=0.5, batch=1)
    except ConfigError:
        raise
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(f"commit_message_template {template!r}: {error}") from None


@dataclass
class _Pending:
    request: CommitRequest
    future: Future[CommitOutcome] = field(default_factory=Future)


class BackgroundCommits:
    """Commits snapshots in the order they were submitted, in a thread of its own.

    At most `max_started` are encoded or uploading at a time and `max_waiting` wait; beyond that a newer
    one replaces the oldest periodic one not yet started. A final one is never replaced. Whatever cannot
    be committed is written to the spool.
    """

    def __init__(
        self,
        target: CommitTarget,
        *,
        spool: Spool | None = None,
        max_started: int = 2,
        max_waiting: int = 4,
    ) -> None:
        self._target = target
        self._spool = spool or Spool()
        self._max_started, self._max_waiting = max_started, max_waiting
        self._waiting: deque[_Pending] = deque()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._closing = False
        self._replaced = 0
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="smc-encode")
        self._thread = threading.Thread(target=self._run, name="smc-commits", daemon=True)
        self._thread.start()

    def submit(self, request: CommitRequest) -> Future[CommitOutcome]:
        """Queue a commit and return at once; the future always gets an outcome, never an exception."""
        pending = _Pending(request)
        replaced = None
        with self._lock:
            if self._closing:
                raise RuntimeError("submit after close")
            self._waiting.append(pending)
            if len(self._waiting) > self._max_waiting:
                replaced = next((p for p in self._waiting if not p.request.final and p is not pending), None)
                if replaced is not None:
                    self._waiting.remove(replaced)
        if replaced is not None:
            step = replaced.request.record.step
            logger.warning("Commit at step %d replaced by step %d: the ledger is behind", step, request.record.step)
            self._replaced += 1
            replaced.future.set_result(CommitOutcome(step, "replaced", reason="a newer snapshot took its place"))
        self._loop.call_soon_threadsafe(self._wake.set)
        return pending.future

    def close(self) -> None:
        """Settle every commit submitted, then end the thread."""
        with self._lock:
            self._closing = True
        self._loop.call_soon_threadsafe(self._wake.set)
        self._thread.join()
        self._encoder.shutdown()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        committer: Committer | None = None
        running: set[asyncio.Task[None]] = set()
        previous: asyncio.Task[None] | None = None
        opened: AbstractAsyncContextManager[Committer] | None = None
        try:
            while True:
                pending = self._next(len(running))
                if pending is None:
                    if self._closing and not running and not self._waiting:
                        return
                    self._wake.clear()
                    if self._has_work(len(running)):
                        continue
                    waiter = asyncio.ensure_future(self._wake.wait())
                    await asyncio.wait({waiter, *running}, return_when=asyncio.FIRST_COMPLETED)
                    waiter.cancel()
                    running = {task for task in running if not task.done()}
                    continue
                try:
                    if committer is None:
                        opened = self._target.committer()
                        committer = await opened.__aenter__()
                except Exception as error:
                    opened = None
                    await self._failed(pending, encode(pending.request.snapshot), error)
                    continue
                previous = asyncio.create_task(self._commit(committer, pending, previous))
                running.add(previous)
        finally:
            if opened is not None and committer is not None:
                await opened.__aexit__(None, None, None)

    def _has_work(self, running: int) -> bool:
        with self._lock:
            return bool(self._waiting) and running < self._max_started

    def _next(self, running: int) -> _Pending | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and running < self._max_started else None

    async def _commit(self, committer: Committer, pending: _Pending, previous: asyncio.Task[None] | None) -> None:
        record, data = pending.request.record, b""
        try:
            data = await self._loop.run_in_executor(self._encoder, encode, pending.request.snapshot)
            content_hash, size = await _patiently(lambda: committer.upload(data))
            if previous is not None:  # entries of one run stand in the ledger in the order of their steps
                await asyncio.wait({previous})
            version_id = await _patiently(lambda: committer.append(record, content_hash, size))
            replaced, self._replaced = self._replaced, 0
            if replaced:
                await committer.note_replaced(replaced)
            pending.future.set_result(
                CommitOutcome(record.step, "committed", version_id=version_id, content_hash=content_hash)
            )
        except Exception as error:
            await self._failed(pending, data, error)

    async def _failed(self, pending: _Pending, data: bytes, error: Exception) -> None:
        record = pending.request.record
        reason = str(error) or repr(error)
        logger.error("Failed to commit at step %d: %s", record.step, reason)
        spooled: str | None = None
        try:
            data = data or encode(pending.request.snapshot)
            spooled = str(await self._loop.run_in_executor(None, self._spool.save, record, data))
            logger.warning("Snapshot of step %d kept in %s; `python -m smc.storage recover`", record.step, spooled)
        except OSError as problem:
            logger.error("Snapshot of step %d could not be kept either: %s", record.step, problem)
        pending.future.set_result(CommitOutcome(record.step, "failed", reason=reason, spooled=spooled))


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result, asked for again as long as the ledger says that it is busy, up to a limit."""
    waited = 0.0
    while True:
        try:
            return await call()
        except Busy as busy:
            if waited >= _BUSY_LIMIT:
                raise
            await asyncio.sleep(busy.retry_after)
            waited += max(busy.retry_after, 0.01)
