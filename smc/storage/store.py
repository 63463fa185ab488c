"""The model store: versions of models in one ledger, and the checkpoints they name, as bytes.

Torch is not imported here: what only orders or uploads starts in a second and stays small.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime
from types import TracebackType

from smc.checkpoint.tensor_header import TensorHeader
from smc.errors import ConfigError, Conflict, Corrupt, NotFound
from smc.storage.address import parse_uri
from smc.storage.catalog import Catalog
from smc.storage.chain import Draft, Entry, ModelVersion, blob_key, block_key, check_alias, parse_version_id
from smc.storage.checkpoints import Checkpoints
from smc.storage.elapsed import Elapsed
from smc.storage.ledger import Ledger
from smc.storage.objects import Body, ObjectStore
from smc.storage.order import Order
from smc.storage.requests import RETRY_DELAYS, TimedObjects, retried
from smc.storage.s3 import S3ObjectStore
from smc.storage.spool import CommitRecord, new_commit_id
from smc.storage.verify import Verification, verify_ledger

__all__ = ["AsyncBlockchainModelStore", "StoreCommitter"]

logger = logging.getLogger("smc.storage")

# How often a checkpoint that is being collected is looked at before its commit is given back to the caller.
_LOOKS = 3


class AsyncBlockchainModelStore:
    """Model versions in a tamper-evident, ordered ledger under `bucket` or `s3://bucket/prefix`.

    Endpoint, region and credentials are botocore's: `AWS_ENDPOINT_URL`, `AWS_PROFILE` and the rest.
    Use it as `async with`; nothing is asked of the server before the first call.

    Every method may raise Unavailable (after retries), ConfigError (bucket, credentials) and Corrupt.
    """

    def __init__(
        self,
        bucket: str,
        *,
        endpoint_url: str | None = None,
        objects: ObjectStore | None = None,
        retry_delays: Sequence[float] = RETRY_DELAYS,
        timeout: float = 30.0,
    ) -> None:
        self._bucket, self._prefix = parse_uri(bucket)
        self._endpoint_url, self._given, self._retry_delays = endpoint_url, objects, tuple(retry_delays)
        self._timeout = timeout
        self._exit: AsyncExitStack | None = None
        self._objects: ObjectStore | None = None
        self._ledger: Ledger | None = None
        self._checkpoints: Checkpoints | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._order = Order()
        self._catalog = Catalog()
        self._catalog_lock = asyncio.Lock()

    @property
    def uri(self) -> str:
        """Where the ledger is: s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    async def __aenter__(self) -> AsyncBlockchainModelStore:
        self._exit = AsyncExitStack()
        if self._given is not None:
            self._objects = TimedObjects(self._given, self._timeout)
        else:
            connection = await self._exit.enter_async_context(
                S3ObjectStore(self._bucket, self._prefix, endpoint_url=self._endpoint_url)
            )
            self._objects = TimedObjects(connection, self._timeout)
        self._loop = asyncio.get_running_loop()
        self._ledger = Ledger(self._objects, retry_delays=self._retry_delays, vetted_seconds=self._timeout)
        self._checkpoints = Checkpoints(
            self._objects, uri=self.uri, retry_delays=self._retry_delays, missing=self._missing
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._exit is not None
        assert self._ledger is not None
        try:
            await self._ledger.close()
        finally:
            await self._exit.aclose()
            self._exit = self._objects = self._ledger = self._checkpoints = None

    def another(self) -> AsyncBlockchainModelStore:
        """The same ledger, unopened: for another thread or event loop."""
        return AsyncBlockchainModelStore(
            f"s3://{self._bucket}/{self._prefix}".rstrip("/"),
            endpoint_url=self._endpoint_url,
            objects=self._given,
            retry_delays=self._retry_delays,
            timeout=self._timeout,
        )

    @asynccontextmanager
    async def committer(self) -> AsyncIterator[StoreCommitter]:
        """A connection of its own for background commits, on the loop that enters it."""
        async with self.another() as own:
            yield StoreCommitter(own)

    @property
    def ledger(self) -> Ledger:
        """The append pipeline underneath. Raises: ConfigError outside `async with`."""
        self._check_open()
        assert self._ledger is not None
        return self._ledger

    def _check_open(self) -> None:
        if self._ledger is None:
            raise ConfigError("the store is not open: use `async with AsyncBlockchainModelStore(...) as store`")
        with suppress(RuntimeError):  # outside a loop nothing is asked of the server
            if asyncio.get_running_loop() is not self._loop:
                raise ConfigError(
                    "the store was opened on another event loop, to which its connections belong: open one for this "
                    "loop, `async with store.another() as own`"
                )

    @property
    def timeout(self) -> float:
        """The seconds after which a request of this store has ended, apart from what a large body takes."""
        return self._timeout

    @property
    def objects(self) -> ObjectStore:
        """The object store underneath."""
        self._check_open()
        assert self._objects is not None
        return self._objects

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints beside the log, by hash. Raises: ConfigError outside `async with`."""
        self._check_open()
        assert self._checkpoints is not None
        return self._checkpoints

    async def require(self) -> None:
        """Raises: NotFound if there is no ledger here, not even an empty one."""
        if not await self.ledger.is_there():
            raise NotFound(f"there is no ledger at {self.uri}: neither a log nor a head.json")

    async def get_head(self) -> ModelVersion | None:
        """The newest version, or None in an empty ledger."""
        entry = await self.ledger.newest_version()
        return entry.version if entry else None

    async def get_version(self, version_id: str) -> ModelVersion:
        """A version by name, like 'v0000000003'. Raises: NotFound, ConfigError for a malformed name."""
        entry = await self.ledger.find_version(parse_version_id(version_id))
        if entry is None or entry.version is None:
            head = await self.get_head()
            newest = "it is empty" if head is None else f"its newest version is {head.version_id}"
            raise NotFound(f"{self.uri} has no version {version_id}: {newest}")
        return entry.version

    async def list_versions(self) -> list[ModelVersion]:
        """Every version, in order."""
        return [v for entry in await self.list_entries() if (v := entry.version) is not None]

    async def list_entries(self) -> list[Entry]:
        """Every entry of the log, in order."""
        tail = await self.ledger.refresh()
        blocks = await self.ledger.read_blocks(0, tail.block, end_hash=tail.parent_hash)
        return [entry for block in blocks for entry in block]

    async def catalog(self) -> Catalog:
        """Versions, aliases and collections as of now. What was read before is not read again.

        Raises: Corrupt if the log does not continue what was read before: it was cut off, or another one put in its
        place.
        """
        async with self._catalog_lock:
            tail, known = await self.ledger.refresh(), self._catalog.tail
            if tail.block < known.block or (tail.block == known.block and tail.parent_hash != known.parent_hash):
                key, reason = block_key(known.block - 1), f"entry {known.index - 1}, which was there, is not any more"
                raise Corrupt(f"{key}: {reason}", ((key, reason),))
            for block in await self.ledger.read_blocks(known.block, tail.block, end_hash=tail.parent_hash):
                self._catalog.apply(block)
        return self._catalog

    async def catalog_at(self, time: datetime) -> Catalog:
        """What the ledger said at a time: all that stands before the first entry of a later time.

        The times are those of the machines that appended. Where their clocks differ, an entry that says an earlier time
        may stand behind one of a later time, and is then left out with a warning in the log of this program.
        Raises: NotFound if the ledger had no entry yet.
        """
        tail = await self.ledger.refresh()
        blocks = await self.ledger.read_blocks(0, tail.block, end_hash=tail.parent_hash)
        then, behind, later = Catalog(), 0, False
        for block in blocks:
            until = next((place for place, entry in enumerate(block) if later or entry.time > time), len(block))
            if until:
                then.apply(block[:until])
            later = later or until < len(block)
            behind += sum(entry.time <= time for entry in block[until:])
        if behind:
            logger.warning("%d entries say a time before %s and stand behind one of a later time", behind, time)
        if then.tail.index == 0:
            first = f"its first entry is of {blocks[0][0].time:%Y-%m-%d %H:%M:%S} UTC" if blocks else "it is empty"
            raise NotFound(f"{self.uri} had no entry at {time:%Y-%m-%d %H:%M:%S} UTC: {first}")
        return then

    async def resolve(self, reference: str) -> ModelVersion:
        """The version meant by a name, an alias, `head`, `head:EXPERIMENT` or a hash's beginning.

        Raises: NotFound, ConfigError.
        """
        return (await self.catalog()).resolve(reference)

    async def tag(self, alias: str, version: ModelVersion, message: str = "") -> Entry:
        """Let an alias name this version from now on; -> the entry that says so.

        Raises: ConfigError for a name that cannot be one, NotFound if the version's checkpoint is gone, Conflict if it
        is being collected.
        """
        check_alias(alias)
        collected_at = (await self.catalog()).collected_at(version.content_hash)
        if collected_at is None:
            try:
                await retried(lambda: self.objects.stat(blob_key(version.content_hash)), self._retry_delays)
                return await self._move(alias, version, message)
            except (Conflict, NotFound) as error:
                # Whoever collects looks for aliases after announcing it: one of the two sees the other.
                collected_at = (await self.catalog()).collected_at(version.content_hash)
                if isinstance(error, NotFound) and collected_at is None:
                    raise await self._missing(version) from None
        raise Conflict(
            f"{version.version_id} cannot be tagged: entry {collected_at} announced that its checkpoint is deleted"
        )

    async def untag(self, alias: str, message: str = "") -> Entry:
        """Let an alias name nothing any more. Raises: NotFound if it names nothing."""
        aliases = (await self.catalog()).aliases
        if alias not in aliases:
            raise NotFound(f"{self.uri} has no alias {alias!r}: there are {', '.join(aliases) or 'none'}")
        return await self._move(alias, None, message)

    async def _move(self, alias: str, version: ModelVersion | None, message: str) -> Entry:
        payload = {
            "alias": alias,
            "counter": version.counter if version else None,
            "content_hash": version.content_hash if version else None,
            "message": message,
        }
        return await self.ledger.append(Draft("tag", new_commit_id(), payload, fresh=True))

    async def load_model(
        self, version: ModelVersion, *, whole: bool = False
    ) -> tuple[TensorHeader, dict[str, memoryview]]:
        """What inference needs of a checkpoint, verified: its header, and the bytes of the tensors it names.

        They come in ranged reads where the entry has their hash, which is the word of whoever committed it. With
        `whole`, and where the entry has none, all bytes are read and have the SHA-256 in the checkpoint's name.
        Raises: Corrupt, NotFound if it was collected.
        """
        return await self.checkpoints.model(version, whole=whole)

    async def load_header(self, version: ModelVersion) -> TensorHeader:
        """What a checkpoint says of itself, in one ranged read or two; its hash, which covers more, is not verified.

        Raises: Corrupt, NotFound if it was collected.
        """
        return await self.checkpoints.header(version)

    async def load_checkpoint(self, version: ModelVersion) -> bytes | bytearray:
        """A version's checkpoint, its hash verified. Raises: Corrupt, NotFound if it was collected."""
        return await self.checkpoints.load(version)

    async def _missing(self, version: ModelVersion) -> NotFound:
        collected_at = (await self.catalog()).collected_at(version.content_hash)
        why = "is not there" if collected_at is None else f"was collected, says entry {collected_at}"
        return NotFound(f"{self.uri}: the checkpoint of {version.version_id} {why} ({blob_key(version.content_hash)})")

    async def upload(self, data: Body) -> tuple[str, int]:
        """Store a checkpoint under its SHA-256; -> the hash and the size. Equal bytes are stored once.

        Raises: Busy when too much is being uploaded already.
        """
        return await self.checkpoints.upload(data)

    def note_uploaded(self, content_hash: str, size: int) -> None:
        """Remember that a checkpoint is there as of now: it is not asked for before it is committed."""
        self.checkpoints.note_uploaded(content_hash, size)

    async def append_commit(
        self, record: CommitRecord, content_hash: str, size: int, *, fresh: bool = False
    ) -> ModelVersion:
        """Enter an uploaded checkpoint in the ledger. A commit_id that is there already is not entered again.

        `fresh`: the record was made after this store was opened, and nobody else submits it. Raises: Conflict if the
        checkpoint is not there, because it was never uploaded or was collected since: upload it again; ConfigError if
        its size is another, if the entry would be too large, or if the commit_id names another checkpoint.
        """
        payload: Mapping[str, object] = {
            "content_hash": content_hash,
            "size": size,
            **record.model_dump(include={"experiment", "step", "loss", "metrics", "message", "resumed_from"}),
        }
        optional = record.model_dump(include={"model_hash", "parameters", "plan_end", "pruned"})
        payload = {**payload, **{name: value for name, value in optional.items() if value}}
        draft = Draft("commit", record.commit_id, payload, fresh=fresh)
        with self._order.place() as place:
            there = await self.checkpoints.is_there(content_hash, size)
            await place.reached()
        entry = None if there else await self.ledger.find(record.commit_id)
        if entry is None and not there:
            reason = "was never uploaded, or was collected between its upload and its entry: upload it again"
            raise Conflict(f"{self.uri}: {blob_key(content_hash)} {reason}")
        entry = entry or await self._entered(draft, blob_key(content_hash))
        version = entry.version
        if version is None:
            raise ConfigError(f"commit_id {record.commit_id!r} belongs to a {entry.kind} entry")
        if version.content_hash != content_hash:
            raise ConfigError(
                f"commit_id {record.commit_id!r} belongs to {version.version_id}, which names "
                f"{blob_key(version.content_hash)} and not {blob_key(content_hash)}: an id is for one checkpoint"
            )
        return version

    async def _entered(self, draft: Draft, key: str) -> Entry:
        try:
            return await self.ledger.append(draft)
        except Conflict:
            pass
        # An equal one is being collected. A collector that has not seen this entry deletes only what it has looked at
        # within the time of one request, by the next request; one that looks later sees that it is young.
        await asyncio.sleep(3 * max(self._timeout, self.ledger.collector_seconds))
        for _ in range(_LOOKS):
            vetted = Elapsed()
            if not await self.checkpoints.is_young(key):
                break
            try:
                return await self.ledger.append(replace(draft, vetted=vetted))
            except Conflict:  # the append had to wait for longer than the look is worth
                continue
        reason = "was collected between its upload and its entry, or may still be: upload it again"
        raise Conflict(f"{self.uri}: {key} {reason}")

    async def commit(self, data: Body, record: CommitRecord, *, fresh: bool = False) -> ModelVersion:
        """Upload a checkpoint and enter it in the ledger. Arguments and errors as for `append_commit`."""
        try:
            return await self.append_commit(record, *await self.upload(data), fresh=fresh)
        except Conflict:
            return await self.append_commit(record, *await self.upload(data), fresh=fresh)

    async def verify(
        self, *, blobs: bool = False, full: bool = False, since: tuple[int | None, str] | None = None
    ) -> Verification:
        """Check the whole ledger; see `smc.storage.verify`."""
        await self.ledger.publish()
        return await verify_ledger(self.objects, blobs=blobs, full=full, since=since)


class StoreCommitter:
    """Carries out background commits on an open store; see `smc.storage.commits.Committer`."""

    def __init__(self, store: AsyncBlockchainModelStore) -> None:
        self._store = store

    async def put(self, data: memoryview) -> memoryview:
        """It is uploaded from where it is."""
        return data

    async def upload(self, data: Body) -> tuple[str, int]:
        return await self._store.upload(data)

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        # A record comes here from the process that made it, while it has this store open.
        return (await self._store.append_commit(record, content_hash, size, fresh=True)).version_id

    def settled(self, outcome: object, experiment: str) -> None:
        """Nobody watches a store in process: the TrainingResult says it."""
