"""Checkpoints of a ledger as bytes: stored under their SHA-256, read whole or in ranges, and verified.

Torch is not imported here: what only uploads starts in a second and stays small.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

from smc.checkpoint.tensor_header import TensorHeader, header_size, merged, model_hash, parse_header
from smc.errors import AccessDenied, ConfigError, Conflict, Corrupt, NotFound
from smc.storage.budget import UploadBudget
from smc.storage.chain import ModelVersion, blob_key
from smc.storage.elapsed import Elapsed
from smc.storage.limits import LIMITS
from smc.storage.objects import Body, ObjectStore
from smc.storage.requests import retried

__all__ = ["Checkpoints"]

_SMALL = 8 * 2**20
# Most headers are smaller; what is read beyond one belongs to the model.
_HEADER_GUESS = 4096
# Checkpoints that are known to be there without asking, because they were just uploaded.
_MOST_UPLOADED = 4096


class Checkpoints:
    """The checkpoints beside one log, on the event loop of their object store.

    `missing` tells why a version's checkpoint is not there: the log says whether it was collected. Every method may
    raise Unavailable after retries, and ConfigError.
    """

    def __init__(
        self,
        objects: ObjectStore,
        *,
        uri: str,
        retry_delays: Sequence[float],
        missing: Callable[[ModelVersion], Awaitable[NotFound]],
    ) -> None:
        self._objects, self._uri, self._retry_delays, self._missing = objects, uri, tuple(retry_delays), missing
        self._budget = UploadBudget()
        self._uploaded: OrderedDict[str, tuple[int, Elapsed]] = OrderedDict()

    async def model(self, version: ModelVersion, *, whole: bool = False) -> tuple[TensorHeader, dict[str, memoryview]]:
        """What inference needs of a checkpoint, verified: its header, and the bytes of the tensors it names.

        They come in ranged reads where the entry has their hash, which is the word of whoever committed it. With
        `whole`, and where the entry has none, all bytes are read and have the SHA-256 in the checkpoint's name.
        Raises: Corrupt, NotFound if it was collected.
        """
        if whole or version.model_hash is None:
            file = memoryview(await self.load(version))
            header = parse_header(file, len(file))
            if version.model_hash not in (None, model_hash(file)):
                raise Corrupt(f"the entry of {version.version_id} does not have the hash of its checkpoint's model")
            return header, {name: file[p.start : p.stop] for name, p in header.for_inference().items()}
        async with self._checkpoint_of(version) as key:
            header, parts, digest = await self._model_parts(key, version.size)
            if digest != version.model_hash:
                raise Corrupt(f"the model of {version.version_id} does not have the hash in its entry")
        return header, parts

    async def _model_parts(self, key: str, size: int) -> tuple[TensorHeader, dict[str, memoryview], str]:
        header, start = await self._header_at(key, size)
        places = header.for_inference()
        digest = hashlib.sha256(start[: header.size])
        parts: dict[str, memoryview] = {}
        for first, last in merged(places.values()):
            here = start[first:last]
            if len(here) < last - first:
                here += await self._range(key, size, first + len(here), last)
            digest.update(here)
            for name, place in places.items():
                if first <= place.start and place.stop <= last:
                    parts[name] = memoryview(here)[place.start - first : place.stop - first]
        return header, parts, digest.hexdigest()

    async def header(self, version: ModelVersion) -> TensorHeader:
        """What a checkpoint says of itself, in one ranged read or two; its hash, which covers more, is not verified.

        Raises: Corrupt, NotFound if it was collected.
        """
        async with self._checkpoint_of(version) as key:
            header, _ = await self._header_at(key, version.size)
        return header

    @asynccontextmanager
    async def _checkpoint_of(self, version: ModelVersion) -> AsyncIterator[str]:
        """The key to read it at; what goes wrong is told with the key, or why it is not there."""
        key = blob_key(version.content_hash)
        try:
            yield key
        except NotFound:
            raise await self._missing(version) from None
        except Corrupt as error:
            raise Corrupt(f"{key}: {error}", ((key, str(error)),)) from None

    async def _header_at(self, key: str, size: int) -> tuple[TensorHeader, bytes]:
        """A file's header, and the bytes that were read with it."""
        start = await self._range(key, size, 0, min(size, _HEADER_GUESS))
        end = header_size(start, size)
        if end > len(start):
            start += await self._range(key, size, len(start), end)
        return parse_header(start, size), start

    async def _range(self, key: str, size: int, start: int, stop: int) -> bytes:
        data = await retried(lambda: self._objects.get_range(key, start, stop), self._retry_delays)
        if len(data) != stop - start:
            raise Corrupt(f"it has {start + len(data)} bytes, its entry says {size}")
        return data

    async def load(self, version: ModelVersion) -> bytes | bytearray:
        """A version's checkpoint, its hash verified. Raises: Corrupt, NotFound if it was collected."""
        key = blob_key(version.content_hash)
        try:
            data, digest = await retried(lambda: self._get_hashed(key, version.size), self._retry_delays)
        except NotFound:
            raise await self._missing(version) from None
        if digest != version.content_hash:
            reason = f"the bytes of {version.version_id} do not have the hash in its name"
            raise Corrupt(f"{key}: {reason}", ((key, reason),))
        return data

    async def _get_hashed(self, key: str, size: int) -> tuple[bytes | bytearray, str]:
        digest = hashlib.sha256()
        data = await self._objects.get(key, size, digest.update)
        return data, digest.hexdigest()

    async def upload(self, data: Body) -> tuple[str, int]:
        """Store a checkpoint under its SHA-256; -> the hash and the size. Equal bytes are stored once.

        Raises: Busy when too much is being uploaded already.
        """
        async with self._budget.share(len(data)):
            digest = await _sha256(data)
            await retried(lambda: self._put_once(blob_key(digest), data), self._retry_delays)
        self.note_uploaded(digest, len(data))
        return digest, len(data)

    def note_uploaded(self, content_hash: str, size: int) -> None:
        """Remember that a checkpoint is there as of now: it is not asked for before it is committed."""
        self._uploaded[content_hash] = size, Elapsed()
        self._uploaded.move_to_end(content_hash)
        while len(self._uploaded) > _MOST_UPLOADED:
            self._uploaded.popitem(last=False)

    async def _put_once(self, key: str, data: Body) -> None:
        if len(data) <= _SMALL:  # one round trip; a large body is not sent before asking
            try:
                await self._objects.create(key, data)
                return
            except Conflict:
                pass
        try:
            there = await self._objects.stat(key)
        except NotFound:
            with suppress(Conflict):  # somebody else was faster
                await self._objects.create(key, data)
            return
        # An old one is written again: a collector leaves alone what is young, and this is about to be committed.
        if there.size == len(data) and datetime.now(UTC) - there.modified < LIMITS.young:
            return
        try:
            await self._objects.put(key, data)
        except AccessDenied:
            # A bucket may allow nobody to overwrite a checkpoint. What is there will do, unless it is being collected,
            # and whoever enters it in the ledger finds that out.
            if there.size != len(data):
                raise

    async def is_there(self, content_hash: str, size: int) -> bool:
        """Whether the checkpoint is there. Raises: ConfigError if it has another size."""
        known, since = self._uploaded.get(content_hash, (size, None))
        if since is None or since.seconds > LIMITS.young.total_seconds():
            try:
                known = (await retried(lambda: self._objects.stat(blob_key(content_hash)), self._retry_delays)).size
            except NotFound:
                self._uploaded.pop(content_hash, None)
                return False
            self.note_uploaded(content_hash, known)
        if known != size:
            raise ConfigError(f"{self._uri}: {blob_key(content_hash)} has {known} bytes, the commit says {size}")
        return True

    async def is_young(self, key: str) -> bool:
        """Whether the object is there, and no collector that looks at it now deletes it."""
        try:
            info = await retried(lambda: self._objects.stat(key), self._retry_delays)
        except NotFound:
            return False
        return datetime.now(UTC) - info.modified < LIMITS.young


async def _sha256(data: Body) -> str:
    if len(data) <= _SMALL // 16:  # a thread would cost more than the hash
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
