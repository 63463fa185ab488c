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

from smc.errors import ConfigError, NotFound
from smc.spool import new_commit_id
from smc.storage.catalog import Catalog
from smc.storage.chain import Draft, ModelVersion, blob_key, is_content_hash, version_id
from smc.storage.objects import ObjectInfo
from smc.storage.requests import retried
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["CollectionPlan", "CollectionResult", "RetentionPolicy", "collect", "plan_collection"]

_AT_ONCE = 16
# Hashes in one entry: an entry is read whole by everybody.
_MOST_HASHES = 1000
# A collector that announced something longer ago than this is not at work any more.
_LONGEST_COLLECTION = timedelta(days=1)


@dataclass(frozen=True)
class RetentionPolicy:
    """Which versions keep their checkpoints. The genesis and every version that an alias names always do.

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
    """What a collection did: checkpoints deleted, and those spared because they had become young or wanted again."""

    deleted: int
    bytes: int
    spared: int


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
    versions = [version for version in catalog.versions if version.content_hash in blobs]
    return CollectionPlan(kept, versions, orphans, young, blobs)


async def collect(
    store: AsyncBlockchainModelStore, policy: RetentionPolicy, plan: CollectionPlan | None = None
) -> CollectionResult:
    """Announce in the log what is to go, then delete it; safe beside commits, tags and other collectors.

    `plan`: what somebody has seen and agreed to; nothing else is deleted. Raises: Unavailable, Corrupt.
    """
    plan = plan or await plan_collection(store, policy)
    await store.ledger.prepare()  # which also renews what a killed writer left stale
    # Also what an earlier collector announced and did not come to: writers know the recent announcements.
    message = f"keeping {len(plan.kept)} versions"
    ours = []
    for hashes in _parts(sorted(plan.blobs)):
        draft = Draft("collect", new_commit_id(), {"content_hashes": hashes, "message": message})
        ours.append((await store.ledger.append(draft)).index)
    catalog = await store.catalog()
    wanted = {catalog.versions[counter].content_hash for counter in policy.reasons(catalog)}
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(content_hash: str) -> int | None:
        """The bytes freed; None if it was spared."""
        if content_hash in wanted or catalog.collected_at(content_hash) is None:
            return None
        async with gate:
            # Each try looks first: the store's uploads rely on a deletion that follows a look within one request.
            return await retried(lambda: _delete_unless_young(store, blob_key(content_hash), policy.min_age))

    results = await asyncio.gather(*(one(content_hash) for content_hash in plan.blobs))
    freed = dict(zip(plan.blobs, results, strict=True))
    spared = {content_hash for content_hash, size in freed.items() if size is None}
    await _revoke(store, catalog, spared | wanted, ours)
    deleted = [size for size in freed.values() if size]
    return CollectionResult(len(deleted), sum(deleted), len(spared))


async def _revoke(store: AsyncBlockchainModelStore, catalog: Catalog, left: set[str], ours: Sequence[int]) -> None:
    """Say in the log which announced checkpoints stay: the announcements were ours, or of collectors long gone."""
    now = datetime.now(UTC)

    def is_over(index: int, at: datetime) -> bool:
        return index in ours or now - at > _LONGEST_COLLECTION

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
        await store.ledger.append(Draft("spare", new_commit_id(), payload))


def _parts(hashes: Sequence[str]) -> list[Sequence[str]]:
    return [hashes[start : start + _MOST_HASHES] for start in range(0, len(hashes), _MOST_HASHES)]


async def _delete_unless_young(store: AsyncBlockchainModelStore, key: str, min_age: timedelta) -> int | None:
    """The bytes freed, 0 if another collector was faster; None if somebody wrote it again meanwhile."""
    try:
        info = await store.objects.stat(key)
    except NotFound:
        return 0
    if datetime.now(UTC) - info.modified < min_age:
        return None
    await store.objects.delete(key)
    return info.size
