"""Aliases, references and the model alone, over memory, moto and a real S3 server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from smc.checkpoint.file import Snapshot, decode_parts, encode
from smc.checkpoint.tensor_header import model_hash
from smc.errors import ConfigError, Conflict, Corrupt, NotFound
from smc.learning.pricer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.chain import Draft, blob_key, block_key
from smc.storage.gc import RetentionPolicy
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS, force, small_config, small_training, tag_draft
from tests.faults import FaultStore

Opener = Callable[[], AsyncBlockchainModelStore]


def in_memory() -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=MemoryObjectStore(), retry_delays=NO_DELAYS, timeout=0.05)


async def commit(store: AsyncBlockchainModelStore, step: int, experiment: str = "a", **changes: Any) -> ModelVersion:
    record = CommitRecord(ledger="x", message=f"m{step}", step=step, loss=0.5, experiment=experiment, **changes)
    return await store.commit(f"checkpoint {experiment} {step}".encode(), record)


async def test_aliases_move_and_their_history_stays(make_store: Opener) -> None:
    async with make_store() as store:
        first, second = await commit(store, 1), await commit(store, 2)
        await store.tag("production", first, "it is good")
        await store.tag("candidate", second)
        await store.tag("production", second)
        assert await store.resolve("production") == second
    async with make_store() as again:
        catalog = await again.catalog()
        assert catalog.aliases == {"candidate": second, "production": second}
        assert catalog.aliases_of(second) == ["candidate", "production"]
        assert [(m.alias, m.counter, m.message) for m in catalog.moves] == [
            ("production", 0, "it is good"),
            ("candidate", 1, ""),
            ("production", 1, ""),
        ]
        await again.untag("candidate", "no longer")
        assert (await again.catalog()).aliases == {"production": second}
        with pytest.raises(NotFound, match="has no alias 'candidate': there are production"):
            await again.untag("candidate")
        assert (await again.verify(blobs=True)).ok


async def test_a_reference_means_one_version_or_says_what_there_is(make_store: Opener) -> None:
    async with make_store() as store:
        with pytest.raises(NotFound, match="the ledger is empty"):
            await store.resolve("head")
        versions = [await commit(store, step, name) for step, name in enumerate(["one", "two", "one"])]
        await store.tag("Best.model-1", versions[1])
        for reference, wanted in {
            "v0000000001": 1,
            "1": 1,
            "head": 2,
            "head:one": 2,
            "head:two": 1,
            "Best.model-1": 1,
            versions[0].content_hash: 0,
            versions[0].content_hash[:8]: 0,
        }.items():
            assert await store.resolve(reference) == versions[wanted]
        for reference, message in {
            "v0000000003": "has no version v0000000003: its newest is v0000000002",
            "3": "has no version v0000000003",
            "head:three": "there is no experiment 'three': there are one, two",
            "best.model-1": r"is no version here: .*did you mean Best.model-1\?",
            versions[0].content_hash[:7]: "is no version here: .*there are: Best.model-1",
            "0" * 64: "no version has a content hash that begins with",
            "": "is no version here",
            "v1": "is no version here",
        }.items():
            with pytest.raises(NotFound, match=message):
                await store.resolve(reference)


async def test_a_hash_that_means_several_versions_is_refused() -> None:
    async with in_memory() as store:
        for name in ("1", "2"):
            digest = "ab" * 10 + name * 44
            payload = {
                "content_hash": digest, "size": 1, "experiment": "", "step": 1, "loss": None, "metrics": {},
                "message": "", "resumed_from": None,
            }  # fmt: skip
            await store.ledger.append(Draft("commit", name, payload))
        with pytest.raises(ConfigError, match="is ambiguous: v0000000000, v0000000001 begin like this"):
            await store.resolve("ab" * 10)
        assert (await store.resolve("ab" * 10 + "2")).counter == 1


@pytest.mark.parametrize("name", ["head", "v0000000001", "deadbeef", "", "1st", "a/b", "a b", "a" * 65, "ä", "a\n"])
async def test_a_name_that_means_something_else_is_no_alias(name: str) -> None:
    async with in_memory() as store:
        version = await commit(store, 1)
        with pytest.raises(ConfigError, match=r"cannot be an alias: a letter, then letters, digits"):
            await store.tag(name, version)
        assert (await store.catalog()).moves == []


@pytest.mark.parametrize(
    "payload",
    [
        {"alias": "best"},
        {"alias": "head", "counter": None, "content_hash": None, "message": ""},
        {"alias": "best", "counter": 0, "content_hash": None, "message": ""},
        {"alias": "best", "counter": 0, "content_hash": "0" * 64, "message": ""},
        {"alias": "best", "counter": 7, "content_hash": "0" * 64, "message": ""},
        {"alias": "best", "counter": -1, "content_hash": "0" * 64, "message": ""},
    ],
)
async def test_a_tag_entry_that_says_what_cannot_be_is_found(payload: dict[str, Any]) -> None:
    async with in_memory() as store:
        await commit(store, 1)
        await force(store, Draft("tag", "wrong", payload))
        await store.ledger.close()
        with pytest.raises(Corrupt, match=r"log/0000000001.jsonl: entry 1: "):
            await store.catalog()
        report = await store.verify()
        assert [key for key, _ in report.problems] == [block_key(1)]
        assert (await commit(store, 2)).counter == 1  # training goes on


async def test_an_entry_that_nobody_could_read_is_not_written() -> None:
    async with in_memory() as store:
        version = await commit(store, 1)
        for draft, message in (
            (Draft("collect", "a", {"content_hashes": ["backup/model"]}), "content_hashes is not a list of SHA-256"),
            (Draft("tag", "b", {"alias": "best", "counter": 0}), "content_hash: Field required"),
            (Draft("tag", "c", {"alias": "best", "message": "\udcff"}), "not valid UTF-8"),
        ):
            with pytest.raises(ConfigError, match=f"a {draft.kind} entry that nobody could read: .*{message}"):
                await store.ledger.append(draft)
        record = CommitRecord(ledger="x", message="", step=2, loss=None)
        record = record.model_copy(update={"metrics": {"x": float("nan")}})
        with pytest.raises(ConfigError, match=r"nobody could read: metrics.x: Input should be a valid number"):
            await store.commit(b"x", record)
        with pytest.raises(ConfigError, match="nobody could read"):
            await store.tag("best", version, "\udcff")
        assert len(await store.list_entries()) == 1
        assert (await store.verify(blobs=True)).ok


async def test_a_block_is_taken_in_as_a_whole_or_not_at_all() -> None:
    async with in_memory() as store:
        await commit(store, 0)
        fields = {
            "size": 1,
            "experiment": "",
            "step": 1,
            "loss": None,
            "metrics": {},
            "message": "",
            "resumed_from": None,
        }
        wrong = Draft("tag", "t", {"alias": "x", "counter": 5, "content_hash": "0" * 64, "message": ""})
        await force(store, wrong, *(Draft("commit", f"c{i}", {"content_hash": f"{i:064x}", **fields}) for i in (1, 2)))
        for _ in range(2):
            with pytest.raises(Corrupt, match="alias x names a version that is not before it"):
                await store.catalog()
        assert (await store.get_head()).counter == 2  # type: ignore[union-attr]


async def test_a_collected_version_cannot_be_tagged() -> None:
    async with in_memory() as store:
        await commit(store, 1)
        version = await commit(store, 2)
        await store.ledger.append(Draft("collect", "c", {"content_hashes": [version.content_hash]}))
        with pytest.raises(Conflict, match="v0000000001 cannot be tagged: entry 2 announced"):
            await store.tag("best", version)
        assert (await store.catalog()).aliases == {}
        await commit(store, 2, commit_id="again")  # the same bytes, so it is there again
        await store.tag("best", version)
        assert (await store.verify(blobs=True)).ok


async def test_a_catalog_reads_only_what_is_new_and_refuses_another_past() -> None:
    objects = MemoryObjectStore()
    async with in_memory() as other:
        for step in range(8):
            await commit(other, step, "other")
        theirs = dict(other.objects._inner.objects)  # type: ignore[attr-defined]
    counted = FaultStore(objects, lambda call, operation, key: None)
    async with AsyncBlockchainModelStore("memory", objects=counted) as reader:
        async with AsyncBlockchainModelStore("memory", objects=objects) as writer:
            for step in range(4):
                await commit(writer, step)
        assert len((await reader.catalog()).versions) == 4
        before = counted.calls
        assert len((await reader.catalog()).versions) == 4
        assert counted.calls == before + 1
        async with AsyncBlockchainModelStore("memory", objects=objects) as writer:
            await commit(writer, 4)
        assert len((await reader.catalog()).versions) == 5
        objects.objects.update(theirs)
        with pytest.raises(Corrupt, match="parent_hash is"):
            await reader.catalog()


async def test_a_model_is_loaded_without_the_optimiser_and_verified(make_store: Opener) -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    data = encode(Snapshot.of(pricer.snapshot()))
    record = CommitRecord(ledger="x", message="m", step=2, loss=0.1, model_hash=model_hash(data))
    async with make_store() as store:
        version = await store.commit(data, record)
        header, parts = await store.load_model(version)
        snapshot = decode_parts(header, parts)
        assert all(snapshot.tensors[f"model.{n}"].equal(t) for n, t in pricer.model.state_dict().items())
        assert not any(name.startswith("optimizer") for name in parts)
        without = await store.commit(data, record.model_copy(update={"model_hash": None, "commit_id": "old"}))
        again, same = await store.load_model(without)  # by the hash of the whole
        assert same == parts
        assert again == header
        assert (await store.verify(blobs=True)).ok

        key = blob_key(version.content_hash)
        place = header.places["model.layers.0.weight"]
        for damaged, message in (
            (data[: place.start] + bytes([data[place.start] ^ 1]) + data[place.start + 1 :], "does not have the hash"),
            (data[: place.stop - 4], "has .* bytes, its entry says"),
            (b"\xff" * len(data), "its header should have"),
        ):
            await store.objects.put(key, damaged)
            with pytest.raises(Corrupt, match=f"{key}: .*{message}"):
                await store.load_model(version)
        await store.objects.delete(key)
        with pytest.raises(NotFound, match="the checkpoint of v0000000000 is not there"):
            await store.load_model(version)


async def test_a_model_takes_few_bytes_of_its_checkpoint() -> None:
    inner = MemoryObjectStore()
    read = 0

    class Counted(MemoryObjectStore):
        async def get_range(self, key: str, start: int, stop: int) -> bytes:
            nonlocal read
            data = await inner.get_range(key, start, stop)
            read += len(data)
            return data

    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    data = encode(Snapshot.of(pricer.snapshot()))
    counting = Counted()
    counting.objects = inner.objects
    async with AsyncBlockchainModelStore("memory", objects=counting) as store:
        record = CommitRecord(ledger="x", message="m", step=2, loss=0.1, model_hash=model_hash(data))
        await store.load_model(await store.commit(data, record))
    assert read < 0.4 * len(data)


async def test_a_model_hash_that_is_wrong_is_found_by_verification() -> None:
    pricer = GbmCVNNPricer(small_config())
    data = encode(Snapshot.of(pricer.snapshot()))
    async with in_memory() as store:
        record = CommitRecord(ledger="x", message="m", step=2, loss=0.1, model_hash="0" * 64)
        version = await store.commit(data, record)
        report = await store.verify(blobs=True)
        reason = "its model does not have the hash in the entry of v0000000000"
        assert report.problems == [(blob_key(version.content_hash), reason)]


async def test_ranges_and_conditional_reads(make_store: Opener) -> None:
    async with make_store() as store:
        await store.objects.put("head.json", b"0123456789")
        assert await store.objects.get_range("head.json", 2, 5) == b"234"
        assert await store.objects.get_range("head.json", 8, 20) == b"89"
        assert await store.objects.get_range("head.json", 20, 30) == b""
        assert await store.objects.get_range("head.json", 3, 3) == b""
        with pytest.raises(NotFound):
            await store.objects.get_range("nothing", 0, 4)
        changed = await store.objects.get_if_changed("head.json", None)
        assert changed is not None
        data, etag = changed
        assert data == b"0123456789"
        assert await store.objects.get_if_changed("head.json", etag) is None
        await store.objects.put("head.json", b"new")
        again = await store.objects.get_if_changed("head.json", etag)
        assert again is not None
        assert again[0] == b"new"
        assert again[1] != etag
        with pytest.raises(NotFound):
            await store.objects.get_if_changed("nothing", None)


async def test_tags_by_two_writers_are_all_there(make_store: Opener) -> None:
    async with make_store() as one, make_store() as two:
        version = await commit(one, 1)
        for i in range(3):
            await one.tag(f"one{i}", version)
            await two.tag(f"two{i}", version)
        await two.ledger.append(tag_draft("x", "one0"))
        assert set((await one.catalog()).aliases) == {"one1", "one2", "two0", "two1", "two2"}


async def test_what_was_recovered_late_is_not_what_an_experiment_goes_on_from(
    memory_store: AsyncBlockchainModelStore,
) -> None:
    async with memory_store as store:
        for step in (2, 5, 3, 5, 4):
            record = CommitRecord(ledger="x", message="", step=step, loss=None, experiment="a")
            await store.commit(b"checkpoint %d" % step, record)
        catalog = await store.catalog()
        assert catalog.heads["a"].step == 4
        assert catalog.furthest == {"a": catalog.versions[3]}
        assert RetentionPolicy(1).reasons(catalog).keys() == {0, 3, 4}
