"""Commits beside training: the request, its outcome, and the thread that carries it out.

The training thread takes a snapshot, which on a GPU is a few launches, and goes on. Waiting for the copy,
encoding, uploading and appending happen in a thread with an event loop of its own, so `train()` works alike
inside and outside a running loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Final

from torch import Tensor

from smc.checkpoint.file import CheckpointMetadata
from smc.checkpoint.ring import SnapshotRing, TakenSnapshot
from smc.errors import Conflict, NumericsError
from smc.storage.commit_request import (
    DEFAULT_MESSAGE,
    CommitOutcome,
    CommitRequest,
    CommitSeconds,
    CommitTarget,
    Committer,
    check_entry,
    check_template,
)
from smc.storage.limits import LIMITS
from smc.storage.pace import Pace, StopWatch, patiently
from smc.storage.spool import CommitRecord, Spool, new_commit_id

__all__ = [
    "DEFAULT_MESSAGE",
    "FLUSH_SECONDS",
    "BackgroundCommits",
    "CommitOutcome",
    "CommitRequest",
    "CommitSeconds",
    "CommitTarget",
    "Committer",
    "check_entry",
    "check_template",
    "slots_for",
]

# How long the end of training waits for commits; what is not settled then goes to the spool.
FLUSH_SECONDS: Final = 120.0

logger = logging.getLogger("smc.commits")
# Snapshots kept at a time: as many as fit into this, within limits.
_MEMORY: Final = 2 * 2**30
_FEWEST, _MOST = 2, 8
# To look whether it may go on takes processor time as well.
_SHORTEST_DELAY: Final = 0.02
# Seconds beyond the deadline that closing the connection may take.
_HANG_UP_LIMIT: Final = 1.0
# Seconds between two lines that say how many snapshots were replaced.
_REPLACED_INTERVAL: Final = 10.0


class BackgroundCommits:
    """Commits snapshots in the order they were submitted, in a thread of its own.

    Memory for snapshots is bounded: `slots` states on the host, by default as many as fit into 2 GiB, but at
    least 2 and at most 8; two more on the device. A slot is taken from the submission until the commit is
    settled. Half of them are encoded or uploaded at a time, the others wait; when there is no slot left, the
    oldest periodic snapshot that waits is replaced by the newer one, which is logged and counted. A final one is never
    replaced. Whatever cannot be committed is written to the spool. While training runs the thread's event loop takes a
    tenth of a processor, or less, beside hashes and copies, which leave Python's lock alone; `close` lifts that.
    Of each commit an outcome is kept to the end: 0.6 kB, of a replaced one 0.3.

    The tensors and metadata given here are those of a first state; later ones must have the same tensors.
    """

    def __init__(
        self,
        target: CommitTarget,
        tensors: Mapping[str, Tensor],
        metadata: CheckpointMetadata,
        *,
        spool: Spool | None = None,
        slots: int | None = None,
    ) -> None:
        self._target, self._spool = target, spool or Spool()
        slots = slots or slots_for(tensors)
        self._most_started = max(1, slots // 2)
        self._ring = SnapshotRing(tensors, metadata, slots=slots)
        self._waiting: deque[_Pending] = deque()
        self._outcomes: dict[int, CommitOutcome] = {}
        self._submitted = 0
        self._replaced, self._said_replaced = 0, -_REPLACED_INTERVAL
        self._lock = threading.Lock()
        self._closing = False
        self._flush_seconds = FLUSH_SECONDS
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], _Pending] = {}
        self._limits: set[asyncio.Timeout] = set()
        self._deadline: float | None = None
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._committer: Committer | None = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="smc-encode")
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="smc-commits", daemon=True)
        self._thread.start()
        # Making an S3 client is a fifth of a second of Python, which the first steps would feel.
        ready.wait(LIMITS.opening)

    @property
    def pending(self) -> int:
        """Commits submitted and not settled."""
        return self._submitted - len(self._outcomes)

    def submit(
        self, request: CommitRequest, tensors: Mapping[str, Tensor], metadata: CheckpointMetadata, outcome: Tensor
    ) -> None:
        """Take a snapshot of these tensors and commit it; returns at once, except for a final one without room.

        `outcome` is (loss, something finite only if all losses were), on the tensors' device. Raises: ConfigError
        if they are not the tensors it was made for.
        """
        if self._closing:
            raise RuntimeError("submit after close")
        number = self._submitted
        while (snapshot := self._ring.take(tensors, metadata, outcome)) is None:
            self._submitted = number + 1
            if self._replace_oldest(request.step):
                continue
            if not request.final:  # none waits that it could replace
                self._settle_replaced(number, request, None)
                return
            time.sleep(0.005)
        self._submitted = number + 1
        with self._lock:
            self._waiting.append(_Pending(number, request, snapshot, time.perf_counter()))
        self._loop.call_soon_threadsafe(self._wake.set)

    def hurry(self, within: float) -> None:
        """Nothing is submitted any more, and this process has so many seconds left: the newest snapshot gets them all.

        Older ones that are not about to be entered in the ledger are replaced by it.
        """
        with suppress(RuntimeError):  # the loop is closed: everything is settled
            self._loop.call_soon_threadsafe(self._hurry, within)

    def close(self, flush_seconds: float = FLUSH_SECONDS) -> tuple[CommitOutcome, ...]:
        """Settle every commit, then end the thread; -> the outcomes in the order of submission.

        What is not in the ledger after so many seconds is written to the spool.
        """
        if not self._closing:
            with self._lock:
                self._closing = True
            self._loop.call_soon_threadsafe(self._flush, flush_seconds)
            self._thread.join()
            self._encoder.shutdown()
            self._ring.close()
        return tuple(self._outcomes[number] for number in sorted(self._outcomes))

    def _replace_oldest(self, by_step: int) -> bool:
        with self._lock:
            oldest = next((pending for pending in self._waiting if not pending.request.final), None)
            if oldest is None:
                return False
            self._waiting.remove(oldest)
        oldest.snapshot.release()
        self._settle_replaced(oldest.number, oldest.request, by_step)
        return True

    def _settle_replaced(self, number: int, request: CommitRequest, by_step: int | None) -> None:
        reason = "there was no room for it" if by_step is None else f"replaced by step {by_step}"
        outcome = CommitOutcome(request.step, "replaced", reason=reason)
        self._outcomes[number] = outcome
        self._replaced += 1
        if time.monotonic() - self._said_replaced >= _REPLACED_INTERVAL:
            self._said_replaced = time.monotonic()
            logger.warning(
                "Commit at step %d: %s, the ledger is behind; %d replaced so far", request.step, reason, self._replaced
            )
        self._loop.call_soon_threadsafe(self._tell, outcome, request.experiment)

    # --- on the thread --------------------------------------------------------------------------------

    def _run(self, ready: threading.Event) -> None:
        try:
            self._loop.run_until_complete(self._serve(ready))
        finally:
            self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._pace = Pace(self._loop.time())
        opening = asyncio.create_task(self._open_early(ready))  # which may take longer than there is time
        while (pending := await self._next()) is not None:
            task = asyncio.create_task(self._commit(pending))
            self._running[task] = pending
            task.add_done_callback(self._ended)
        opening.cancel()
        await asyncio.wait({opening})
        try:
            async with asyncio.timeout_at(max(self._deadline or 0.0, self._loop.time()) + _HANG_UP_LIMIT):
                await self._stack.aclose()
        except Exception as error:
            logger.info("%s: closing the connection: %s", self._target.uri, str(error) or repr(error))
        left = asyncio.all_tasks() - {asyncio.current_task()}  # of a connection that did not close in time
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_HANG_UP_LIMIT)

    async def _open_early(self, ready: threading.Event) -> None:
        try:
            await self._opened()
        except Exception as error:  # each commit tries again, and says so if it fails
            logger.info("%s: %s", self._target.uri, error)
        self._pace = Pace(self._loop.time())
        ready.set()

    async def _next(self) -> _Pending | None:
        """The next commit to start, when there is one and the time has come; None when all is settled."""
        while True:
            self._wake.clear()
            with self._lock:
                pause = 0.0 if self._closing else self._pace.delay(self._loop.time())
                may_start = bool(self._waiting) and len(self._running) < self._most_started
                if may_start and not pause:
                    return self._waiting.popleft()
                if self._closing and not self._waiting and not self._running:
                    return None
            with suppress(TimeoutError):
                async with asyncio.timeout(max(pause, _SHORTEST_DELAY) if may_start else None):
                    await self._wake.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wake.set()

    def _flush(self, seconds: float) -> None:
        self._flush_seconds = min(self._flush_seconds, seconds)
        deadline = self._loop.time() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(self._deadline)
        self._wake.set()

    def _hurry(self, within: float) -> None:
        # What a loss that is not finite led to cannot be committed, and may have been submitted before that was known.
        left = [p for p in (*self._waiting, *self._running.values()) if not p.settled and p.snapshot.finite]
        if left:
            newest = max(left, key=lambda p: p.number)
            with self._lock:
                overtaken = [p for p in self._waiting if p.number < newest.number]
                self._waiting = deque(p for p in self._waiting if p not in overtaken)
            for pending in overtaken:
                pending.snapshot.release()
                self._settle_replaced(pending.number, pending.request, newest.request.step)
            for task, pending in self._running.items():
                if pending.number < newest.number and not pending.settling:
                    pending.overtaken_by = newest.request.step
                    task.cancel()
        self._flush(within)

    async def _opened(self) -> Committer:
        async with self._opening:
            if self._committer is None:
                self._committer = await self._stack.enter_async_context(self._target.committer())
        return self._committer

    async def _commit(self, pending: _Pending) -> None:
        request, watch = pending.request, StopWatch()
        limit = asyncio.timeout_at(self._deadline)
        try:
            try:
                async with limit:
                    self._limits.add(limit)
                    outcome = await self._entered(pending, watch)
            finally:
                self._limits.discard(limit)
        except asyncio.CancelledError:
            reason = f"replaced by step {pending.overtaken_by}"
            outcome = CommitOutcome(request.step, "replaced", reason=reason)
        except NumericsError as error:
            outcome = CommitOutcome(request.step, "failed", reason=str(error))
        except Exception as error:
            pending.settling = True
            late = f"not in the ledger {self._flush_seconds:g} s after the last step"
            outcome = await self._kept(pending, late if limit.expired() else str(error) or repr(error))
        pending.settled = True
        pending.snapshot.release()
        watch.seconds["acknowledged"] = time.perf_counter() - pending.submitted
        outcome = replace(outcome, seconds=CommitSeconds(**watch.seconds))
        self._outcomes[pending.number] = outcome
        self._tell(outcome, request.experiment)

    async def _entered(self, pending: _Pending, watch: StopWatch) -> CommitOutcome:
        """Encode, put, upload and append it, after the commits before it."""
        record, data = await self._loop.run_in_executor(self._encoder, pending.encode, self._target.uri, watch)
        committer = await self._opened()
        watch.start()
        placed = await committer.put(data)
        watch.stop("put")
        content_hash, size = await patiently(lambda: committer.upload(placed))
        watch.stop("upload")
        taken = time.perf_counter() - pending.submitted
        record = record.model_copy(update={"metrics": {**record.metrics, "commit_seconds": taken}})
        # Entries of one run stand in the ledger in the order of their steps. All before it, not only the last: that one
        # may have failed while another goes on.
        if earlier := [task for task, other in self._running.items() if other.number < pending.number]:
            await asyncio.wait(earlier)
        pending.settling = True
        try:
            version_id = await patiently(lambda: committer.append(record, content_hash, size))
        except Conflict:  # an equal checkpoint was collected meanwhile, and this one with it
            await patiently(lambda: committer.upload(placed))
            version_id = await patiently(lambda: committer.append(record, content_hash, size))
        watch.stop("sequence")
        return CommitOutcome(record.step, "committed", version_id=version_id, content_hash=content_hash)

    async def _kept(self, pending: _Pending, reason: str) -> CommitOutcome:
        """Write what could not be committed to the spool."""
        step, spooled = pending.request.step, None
        logger.error("Failed to commit at step %d: %s", step, reason)

        def save() -> str:
            encoded = pending.encode(self._target.uri, StopWatch())
            return str(self._spool.save(*encoded, final=pending.request.final))

        try:
            spooled = await self._loop.run_in_executor(self._encoder, save)
            logger.warning("Snapshot of step %d kept in %s; `python -m smc.storage recover`", step, spooled)
        except Exception as problem:  # a full disk; or what made the commit fail makes this fail too
            logger.error("Snapshot of step %d could not be kept either: %s", step, problem)
        return CommitOutcome(step, "failed", reason=reason, spooled=spooled)

    def _tell(self, outcome: CommitOutcome, experiment: str) -> None:
        if self._committer is not None:
            self._committer.settled(outcome, experiment)


@dataclass(eq=False)
class _Pending:
    number: int
    request: CommitRequest
    snapshot: TakenSnapshot
    submitted: float
    commit_id: str = field(default_factory=new_commit_id)
    settling: bool = False  # about to be in the ledger, or the spool: not to be interrupted
    settled: bool = False
    overtaken_by: int | None = None

    def encode(self, ledger: str, watch: StopWatch) -> tuple[CommitRecord, memoryview]:
        """Wait for the snapshot; -> its record and file. Raises: NumericsError if a loss before it was not finite."""
        snapshot, request = self.snapshot, self.request
        watch.seconds.update(snapshot.seconds())
        watch.start()
        if not snapshot.finite:
            raise NumericsError(f"not committed: a loss up to step {request.step} is not finite")
        data = snapshot.file()
        watch.stop("encode")
        record = CommitRecord(
            ledger=ledger,
            commit_id=self.commit_id,
            message=request.template.format(step=request.step, loss=snapshot.loss, batch=request.batch),
            step=request.step,
            loss=snapshot.loss,
            experiment=request.experiment,
            metrics=dict(request.metrics),
            parameters=dict(request.parameters),
            plan_end=request.plan_end,
            pruned=request.pruned,
            resumed_from=request.resumed_from,
            model_hash=snapshot.model_hash(data),
        )
        return record, data


def slots_for(tensors: Mapping[str, Tensor]) -> int:
    """How many snapshots of these tensors are kept at a time: as many as fit into 2 GiB, at least 2, at most 8."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    return max(_FEWEST, min(_MOST, _MEMORY // max(1, size)))
