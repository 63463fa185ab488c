"""One contract for the store over memory, moto and a real S3 server; faults over a store that fails."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable

import orjson
import pytest

from smc.errors import AccessDenied, Busy, ConfigError, Conflict, Corrupt, NotFound, Unavailable
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.budget import UploadBudget
from smc.storage.chain import blob_key, block_key
from smc.storage.dev_server import DevServer
from smc.storage.ledger import HEAD_KEY
from smc.storage.limits import LIMITS
from smc.storage.objects import MemoryObjectStore, ObjectStore
from smc.storage.s3 import S3ObjectStore, parse_uri
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS, tag_draft
from tests.fault_proxy import FaultProxy
from tests.faults import FaultStore

Opener = Callable[[], AsyncBlockchainModelStore]


def record(step: int = 0, **changes: object) -> CommitRecord:
    return CommitRecord(**{"ledger": "x", "message": f"m{step}", "step": step, "loss": 0.5, **changes})  # type: ignore[arg-type]


async def commit(store: AsyncBlockchainModelStore, step: int, **changes: object) -> ModelVersion:
    return await store.commit(f"checkpoint {step}".encode(), record(step, **changes))


async def test_versions_are_numbered_and_found(make_store: Opener) -> None:
    async with make_store() as store:
        assert await store.get_head() is None
        assert await store.list_versions() == []
        versions = [await commit(store, step, experiment="a") for step in range(5)]
    async with make_store() as again:
        head = await again.get_head()
        assert head == versions[4]
        assert head.version_id == "v0000000004"
        assert [await again.get_version(v.version_id) for v in versions] == versions
        assert await again.list_versions() == versions
        assert await again.load_checkpoint(versions[2]) == b"checkpoint 2"
        assert (await again.verify(blobs=True)).ok
        with pytest.raises(NotFound, match="has no version v0000000005: its newest version is v0000000004"):
            await again.get_version("v0000000005")


async def test_concurrent_commits_share_blocks_and_keep_the_order_of_the_calls(make_store: Opener) -> None:
    async with make_store() as store:
        await store.ledger.prepare()
        drafts = [tag_draft(f"id{i}") for i in range(40)]
        entries = await asyncio.gather(*(store.ledger.append(d) for d in drafts))
        assert [e.index for e in entries] == list(range(40))
        assert entries[-1].block < 5
        assert (await store.verify()).ok


async def test_a_commit_id_is_entered_once(make_store: Opener) -> None:
    async with make_store() as store:
        one, two = await asyncio.gather(commit(store, 1, commit_id="same"), commit(store, 1, commit_id="same"))
        await commit(store, 2)
    async with make_store() as again:  # also by a writer that has to read it back
        assert await commit(again, 1, commit_id="same") == one == two
        assert len(await again.list_versions()) == 2


async def test_two_writers_interleave_into_one_chain(make_store: Opener) -> None:
    async with make_store() as a, make_store() as b:
        await asyncio.gather(*(commit(w, 10 * i + j) for i, w in enumerate((a, b)) for j in range(4)))
        versions = await a.list_versions()
        assert [v.counter for v in versions] == list(range(8))
        assert sorted(v.step for v in versions) == [0, 1, 2, 3, 10, 11, 12, 13]
        assert (await a.verify(blobs=True)).ok
        assert await b.get_head() == versions[-1]


async def test_a_second_writer_rebases_on_the_first(make_store: Opener) -> None:
    async with make_store() as a, make_store() as b:
        await commit(a, 0)
        await b.get_head()
        await commit(a, 1)
        late = await commit(b, 2)
        assert late.counter == 2
        assert (await a.verify()).ok


class LatePuts(MemoryObjectStore):
    """Delivers a writer's hints of one block only after `gate` is set."""

    def __init__(self, shared: MemoryObjectStore, gate: asyncio.Event) -> None:
        self.objects, self._gate = shared.objects, gate

    async def put(self, key: str, data: bytes | bytearray) -> None:
        if key == HEAD_KEY:
            await self._gate.wait()
        await super().put(key, data)


async def test_an_older_hint_that_arrives_last_is_renewed() -> None:
    shared, gate = MemoryObjectStore(), asyncio.Event()
    late = AsyncBlockchainModelStore("memory", objects=LatePuts(shared, gate), retry_delays=NO_DELAYS)
    prompt = AsyncBlockchainModelStore("memory", objects=shared, retry_delays=NO_DELAYS)
    async with late:
        await commit(late, 0)
        async with prompt:
            await commit(prompt, 1)
        assert orjson.loads(shared.objects[HEAD_KEY][0])["block"] == 1
        gate.set()  # now the hint of block 0 overwrites that of block 1
    assert orjson.loads(shared.objects[HEAD_KEY][0])["block"] == 1


async def test_equal_checkpoints_are_stored_once(make_store: Opener) -> None:
    async with make_store() as store:
        one = await store.commit(b"same", record(1))
        two = await store.commit(b"same", record(2))
        assert one.content_hash == two.content_hash == hashlib.sha256(b"same").hexdigest()
        assert [info.size async for info in store.objects.list("blobs/")] == [4]


async def test_the_object_store_contract(make_store: Opener) -> None:
    async with make_store() as store:
        objects = store.objects
        with pytest.raises(NotFound):
            await objects.get("log/nothing")
        with pytest.raises(NotFound):
            await objects.stat("log/nothing")
        await objects.delete("log/nothing")
        await objects.create("a/1", b"one")
        with pytest.raises(Conflict):
            await objects.create("a/1", b"two")
        await objects.put("a/1", b"three")
        await objects.put("a/2", b"")
        assert await objects.get("a/1") == b"three"
        assert (await objects.stat("a/1")).size == 5
        assert [(i.key, i.size) async for i in objects.list("a/")] == [("a/1", 5), ("a/2", 0)]
        await objects.delete("a/1")
        assert [i.key async for i in objects.list("a/")] == ["a/2"]


async def test_a_stale_or_broken_head_hint_changes_nothing(make_store: Opener) -> None:
    async with make_store() as store:
        for step in range(6):
            await commit(store, step)
    for hint in (b'{"block": 1}', b'{"block": 99}', b"garbage", b'{"block": "x"}', b"[]", b'{"block": -4}'):
        async with make_store() as store:
            await store.objects.put("head.json", hint)
            head = await store.get_head()
            assert head is not None
            assert head.step == 5


async def test_a_hole_in_the_log_is_never_written_into(make_store: Opener) -> None:
    async with make_store() as store:
        for step in range(3):
            await commit(store, step)
    async with make_store() as store:
        await store.objects.delete(block_key(1))
        await store.objects.delete("head.json")
    async with make_store() as store:
        with pytest.raises(Corrupt, match=r"log/0000000001.jsonl: the block is missing"):
            await commit(store, 9)


def faulty(
    operation: str, plan: list[str], inner: MemoryObjectStore | None = None
) -> tuple[AsyncBlockchainModelStore, FaultStore, list[str]]:
    """A store whose next requests of one kind fail as `plan` says."""

    def next_fault(call: int, name: str, key: str) -> str | None:
        return plan.pop(0) if name == operation and plan else None

    objects = FaultStore(inner or MemoryObjectStore(), next_fault)
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS, timeout=0.05), objects, plan


@pytest.mark.parametrize("operation", ["create", "put", "get", "stat"])
@pytest.mark.parametrize(
    "faults",
    [["fails"], ["applied"], ["hangs"], ["hangs-applied"], ["fails", "applied"], ["applied", "fails", "fails"]],
)
async def test_passing_faults_are_retried_and_nothing_appears_twice(operation: str, faults: list[str]) -> None:
    store, _, plan = faulty(operation, [])
    async with store:
        await commit(store, 0)
        plan += faults
        await commit(store, 1)
        await commit(store, 2)
        assert [v.step for v in await store.list_versions()] == [0, 1, 2]
        assert (await store.verify(blobs=True)).ok


async def test_an_append_that_fails_for_good_can_be_submitted_again() -> None:
    store, _, plan = faulty("create", [])
    async with store:
        await commit(store, 0)
        plan += ["fails"] * 4
        with pytest.raises(Unavailable):
            await commit(store, 1, commit_id="one")
        assert (await commit(store, 1, commit_id="one")).counter == 1


async def test_a_write_that_went_through_unseen_is_found_by_its_commit_id() -> None:
    inner = MemoryObjectStore()
    unseen = False

    def plan(call: int, operation: str, key: str) -> str | None:
        if unseen and key.startswith("log/"):
            return "applied" if operation == "create" else "fails"
        return None

    async with AsyncBlockchainModelStore("memory", objects=FaultStore(inner, plan), retry_delays=NO_DELAYS) as store:
        await commit(store, 0)
        unseen = True
        with pytest.raises(Unavailable):
            await commit(store, 1, commit_id="one")
        unseen = False
        assert (await commit(store, 1, commit_id="one")).counter == 1
        assert [v.counter for v in await store.list_versions()] == [0, 1]


async def test_an_error_to_read_is_never_taken_for_an_empty_ledger() -> None:
    inner = MemoryObjectStore()
    async with AsyncBlockchainModelStore("memory", objects=inner) as store:
        await commit(store, 0)
    store, _, _ = faulty("get", ["fails"] * 100, inner)
    async with store:
        with pytest.raises(Unavailable):
            await store.get_head()
        with pytest.raises(Unavailable):
            await commit(store, 1)


class Unconditional(MemoryObjectStore):
    """A server that ignores If-None-Match."""

    async def create(self, key: str, data: bytes) -> None:
        await self.put(key, data)


async def test_a_server_without_conditional_writes_is_refused_before_anything_is_appended() -> None:
    objects = Unconditional()
    async with AsyncBlockchainModelStore("memory", objects=objects) as store:
        with pytest.raises(ConfigError, match="does not honour If-None-Match"):
            await commit(store, 0)
        assert await store.get_head() is None


async def test_retries_wait_one_two_and_four_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay: float) -> None:
        if delay:
            slept.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    objects = FaultStore(MemoryObjectStore(), lambda call, operation, key: "fails" if operation == "create" else None)
    async with AsyncBlockchainModelStore("memory", objects=objects) as store:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await store.upload(b"x")
        assert slept == [1.0, 2.0, 4.0]
        assert [name for name, _ in objects.log].count("create") == 4
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("damage", "key", "reason"),
    [
        ("flip", block_key(1), "was written after"),
        ("truncate", block_key(1), "truncated"),
        ("delete", block_key(1), "the block is missing"),
        ("delete", "last", "head.json has seen it"),
        ("swap", block_key(0), "stands where|parent_hash|written after"),
        ("blob-flip", "blob", "do not have the hash"),
        ("blob-delete", "blob", "is missing"),
        ("blob-truncate", "blob", "bytes, its entry says"),
        ("repeat", block_key(3), "repeats commit_id"),
        ("foreign", "log/notes.txt", "not an object of this format"),
        ("head", "head.json", "the head hint is missing or not one"),
        ("head-hash", "head.json", "not that of the block it names"),
        ("head-old", "head.json", "it is 2 blocks behind the log"),
        ("head-gone", "head.json", "the head hint is missing"),
    ],
)
async def test_verification_names_what_was_tampered_with(damage: str, key: str, reason: str) -> None:
    objects = MemoryObjectStore()
    async with AsyncBlockchainModelStore("memory", objects=objects) as store:
        versions = [await commit(store, step) for step in range(3)]
        await store.ledger.close()  # the head hint is written beside the acknowledgements
        blob = blob_key(versions[1].content_hash)
        data = {k: v[0] for k, v in objects.objects.items()}
        target = {"blob": blob, "last": block_key(2)}.get(key, key)
        if damage == "flip":
            await objects.put(target, data[target].replace(b'"message":"m1"', b'"message":"m7"'))
        elif damage in ("truncate", "blob-truncate"):
            await objects.put(target, data[target][:-3])
        elif damage in ("delete", "blob-delete"):
            await objects.delete(target)
        elif damage == "swap":
            await objects.put(block_key(0), data[block_key(1)])
            await objects.put(block_key(1), data[block_key(0)])
        elif damage == "blob-flip":
            await objects.put(target, b"X" + data[target][1:])
        elif damage == "repeat":
            fields = orjson.loads(data[block_key(2)])
            line = {**fields, "index": 3, "counter": 3, "parent_hash": versions[2].entry_hash}
            await objects.put(target, orjson.dumps(line) + b"\n")
        elif damage == "head-hash":
            await objects.put(target, data[target].replace(b'"block":2', b'"block":1'))
        elif damage == "head-old":
            old = {"block": 0, "index": 0, "hash": versions[0].entry_hash}
            await objects.put(target, orjson.dumps(old))
        elif damage == "head-gone":
            await objects.delete(target)
        else:
            await objects.put(target, b"anything")
        report = await store.verify(blobs=True)
        assert not report.ok
        import re

        assert any(k == target and re.search(reason, r) for k, r in report.problems), report.problems


class Beside(FaultStore):
    """Lets something happen just before one of the requests."""

    def __init__(self, inner: ObjectStore, call: int, what: Callable[[], Awaitable[object]]) -> None:
        super().__init__(inner, lambda call, operation, key: None)
        self._call, self._what = call, what

    async def _do(self, operation: str, key: str, *arguments: object) -> object:
        if self.calls == self._call:
            await self._what()
        return await super()._do(operation, key, *arguments)


@pytest.mark.long
async def test_verification_beside_a_writer_finds_nothing() -> None:
    objects, requests = MemoryObjectStore(), 0
    async with AsyncBlockchainModelStore("memory", objects=objects) as writer:
        await commit(writer, 0)

        async def write() -> None:
            await commit(writer, 1)
            await writer.ledger.close()

        while True:
            beside = Beside(objects, requests, write)
            async with AsyncBlockchainModelStore("memory", objects=beside) as reader:
                report = await reader.verify(blobs=True)
            assert report.ok, (requests, report.problems)
            if beside.calls <= requests:
                break
            requests += 1
    assert requests > 5


async def test_a_connection_that_ends_before_the_body_leaves_no_object(seaweed: DevServer, on_seaweed: str) -> None:
    with FaultProxy(seaweed.endpoint_url, rate=1.0, kinds=("head-only",)) as proxy:
        async with AsyncBlockchainModelStore(on_seaweed, endpoint_url=proxy.url, retry_delays=NO_DELAYS) as store:
            for write in (store.objects.create, store.objects.put):
                with pytest.raises(Unavailable):
                    await write("log/0000000000.jsonl", b"a block")
        assert proxy.faults["head-only"] >= 2
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        with pytest.raises(NotFound):
            await store.objects.stat("log/0000000000.jsonl")


async def test_bytes_altered_on_their_way_are_refused_and_sent_again(
    seaweed: DevServer, on_seaweed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMITS, "part", 5 * 2**20)
    monkeypatch.setattr(LIMITS, "smallest_part", 5 * 2**20)
    bodies = {"small": b"a block", "large": random.Random(1).randbytes(12 * 2**20)}
    with FaultProxy(seaweed.endpoint_url, rate=1.0, kinds=("alter",)) as proxy:
        async with AsyncBlockchainModelStore(on_seaweed, endpoint_url=proxy.url) as store:
            for name, body in bodies.items():
                with pytest.raises(Unavailable, match="BadDigest"):
                    await store.objects.put(f"log/{name}", body)
                with pytest.raises(NotFound):
                    await store.objects.stat(f"log/{name}")
            proxy.rate = 0.0
            for name, body in bodies.items():
                await store.objects.put(f"log/{name}", body)
                assert await store.objects.get(f"log/{name}") == body


async def test_a_commit_is_two_requests_of_one_round_trip_each(seaweed: DevServer, on_seaweed: str) -> None:
    with FaultProxy(seaweed.endpoint_url) as proxy:
        async with AsyncBlockchainModelStore(on_seaweed, endpoint_url=proxy.url) as store:
            await commit(store, 0)
            await store.ledger.publish()
            before, started = proxy.requests, time.monotonic()
            for step in range(1, 21):
                await commit(store, step)
            hints = 1 + int(time.monotonic() - started)
            # Once it has appended for a second, it looks four times a second whether another writer waits.
            assert 40 <= proxy.requests - before <= 40 + 2 * hints + 4 * (hints - 1)
        assert proxy.asked_first == 0


async def test_a_checkpoint_whose_bytes_changed_is_not_loaded(make_store: Opener) -> None:
    async with make_store() as store:
        version = await commit(store, 1)
        await store.objects.put(blob_key(version.content_hash), b"checkpoint 9")
        with pytest.raises(Corrupt, match="do not have the hash"):
            await store.load_checkpoint(version)
        await store.objects.delete(blob_key(version.content_hash))
        with pytest.raises(NotFound, match="the checkpoint of v0000000000 is not there"):
            await store.load_checkpoint(version)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("my-bucket", ("my-bucket", "")),
        ("s3://my-bucket", ("my-bucket", "")),
        ("s3://my-bucket/", ("my-bucket", "")),
        ("s3://my-bucket/a/b", ("my-bucket", "a/b/")),
    ],
)
def test_ledger_uris(uri: str, expected: tuple[str, str]) -> None:
    assert parse_uri(uri) == expected


@pytest.mark.parametrize("uri", ["", "My_Bucket", "bucket/prefix", "s3://", "s3://b/a", "s3://bucket/../x", "http://x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        parse_uri(uri)


async def test_a_closed_store_says_how_to_open_it() -> None:
    with pytest.raises(ConfigError, match="use `async with"):
        await AsyncBlockchainModelStore("bucket").get_head()


async def test_errors_of_a_real_server_are_translated(on_seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with S3ObjectStore("no-such-bucket-here") as objects:
        for request in (objects.get("x"), objects.stat("x"), objects.check_bucket()):
            with pytest.raises(ConfigError, match="bucket 'no-such-bucket-here' does not exist at http"):
                await request
        for request in (objects.put("x", b""), objects.create("x", b""), objects.delete("x")):
            with pytest.raises(ConfigError, match="no-such-bucket-here"):
                await request
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    async with S3ObjectStore("spectralmc") as objects:
        for request in (objects.get("x"), objects.put("x", b""), objects.create("x", b"")):
            with pytest.raises(AccessDenied, match="access denied by http"):
                await request
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    async with S3ObjectStore("spectralmc") as objects:
        with pytest.raises(AccessDenied, match="set AWS_ACCESS_KEY_ID"):
            await objects.get("x")


async def test_an_unreachable_endpoint_is_unavailable(on_seaweed: str) -> None:
    async with S3ObjectStore("spectralmc", endpoint_url="http://127.0.0.1:1") as objects:
        with pytest.raises(Unavailable, match=r"s3://spectralmc/x: .*127\.0\.0\.1:1"):
            await objects.get("x")
    with pytest.raises(ConfigError, match="S3 client for bucket"):
        async with S3ObjectStore("spectralmc", endpoint_url="not a url"):
            pass


async def test_a_large_checkpoint_goes_up_in_parts_and_comes_down_in_ranges(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMITS, "part", 5 * 2**20)
    monkeypatch.setattr(LIMITS, "smallest_part", 5 * 2**20)
    data = random.Random(1).randbytes(17 * 2**20 + 12_345)
    async with make_store() as store:
        version = await store.commit(data, record(1))
        assert bytes(await store.load_checkpoint(version)) == data
        again = await store.commit(data, record(2))
        assert again.content_hash == version.content_hash
        # Bytes that arrive in ranges are checked like any other.
        await store.objects.put(blob_key(version.content_hash), data[:-1] + b"x")
        with pytest.raises(Corrupt, match="do not have the hash"):
            await store.load_checkpoint(version)
        await store.objects.put(blob_key(version.content_hash), data[: 11 * 2**20])
        with pytest.raises((Corrupt, Unavailable, ConfigError)):
            await store.load_checkpoint(version)


async def test_uploads_keep_to_their_budget_and_the_rest_is_told_when_to_come_back() -> None:
    budget = UploadBudget(max_count=2, max_bytes=100, max_waiting=3)
    running, most, order = 0, 0, []

    async def upload(name: int, size: int) -> None:
        nonlocal running, most
        async with budget.share(size):
            running += 1
            most = max(most, running)
            order.append(name)
            assert budget.bytes_in_flight <= 100 or running == 1
            await asyncio.sleep(0.01)
            running -= 1

    tasks = [asyncio.ensure_future(upload(i, size)) for i, size in enumerate((60, 60, 10, 500))]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(upload(i, 10)) for i in (4,)]
    await asyncio.sleep(0)
    with pytest.raises(Busy) as caught:
        await upload(9, 10)
    assert caught.value.retry_after > 0
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 3, 4]
    assert most <= 2
    assert budget.bytes_in_flight == 0
