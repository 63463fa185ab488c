"""Garbage collection: checkpoints that a policy does not keep are deleted; the log, their history, stays.

A collector says in the log what it is about to delete, reads the log up to there, and spares what somebody committed
or tagged meanwhile. Killed at any point it leaves a ledger that verifies, and the next collector goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from smc.errors import ConfigError, Corrupt, NotFound
from smc.storage.catalog import Catalog
from smc.storage.chain import Draft, Entry, ModelVersion, blob_key, block_key, is_content_hash, version_id
from smc.storage.elapsed import Elapsed
from smc.storage.objects import ObjectInfo
from smc.storage.reader import LONGEST_COLLECTION
from smc.storage.requests import retried
from smc.storage.spool import new_commit_id
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["CollectionPlan", "CollectionResult", "RetentionPolicy", "collect", "plan_collection"]

_AT_ONCE = 16
# Hashes in one entry, which has 64,000 bytes at most.
_MOST_HASHES = 900
# Others take a collector that announced something a day ago for one that is not at work any more.
_LONGEST_WORK = LONGEST_COLLECTION.total_seconds() / 4
# How often a checkpoint is looked at before it is left for another collection, because each look took too long.
_LOOKS = 5


@dataclass(frozen=True)
class RetentionPolicy:
    """Which versions keep their checkpoints. The genesis and every version that an alias names always do.

    `keep_once_named`: also what an alias named earlier, so that a price of that time can be computed again.
    `keep_last`: the newest so many, of all experiments together, at least 1. `keep_heads`: the newest of each
    experiment, from which a sweep would go on. `keep_lineage`: whatever a kept version was resumed from, and so on.
    `protect`: these too, by counter. Nothing younger than `min_age` is deleted: it may belong to a commit under way.
    Raises: ConfigError.
    """

    keep_last: int
    protect: frozenset[int] = frozenset()
    keep_heads: bool = True
    keep_lineage: bool = False
    min_age: timedelta = timedelta(hours=1)
    keep_once_named: bool = True

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"the number of versions to keep must be at least 1, got {self.keep_last}")
        if self.min_age < timedelta(0):
            raise ConfigError(f"min_age must not be negative, got {self.min_age}")

    def reasons(self, catalog: Catalog) -> dict[int, str]:
        """Why each kept version is kept, by its counter. Raises: NotFound for a protected one that is not there."""
        for counter in sorted(self.protect):
            if counter >= len(catalog.versions):
                raise NotFound(f"cannot protect {version_id(counter)}: the ledger has {len(catalog.versions)} versions")
        kept: dict[int, str] = {}
        if catalog.versions:
            kept[0] = "the genesis"
        for version in catalog.versions[-self.keep_last :]:
            kept.setdefault(version.counter, f"among the last {self.keep_last}")
        for counter in self.protect:
            kept.setdefault(counter, "protected")
        for alias, version in catalog.aliases.items():
            kept.setdefault(version.counter, f"alias {alias}")
        for alias, versions in catalog.ever_named.items() if self.keep_once_named else ():
            for version in versions:
                kept.setdefault(version.counter, f"alias {alias} named it once")
        for name, version in (*catalog.heads.items(), *catalog.furthest.items()) if self.keep_heads else ():
            kept.setdefault(version.counter, f"the newest of {name}" if name else "the newest without an experiment")
        if self.keep_lineage:
            by_name = {version.version_id: version for version in catalog.versions}
            for counter in list(kept):
                version = catalog.versions[counter]
                # An origin that is not before a version is of another ledger, from which it was resumed.
                while (origin := by_name.get(version.resumed_from or "")) and origin.counter < version.counter:
                    kept.setdefault(origin.counter, f"{version.version_id} resumed from it")
                    version = origin
        return kept


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection would delete as of now: versions that have their checkpoint, and uploads no version names."""

    kept: Mapping[int, str]
    versions: Sequence[ModelVersion]
    orphans: Sequence[ObjectInfo]
    young: int  # others that are only too young
    blobs: Mapping[str, ObjectInfo] = field(repr=False)  # everything to delete, by content hash

    @property
    def bytes(self) -> int:
        """How much space it would free."""
        return sum(info.size for info in self.blobs.values())


@dataclass(frozen=True)
class CollectionResult:
    """What a collection did: checkpoints deleted, and those spared because they had become young or wanted again.

    `freed` is False where the bucket has versioning: what was deleted is hidden, and takes its space until the bucket's
    lifecycle removes earlier versions.
    """

    deleted: int
    bytes: int
    spared: int
    freed: bool = True


async def plan_collection(store: AsyncBlockchainModelStore, policy: RetentionPolicy) -> CollectionPlan:
    """What `collect` would delete. Changes nothing. Raises: NotFound for a protected version that is not there."""
    catalog = await store.catalog()
    kept = policy.reasons(catalog)
    wanted = {catalog.versions[counter].content_hash for counter in kept}
    by_hash = {version.content_hash: version for version in catalog.versions}
    blobs: dict[str, ObjectInfo] = {}
    orphans, young = [], 0
    now = datetime.now(UTC)
    async for info in store.objects.list("blobs/"):
        content_hash = info.key.removeprefix("blobs/").removesuffix(".safetensors")
        if not is_content_hash(content_hash) or content_hash in wanted:  # what is not a checkpoint is not ours
            continue
        if now - info.modified < policy.min_age:
            young += 1
            continue
        blobs[content_hash] = info
        if content_hash not in by_hash:
            orphans.append(info)
    if blobs and not catalog.versions:
        reason = f"there are {len(blobs)} checkpoints and no version: the log is gone, or another ledger's"
        raise Corrupt(f"log/: {reason}; nothing is deleted", (("log/", reason),))
    versions = [version for version in catalog.versions if version.content_hash in blobs]
    return CollectionPlan(kept, versions, orphans, young, blobs)


async def collect(
    store: AsyncBlockchainModelStore, policy: RetentionPolicy, plan: CollectionPlan | None = None
) -> CollectionResult:
    """Announce in the log what is to go, then delete it; safe beside commits, tags and other collectors.

    `plan`: what somebody has seen and agreed to; nothing else is deleted. What cannot be deleted in six hours is left
    for another collection. Raises: Unavailable, Corrupt.
    """
    plan = plan or await plan_collection(store, policy)
    await store.ledger.prepare()  # which also renews what a killed writer left stale
    # Also what an earlier collector announced and did not come to: writers know the recent announcements.
    message = f"keeping {len(plan.kept)} versions"
    told = {"message": message, "request_seconds": store.timeout}
    drafts = [
        Draft("collect", new_commit_id(), {"content_hashes": hashes, **told}, fresh=True)
        for hashes in _parts(sorted(plan.blobs))
    ]
    announced = [await store.ledger.append(draft) for draft in drafts]
    collector = _Collector(store, policy)
    if announced:
        await collector.begin(announced[-1])
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(content_hash: str) -> int | None:
        async with gate:
            return await retried(lambda: collector.delete(content_hash))

    results = await asyncio.gather(*(one(content_hash) for content_hash in plan.blobs))
    freed = dict(zip(plan.blobs, results, strict=True))
    spared = {content_hash for content_hash, size in freed.items() if size is None}
    catalog = await collector.read()
    await _revoke(store, catalog, spared | collector.wanted, [entry.index for entry in announced])
    deleted = [size for size in freed.values() if size]
    return CollectionResult(len(deleted), sum(deleted), len(spared), collector.freed)


class _Collector:
    """Deletes one checkpoint after the other, and only on what it has just seen.

    A commit that this collector does not know of is a danger for as long as it does not know of it: somebody may upload
    an equal checkpoint again, see that it is young, and enter it in the ledger. So neither the log nor the checkpoint
    may have been looked at longer ago than one request takes when the next request deletes it, however long this
    process, its machine or its server slept. Writers that were told of the announcement wait for longer than that.
    """

    def __init__(self, store: AsyncBlockchainModelStore, policy: RetentionPolicy) -> None:
        self._store, self._policy = store, policy
        self._reading = asyncio.Lock()
        self._begun = self._read_at = Elapsed()
        self._started = datetime.now(UTC)
        self._catalog = Catalog()
        self.wanted: set[str] = set()
        self.freed = True

    async def begin(self, announced: Entry) -> None:
        """Take the server's time from the block that announces this collection, and read the log."""
        self._begun = Elapsed()
        # Ages are by the clock that dates the checkpoints: the one of this machine may be wrong.
        info = await retried(lambda: self._store.objects.stat(block_key(announced.block)))
        self._started = info.modified
        await self.read()

    async def read(self) -> Catalog:
        """Read what was appended since, and what is wanted now."""
        async with self._reading:
            read_at = Elapsed()
            self._catalog = await self._store.catalog()
            self.wanted = {self._catalog.versions[c].content_hash for c in self._policy.reasons(self._catalog)}
            self._read_at = read_at
            return self._catalog

    async def delete(self, content_hash: str) -> int | None:
        """The bytes freed, 0 if another collector was faster; None if it is wanted, young, or not to be decided."""
        key = blob_key(content_hash)
        for _ in range(_LOOKS):
            looked = Elapsed()
            try:
                info = await self._store.objects.stat(key)
            except NotFound:
                return 0
            if self._is_old_news(self._read_at):
                await self.read()
            unwanted = content_hash not in self.wanted and self._catalog.collected_at(content_hash) is not None
            if not unwanted or self._age(info) < self._policy.min_age or self._begun.seconds > _LONGEST_WORK:
                return None
            if not self._is_old_news(looked) and not self._is_old_news(self._read_at):
                self.freed &= await self._store.objects.delete(key) is not False
                return info.size
        return None

    def _is_old_news(self, looked: Elapsed) -> bool:
        return looked.seconds > self._store.timeout

    def _age(self, info: ObjectInfo) -> timedelta:
        return self._started + timedelta(seconds=self._begun.seconds) - info.modified


async def _revoke(store: AsyncBlockchainModelStore, catalog: Catalog, left: set[str], ours: Sequence[int]) -> None:
    """Say in the log which announced checkpoints stay: the announcements were ours, or of collectors long gone."""
    now = datetime.now(UTC)

    def is_over(index: int, at: datetime) -> bool:
        return index in ours or now - at > LONGEST_COLLECTION

    candidates = [
        content_hash
        for content_hash in sorted(left)
        if catalog.collected_at(content_hash) is not None
        and all(is_over(index, at) for index, at in catalog.announcements(content_hash).items())
    ]
    there = []
    for content_hash in candidates:
        with suppress(NotFound):
            await retried(lambda: store.objects.stat(blob_key(content_hash)))  # noqa: B023  awaited here
            there.append(content_hash)
    for hashes in _parts(there):
        payload = {"content_hashes": hashes, "through": catalog.tail.index - 1}
        await store.ledger.append(Draft("spare", new_commit_id(), payload, fresh=True))


def _parts(hashes: Sequence[str]) -> list[Sequence[str]]:
    return [hashes[start : start + _MOST_HASHES] for start in range(0, len(hashes), _MOST_HASHES)]
