"""The pace of commits beside training: their share of a processor, their stages' seconds, their patience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from smc.errors import Busy

__all__ = ["Pace", "StopWatch", "patiently"]

T = TypeVar("T")
# Seconds that a commit waits for a ledger that has too much to do.
_BUSY_LIMIT: Final = 60.0
# Share of one processor that the commits' event loop may take while training runs, beyond a burst of so many seconds:
# Python lets one thread work at a time, and a commit is some milliseconds of it. No commit waits for longer than that.
_SHARE: Final = 0.1
_BURST: Final = 0.1
_LONGEST_DELAY: Final = 2.0


class Pace:
    """How long the thread should wait so that its processor time stays below the share it may take."""

    def __init__(self, now: float) -> None:
        self._at, self._used, self._debt = now, time.thread_time(), 0.0

    def delay(self, now: float) -> float:
        """Seconds, 0 if it need not wait."""
        used = time.thread_time()
        debt = self._debt + used - self._used - _SHARE * (now - self._at)
        self._debt = min(max(0.0, debt), _BURST + _SHARE * _LONGEST_DELAY)
        self._at, self._used = now, used
        return max(0.0, self._debt - _BURST) / _SHARE


class StopWatch:
    """Seconds of one stage after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._at = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._at = now - self._at, now


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
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
