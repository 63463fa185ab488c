"""Turns between writers: one that is always overtaken asks for room, one without a pause leaves some.

Whoever has just created a block is the first to know where the next one goes, so a writer that never pauses wins every
race. `waiting.json` says that another one waits. It is a hint like head.json: only how long one waits depends on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Final

import orjson

from smc.errors import ConfigError, NotFound, StorageError
from smc.storage.objects import ObjectStore

__all__ = ["WAITING_KEY", "Turns"]

WAITING_KEY: Final = "waiting.json"
# A writer without a pause looks so often whether somebody waits, in seconds, and then lets so many of its own round
# trips go by: one to read what is new, one to append, and as much again for a slower writer.
_LOOK_INTERVAL = 0.25
# A writer that appended nothing for so many seconds leaves room by itself, and again for the first of the next ones.
_IDLE, _BEGINNING = 2.5, 0.75
_ROOM_ROUND_TRIPS = 6
_SHORTEST_ROOM, _LONGEST_ROOM = 0.1, 2.0
# A writer that was overtaken so often asks for room, and again after so many seconds.
_PATIENCE = 2
_ASK_INTERVAL = 0.2

logger = logging.getLogger("smc.storage")


class Turns:
    """One writer's part in taking turns."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._name = uuid.uuid4().hex
        self._asked_at = self._looked_at = self._appended_at = float("-inf")
        self._etag: str | None = None
        self._looking: asyncio.Task[None] | None = None
        self._room_wanted: float | None = None  # the seconds that somebody needs
        self._asked = 0

    async def overtaken(self, times: int, seconds: float) -> None:
        """Another writer was faster, so many times in a row: ask it to leave room, if that goes on.

        `seconds` is how long this writer needs to read what is new and to append.
        """
        if times < _PATIENCE or time.monotonic() - self._asked_at < _ASK_INTERVAL:
            return
        self._asked_at = time.monotonic()
        # What was asked for before was too little: ask for twice as much.
        self._asked = 1 if times <= _PATIENCE else self._asked + 1
        needed = seconds * 2 ** min(self._asked - 1, 8)
        request = orjson.dumps({"writer": self._name, "request": uuid.uuid4().hex, "seconds": needed})
        try:
            await self._objects.put(WAITING_KEY, request)
        except (StorageError, ConfigError) as error:  # who may not write it tries on without
            logger.info("%s not written, other writers do not know that one waits: %s", WAITING_KEY, error)

    def appended(self) -> None:
        """A block was appended: if that goes on without a pause, look beside it whether another writer waits."""
        now, before = time.monotonic(), self._appended_at
        self._appended_at = now
        if now - before > _IDLE:  # it has paused by itself, or has just begun
            self._looked_at = now + _BEGINNING
        due = now - self._looked_at >= _LOOK_INTERVAL
        if due and (self._looking is None or self._looking.done()):
            self._looked_at = now
            self._looking = asyncio.create_task(self._look())

    async def leave_room(self, round_trip: float) -> bool:
        """Wait if another writer has asked for it; -> whether it may have appended something meanwhile.

        `round_trip` is how long a request takes, in seconds.
        """
        if self._room_wanted is None:
            return False
        wanted, self._room_wanted = self._room_wanted, None
        room = max(_ROOM_ROUND_TRIPS * round_trip, wanted, _SHORTEST_ROOM)
        await asyncio.sleep(min(room, _LONGEST_ROOM))
        return True

    def close(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        try:
            changed = await self._objects.get_if_changed(WAITING_KEY, self._etag)
            if changed is not None:
                self._etag = changed[1]
                request = orjson.loads(changed[0])
                if request.get("writer") != self._name:
                    seconds = request.get("seconds")
                    self._room_wanted = float(seconds) if isinstance(seconds, int | float) else 0.0
        except NotFound:
            pass
        except (StorageError, ConfigError, orjson.JSONDecodeError, AttributeError) as error:
            logger.info("%s not read: %s", WAITING_KEY, error)
