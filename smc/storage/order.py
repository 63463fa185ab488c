"""Calls that go on in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Order"]


class Place:
    """One call's place in the order."""

    def __init__(self, before: asyncio.Event | None) -> None:
        self._before, self.left = before, asyncio.Event()

    async def reached(self) -> None:
        """Wait until everybody in front has left."""
        if self._before is not None:
            await self._before.wait()


class Order:
    """Lets calls go on in the order in which they came, whatever each of them had to ask first.

    Whoever leaves its place goes on before the next one does, up to its next pause.
    """

    def __init__(self) -> None:
        self._last: asyncio.Event | None = None

    @contextmanager
    def place(self) -> Iterator[Place]:
        """The next place, which the caller has until it leaves."""
        place = Place(self._last)
        self._last = place.left
        try:
            yield place
        finally:
            place.left.set()
            if self._last is place.left:
                self._last = None
