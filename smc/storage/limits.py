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

    # One index repeats so many blocks. The format says so; it is not a setting.
    segment: int = 256
    # A reader keeps so many of the entries that it has read, and sorts in so many new ids together.
    remembered: int = 2048
    sorted_in: int = 4096
    # A collector leaves alone what is younger, and a checkpoint that is older is looked at before it is committed.
    young: timedelta = timedelta(minutes=10)
    # A large object comes and goes in requests of so many bytes; one of an upload carries no fewer than the second.
    part: int = 16 * 2**20
    smallest_part: int = 8 * 2**20
    # Training waits so many seconds, before its first step, for a connection to be there.
    opening: float = 5.0


LIMITS = Limits()
