"""What other threads ask of training while it runs: to stop, where it is, and for a snapshot between two steps."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch

from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.errors import ConfigError
from smc.learning.commits import Ending, TrainingCommits
from smc.learning.plan import Progress
from smc.learning.state import TrainingState
from smc.storage.commits import CommitOutcome

__all__ = ["TrainingControl"]


class TrainingControl:
    """Any thread may call `stop`, `snapshot` and `progress`; the rest belongs to the thread that trains."""

    def __init__(self, state: TrainingState) -> None:
        step = state.position.step
        self.progress = Progress(step, step, None, training=False)
        self.ending = Ending()
        self._state = state
        self._lock = threading.Lock()
        self._active: int | None = None  # the thread that trains
        self._requests: queue.SimpleQueue[Future[GbmCVNNPricerConfig]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._within = math.inf
        self._settling: TrainingCommits | None = None

    @property
    def stopping(self) -> bool:
        """Whether training is to end after the step it is in."""
        return self._stop.is_set()

    def stop(self, within: float, ending: Ending) -> None:
        """End training after the step it is in; the newest commit then has `within` seconds, if that is less."""
        self._within, self.ending = within, ending
        self._stop.set()
        if (commits := self._settling) is not None and within < math.inf:
            commits.hurry(within)

    def snapshot(self) -> GbmCVNNPricerConfig:
        """The whole state, copied. From another thread during training it is taken between two steps."""
        with self._lock:
            if self._active not in (None, threading.get_ident()):
                request: Future[GbmCVNNPricerConfig] = Future()
                self._requests.put(request)
            else:
                return self._state.copied()
        return request.result()

    def serve_requests(self) -> None:
        """Give a snapshot to everyone who asked for one since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._requests.get_nowait()
                request.set_result(self._state.copied())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Training goes on in this thread. Raises: ConfigError if it does in another."""
        with self._lock:
            if self._active is not None:
                raise ConfigError("this pricer is already training, on another thread")
            self._active = threading.get_ident()
        # A new thread takes torch's number of threads over only at its first parallel operation, and sums
        # are rounded differently before and after: settle it, or a resumed run would not be the same.
        torch.set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            with self._lock:
                self._active = None
                self.serve_requests()
            self._stop.clear()
            self._within, self.ending = math.inf, Ending()
            self.progress = replace(self.progress, training=False, commits_pending=0)

    def settle(self, commits: TrainingCommits, flush_seconds: float) -> tuple[CommitOutcome, ...]:
        """Wait for what was committed, as long as asked; from here on it is `stop` that may shorten the wait."""
        self._settling = commits
        try:
            if self._within < math.inf:
                commits.hurry(self._within)
            return commits.close(flush_seconds)
        finally:
            self._settling = None
