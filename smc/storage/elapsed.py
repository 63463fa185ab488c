"""Time that has passed, also while this machine was suspended."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Elapsed"]

# `time.monotonic` stands still while a machine is suspended, and what others did meanwhile is what matters here.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Elapsed:
    """The time since an instance was made.

    A virtual machine that its host stops may not see that on any of its own clocks before the time of day is set
    right. So the larger of the two differences counts: a time of day that jumps forward makes what is known look older
    than it is, which costs another look and nothing else.
    """

    def __init__(self) -> None:
        self._clock, self._day = time.clock_gettime(_CLOCK), time.time()

    @property
    def seconds(self) -> float:
        return max(time.clock_gettime(_CLOCK) - self._clock, time.time() - self._day)
