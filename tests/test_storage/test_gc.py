"""Collection: what goes, what stays, and that a ledger verifies wherever a collector is killed."""

from __future__ import annotations

import asyncio
import random
import runpy
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from smc.errors import ConfigError, Conflict, NotFound, SpectralMCError
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.chain import Draft, blob_key, block_key, build_block
from smc.storage.gc import CollectionPlan, RetentionPolicy, collect, plan_collection
from smc.storage.objects import MemoryObjectStore, ObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS
from tests.faults import FAULTS, FaultStore

Opener = Callable[[], AsyncBlockchainModelStore]
AT_ONCE = timedelta(0)


def opened(objects: ObjectStore, answers_within: float = 0.1) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS, timeout=answers_within)


def content(name: str) -> bytes:
    return f"checkpoint {name}".encode()


async def commit(store: AsyncBlockchainModelStore, name: str, experiment: str = "a", **changes: Any) -> ModelVersion:
    record = CommitRecord(ledger="x", commit_id=name, message=name, step=1, loss=None, experiment=experiment, **changes)
    return await store.commit(content(name.split("_")[0]), record)


def grow_old(objects: MemoryObjectStore, age: timedelta = timedelta(hours=2)) -> None:
    """Everything stored so far was stored earlier."""
    objects.objects = {key: (data, modified - age) for key, (data, modified) in objects.objects.items()}


def names(plan: CollectionPlan) -> list[int]:
    return [version.counter for version in plan.versions]


async def test_what_a_policy_keeps_stays_and_the_rest_goes(make_store: Opener) -> None:
    async with make_store() as store:
        versions = [await commit(store, str(i), "one" if i < 6 else "two") for i in range(10)]
        await store.tag("best", versions[4])
        await store.upload(b"an upload that nobody committed")
        policy = RetentionPolicy(keep_last=2, protect=frozenset({1}), min_age=AT_ONCE)
        plan = await plan_collection(store, policy)
        assert names(plan) == [2, 3, 6, 7]
        assert [info.size for info in plan.orphans] == [31]
        assert plan.bytes == 31 + sum(versions[i].size for i in (2, 3, 6, 7))
        assert plan.kept == {
            0: "the genesis",
            1: "protected",
            4: "alias best",
            5: "the newest of one",
            8: "among the last 2",
            9: "among the last 2",
        }
        result = await collect(store, policy, plan)
        assert (result.deleted, result.bytes, result.spared) == (5, plan.bytes, 0)
        assert names(await plan_collection(store, policy)) == []
        report = await store.verify(blobs=True)
        assert report.ok, report.problems
        assert (report.versions, report.blobs, report.collected) == (10, 6, 4)
        for i in plan.kept:
            assert await store.load_checkpoint(versions[i]) == content(str(i))
        with pytest.raises(NotFound, match="the checkpoint of v0000000002 was collected, says entry 11"):
            await store.load_checkpoint(versions[2])
        assert [v.counter for v in await store.list_versions()] == list(range(10))


async def test_a_lineage_is_kept_when_asked() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i, origin in enumerate([None, None, "v0000000001", None, "v0000000002", None]):
            await commit(store, str(i), "a", resumed_from=origin)
        await store.tag("best", await store.resolve("4"))
        grow_old(objects)
        assert names(await plan_collection(store, RetentionPolicy(keep_last=1))) == [1, 2, 3]
        kept = RetentionPolicy(keep_last=1, keep_lineage=True)
        assert names(await plan_collection(store, kept)) == [3]
        catalog = await store.catalog()
        assert kept.reasons(catalog)[1] == "v0000000002 resumed from it"
        without_heads = RetentionPolicy(keep_last=1, keep_heads=False)
        assert names(await plan_collection(store, without_heads)) == [1, 2, 3]


async def test_what_is_young_and_what_equals_something_kept_stays() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await commit(store, "same")
        for i in range(3):
            await commit(store, str(i))
        await commit(store, "same_again")
        policy = RetentionPolicy(keep_last=1, min_age=timedelta(hours=1))
        plan = await plan_collection(store, policy)
        assert (names(plan), plan.young, plan.bytes) == ([], 3, 0)
        grow_old(objects)
        plan = await plan_collection(store, policy)
        assert names(plan) == [1, 2, 3]
        # After the preview, one is written again and one is tagged: both are spared.
        await store.objects.put(blob_key(plan.versions[0].content_hash), content("0"))
        await store.tag("wanted", plan.versions[1])
        result = await collect(store, policy, plan)
        assert (result.deleted, result.spared) == (1, 2)
        assert (await store.verify(blobs=True)).ok


async def test_what_was_spared_can_be_tagged_and_missed_again() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        versions = [await commit(store, str(i)) for i in range(6)]
        grow_old(objects)
        policy = RetentionPolicy(keep_last=1)
        plan = await plan_collection(store, policy)
        await store.tag("wanted", versions[2])
        assert (await collect(store, policy, plan)).spared == 1
        catalog = await store.catalog()
        assert [v.counter for v in catalog.versions if catalog.collected_at(v.content_hash) is not None] == [1, 3, 4]
        await store.tag("again", versions[2])
        await store.untag("again")
        await store.untag("wanted")
        assert (await store.verify(blobs=True)).ok
        await store.objects.delete(blob_key(versions[2].content_hash))
        reason = "the checkpoint of v0000000002 is missing"
        assert (await store.verify()).problems == [(blob_key(versions[2].content_hash), reason)]


async def test_announcements_of_a_collector_that_was_killed_are_taken_back_after_a_day() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        versions = [await commit(store, str(i)) for i in range(4)]
        hashes = [v.content_hash for v in versions]
        await store.ledger.append(Draft("collect", "killed", {"content_hashes": hashes}))
    grow_old(objects)
    keep_all = RetentionPolicy(keep_last=9)
    async with opened(objects) as store:
        await collect(store, keep_all)
        with pytest.raises(Conflict):  # it may still be at work
            await store.tag("best", versions[2])
    old = {key: (data, at) for key, (data, at) in objects.objects.items() if not key.startswith("log/0000000004")}
    objects.objects = old
    async with opened(objects) as store:
        block = build_block(
            await store.ledger.refresh(),
            [Draft("collect", "killed", {"content_hashes": hashes})],
            datetime.now(UTC) - timedelta(days=2),
        )
        await store.objects.create(block_key(4), block)
        await collect(store, keep_all)
        await store.tag("best", versions[2])
        catalog = await store.catalog()
        assert all(catalog.collected_at(content_hash) is None for content_hash in hashes)
        assert (await store.verify(blobs=True)).ok


async def test_what_is_no_checkpoint_is_left_alone() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i in range(4):
            await commit(store, str(i))
        await store.objects.put("blobs/backup/model.safetensors", b"somebody's")
        grow_old(objects)
        assert (await collect(store, RetentionPolicy(keep_last=1))).deleted == 2
        assert "blobs/backup/model.safetensors" in objects.objects
        assert (await commit(store, "5")).counter == 4


async def test_an_origin_of_another_ledger_keeps_nothing() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i in range(5):
            await commit(store, str(i), resumed_from="v0000000002")
        grow_old(objects)
        plan = await plan_collection(store, RetentionPolicy(keep_last=1, keep_lineage=True))
        assert names(plan) == [1, 3]


async def test_verification_beside_a_collection_finds_nothing_wrong() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i in range(8):
            await commit(store, str(i))
        await store.ledger.close()
    grow_old(objects)

    class Collecting(FaultStore):
        """Somebody collects between the log's listing and the checkpoints', or after it."""

        def __init__(self, when: str) -> None:
            super().__init__(objects, lambda call, operation, key: None)
            self.when = when

        async def list(self, prefix: str) -> Any:
            if prefix == "blobs/" and self.when == "before":
                await self.collect()
            infos = [info async for info in self.inner.list(prefix)]
            if prefix == "blobs/" and self.when == "after":
                await self.collect()
            for info in infos:
                yield info

        async def collect(self) -> None:
            async with opened(objects) as other:
                await collect(other, RetentionPolicy(keep_last=1))

    whole = dict(objects.objects)
    for when in ("before", "after"):
        objects.objects = dict(whole)
        async with opened(Collecting(when)) as store:
            report = await store.verify(blobs=True)
        assert report.ok, report.problems
        assert report.collected == 6


async def test_a_writer_that_slept_uploads_again() -> None:
    """Between its upload and its entry hours went by, and a collector has announced its checkpoint."""
    objects = MemoryObjectStore()
    async with opened(objects) as store, opened(objects) as collector:
        await commit(store, "first")
        digest, size = await store.upload(b"slept")
        await collector.ledger.append(Draft("collect", "c", {"content_hashes": [digest]}))
        grow_old(objects)
        with pytest.raises(Conflict, match="upload it again"):
            await store.append_commit(CommitRecord(ledger="x", message="m", step=1, loss=None), digest, size)


async def test_the_independent_verifier_knows_aliases_and_collections(tmp_path: Path) -> None:
    verify = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "verify_ledger.py"))["verify"]
    scene = Scene()
    await scene.prepare()
    await scene.collect(scene.objects)

    def problems() -> list[tuple[str, str]]:
        for key, (data, _) in scene.objects.objects.items():
            (tmp_path / key).parent.mkdir(exist_ok=True)
            (tmp_path / key).write_bytes(data)
        return list(verify(tmp_path)[2])

    assert problems() == []
    async with opened(scene.objects) as store:
        catalog = await store.catalog()
        gone = next(v for v in catalog.versions if catalog.collected_at(v.content_hash))
        payload = {"alias": "x", "counter": 3, "content_hash": gone.content_hash[::-1], "message": ""}
        await store.ledger.append(Draft("tag", "wrong", payload))
        await store.append_commit(
            CommitRecord(ledger="x", message="", step=1, loss=None), catalog.versions[0].content_hash, 12
        )
    assert [reason for _, reason in problems()] == ["entry 12 lets an alias name what is not before it"]
    del scene.objects.objects[blob_key((await _first(scene)).content_hash)]
    (tmp_path / blob_key((await _first(scene)).content_hash)).unlink()
    assert problems()[1:] == [(blob_key((await _first(scene)).content_hash), "missing")]


async def _first(scene: Scene) -> ModelVersion:
    async with opened(scene.objects) as store:
        return await store.get_version("v0000000000")


async def test_wrong_policies_are_refused(make_store: Opener) -> None:
    with pytest.raises(ConfigError, match="versions to keep must be at least 1, got 0"):
        RetentionPolicy(keep_last=0)
    with pytest.raises(ConfigError, match="min_age must not be negative"):
        RetentionPolicy(keep_last=1, min_age=timedelta(seconds=-1))
    async with make_store() as store:
        await commit(store, "0")
        with pytest.raises(NotFound, match="cannot protect v0000000005: the ledger has 1 versions"):
            await plan_collection(store, RetentionPolicy(keep_last=1, protect=frozenset({5})))
        assert (await collect(store, RetentionPolicy(keep_last=1, min_age=AT_ONCE))).deleted == 0
        assert len(await store.list_entries()) == 1  # nothing to collect, nothing to say


async def test_a_missing_checkpoint_is_excused_only_by_a_collection_after_its_last_commit() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        version = await commit(store, "a")
        await store.ledger.append(Draft("collect", "c", {"content_hashes": [version.content_hash]}))
        await commit(store, "a_again")
        await store.objects.delete(blob_key(version.content_hash))
        report = await store.verify()
        assert [key for key, _ in report.problems] == [blob_key(version.content_hash)]


async def test_a_commit_whose_equal_was_collected_under_it_uploads_again() -> None:
    """The collector looked before the upload and deletes after it: the worst moment."""
    objects = MemoryObjectStore()
    async with opened(objects) as store, opened(objects) as collector:
        old = await commit(store, "same")
        await commit(store, "newer")
        await collector.ledger.append(Draft("collect", "c", {"content_hashes": [old.content_hash]}))
        await store.ledger.refresh()
        grow_old(objects)

        async def deletes_late() -> None:
            while datetime.now(UTC) - objects.objects[blob_key(old.content_hash)][1] > timedelta(hours=1):
                await asyncio.sleep(0)
            await collector.objects.delete(blob_key(old.content_hash))

        late = asyncio.create_task(deletes_late())
        again = await commit(store, "same_again")
        await late
        assert await store.load_checkpoint(again) == content("same")
        assert (await store.verify(blobs=True)).ok
        await collector.ledger.append(Draft("collect", "d", {"content_hashes": [old.content_hash]}))
        await store.objects.delete(blob_key(old.content_hash))
        with pytest.raises(Conflict, match="was collected between its upload and its entry"):
            await store.append_commit(
                CommitRecord(ledger="x", message="m", step=1, loss=None), old.content_hash, len(content("same"))
            )


class Scene:
    """A ledger with something to collect, and a busy hour around its collection."""

    POLICY = RetentionPolicy(keep_last=3, protect=frozenset({2}))

    def __init__(self, answers_within: float = 0.1) -> None:
        self.objects, self._within = MemoryObjectStore(), answers_within
        self.acknowledged: list[ModelVersion] = []
        self.tagged: dict[str, ModelVersion] = {}

    async def prepare(self) -> None:
        async with opened(self.objects) as store:
            for i in range(10):
                await commit(store, str(i), "one" if i % 2 else "two")
            await store.tag("best", await store.resolve("4"))
            await store.upload(b"an upload that nobody committed")
            await store.ledger.prepare()
        grow_old(self.objects)

    async def train(self, seed: int) -> None:
        """Commits new checkpoints and ones that are about to go, and tags."""
        draw = random.Random(seed)
        async with opened(self.objects, self._within) as store:
            for i in range(4):
                name = f"new{seed}.{i}" if draw.random() < 0.5 else f"{draw.randrange(10)}_{seed}.{i}"
                for _ in range(draw.randrange(12)):
                    await asyncio.sleep(0)
                self.acknowledged.append(await commit(store, name, draw.choice(["one", "two", "three"])))
                if draw.random() < 0.5:
                    version = await store.resolve(str(draw.randrange(10)))
                    try:
                        await store.tag(f"tag{seed}.{i}", version)
                        self.tagged[f"tag{seed}.{i}"] = version
                    except Conflict:
                        pass

    async def collect(self, objects: ObjectStore) -> None:
        async with opened(objects, self._within) as store:
            await collect(store, self.POLICY)

    async def check(self, where: object) -> None:
        """Another collector finishes, then everything is as it should be."""
        await self.collect(self.objects)
        async with opened(self.objects) as store:
            report = await store.verify(blobs=True)
            assert report.ok, (where, report.problems)
            catalog = await store.catalog()
            assert {name: catalog.aliases[name] for name in self.tagged} == self.tagged, where
            for counter in self.POLICY.reasons(catalog):
                await store.load_checkpoint(catalog.versions[counter])
            for version in self.acknowledged:
                assert catalog.versions[version.counter] == version
            left = [v.counter for v in catalog.versions if blob_key(v.content_hash) in self.objects.objects]
            # What nothing keeps and nobody committed again is gone.
            fresh = {v.content_hash for v in self.acknowledged}
            kept = {catalog.versions[c].content_hash for c in self.POLICY.reasons(catalog)}
            assert all(catalog.versions[c].content_hash in kept | fresh for c in left), where


async def fault_at(call: int, fault: str) -> int:
    """A collector with a fault at one request, beside commits and tags; -> requests it makes."""
    scene = Scene()
    await scene.prepare()
    objects = FaultStore(scene.objects, lambda n, operation, key: fault if n == call else None)
    training = asyncio.ensure_future(scene.train(call))
    await ended_collection(scene, objects)
    await training
    await scene.check((call, fault, objects.log[call : call + 1]))
    return objects.calls


async def ended_collection(scene: Scene, objects: FaultStore) -> None:
    running = asyncio.ensure_future(scene.collect(objects))
    crash = asyncio.ensure_future(objects.crashed.wait())
    await asyncio.wait({running, crash}, return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    crash.cancel()
    for result in await asyncio.gather(running, crash, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, SpectralMCError):
            raise result


class Slow(MemoryObjectStore):
    """Requests take a random while before and after they take effect."""

    def __init__(self, inner: MemoryObjectStore, seed: int) -> None:
        super().__init__()
        self.inner, self.draw = inner, random.Random(seed)
        self.objects = inner.objects

    async def _wait(self) -> None:
        for _ in range(self.draw.randrange(20)):
            await asyncio.sleep(0)


for _operation in ("get", "put", "create", "stat", "delete"):

    def _slowly(operation: str) -> Callable[..., Any]:
        async def method(self: Slow, *arguments: Any) -> Any:
            await self._wait()
            result = await getattr(self.inner, operation)(*arguments)
            await self._wait()
            return result

        return method

    setattr(Slow, _operation, _slowly(_operation))


async def two_collectors(seed: int) -> None:
    scene = Scene(answers_within=0.3)  # on a busy machine as well
    await scene.prepare()
    slow = [Slow(scene.objects, 10 * seed + i) for i in range(2)]
    await asyncio.gather(*(scene.collect(s) for s in slow), scene.train(seed), scene.train(seed + 10_000))
    await scene.check(seed)


async def all_of(scenarios: list[Coroutine[Any, Any, Any]], at_a_time: int = 12) -> int:
    """Run them, several at a time: most of each is waiting for what hangs; -> how many."""
    gate = asyncio.Semaphore(at_a_time)

    async def one(scenario: Coroutine[Any, Any, Any]) -> None:
        async with gate:
            await scenario

    await asyncio.gather(*(one(scenario) for scenario in scenarios))
    return len(scenarios)


@pytest.mark.long
async def test_collection_under_fire() -> None:
    total = await fault_at(-1, "none")
    assert total > 30
    count = await all_of([fault_at(call, fault) for fault in FAULTS for call in range(total)])
    print(
        f"\n{count} scenarios: {len(FAULTS)} faults at each of a collector's {total} requests, beside commits and tags"
    )
    count = await all_of([two_collectors(seed) for seed in range(150)], 4)
    print(f"{count} scenarios: two collectors at once, beside two writers, requests delayed at random")
