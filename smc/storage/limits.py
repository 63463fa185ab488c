"""How much the storage remembers, sends at a time and waits for, on one page.

Tests set these so small that short histories go past each of them. Of a running program nothing else changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

__all__ = ["LIMITS", "Limits"]


@dataclass
class Limits:
    """Bounds of one process."""

    # Blocks that one index repeats: a part of the format, not a setting.
    segment: int = 256
    # Entries that a reader keeps of what it has read, and new ids that it sorts in together.
    remembered: int = 2048
    sorted_in: int = 4096
    # A collector leaves alone what is younger, and a checkpoint that is older is looked at before it is committed.
    young: timedelta = timedelta(minutes=10)
    # Bytes of a request, where an object comes or goes in several, and the least that a request of an upload carries.
    part: int = 16 * 2**20
    smallest_part: int = 8 * 2**20
    # Seconds that training waits, before its first step, for a connection to be there.
    opening: float = 5.0


LIMITS = Limits()
