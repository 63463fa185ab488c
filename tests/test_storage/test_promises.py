"""What a ledger promises, past every bound that the code has: entries remembered, blocks behind, time that passes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import runpy
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.checkpoint.tensor_header import model_hash, parse_header
from smc.errors import ConfigError, Conflict, Corrupt, NotFound, SpectralMCError
from smc.learning.pricer import GbmCVNNPricer
from smc.serving.client import ModelFollower
from smc.storage import AsyncBlockchainModelStore, chain, checkpoints, gc, reader, recover
from smc.storage import objects as memory_objects
from smc.storage.__main__ import main as storage_command
from smc.storage.chain import UNKNOWN, Draft, Tail, blob_key, block_key, build_block, parse_block
from smc.storage.gc import RetentionPolicy, collect, plan_collection
from smc.storage.ledger import Ledger
from smc.storage.objects import MemoryObjectStore, ObjectInfo
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import NO_DELAYS, small_config, small_training, tag_draft
from tests.faults import FaultStore

# More than any process keeps of what it has read.
MANY = 2_600


def opened(objects: Any, timeout: float = 30.0) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS, timeout=timeout)


def record(name: str, **changes: Any) -> CommitRecord:
    fields = {"ledger": "s3://memory", "commit_id": name, "message": name, "step": 1, "loss": None, **changes}
    return CommitRecord(**fields)


async def fill(store: AsyncBlockchainModelStore, count: int, name: str = "filling", width: int = 256) -> None:
    """So many entries, `width` to a block."""
    for start in range(0, count, width):
        names = (f"{name}{i}" for i in range(start, min(start + width, count)))
        await asyncio.gather(*(store.ledger.append(tag_draft(n)) for n in names))


# --- any kind of entry may be followed by any number of others ---------------------------------------


@pytest.mark.parametrize(
    "draft",
    [
        tag_draft("odd"),
        Draft("seal", "odd", {"counter": None}),
        Draft("seal", "odd", {"counter": "three"}),
        Draft("seal", "odd", {"counter": True}),
        Draft("seal", "odd", {"counter": [1], "content_hash": {"a": 1}}),
        Draft("collect", "odd", {"content_hashes": [], "counter": None}),
    ],
)
async def test_no_entry_makes_a_ledger_fail_later(draft: Draft) -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        first = await store.commit(b"first", record("first"))
        await store.ledger.append(draft)
        for i in range(1100):  # commits, of which as many are read at opening
            await store.append_commit(record(f"c{i}"), first.content_hash, first.size)
        await fill(store, MANY)
        assert (await store.get_version("v0000000000")).commit_id == "first"
    async with opened(objects) as another:
        await another.commit(b"last", record("last"))
        assert len(await another.list_entries()) == 1 + 1 + 1100 + MANY + 1
        assert (await another.verify()).ok


# --- exactly once has no window ----------------------------------------------------------------------


async def test_a_commit_that_is_submitted_again_is_the_one_that_is_there_however_old(tmp_path: Path) -> None:
    objects, spool = MemoryObjectStore(), Spool(tmp_path)
    async with opened(objects) as store:
        version = await store.commit(b"once", record("once"))
        spool.save(record("once"), b"once")  # its answer came late
        await fill(store, MANY)
        assert await store.commit(b"once", record("once")) == version
    async with opened(objects) as another:
        assert await another.commit(b"once", record("once")) == version
    counted = FaultStore(objects, lambda call, operation, key: None)
    async with opened(counted) as third:
        assert await recover(third, spool) == [version]
        assert not [key for operation, key in counted.log if operation in ("put", "create") and "blobs" in key]
        assert (await third.verify(blobs=True)).ok
        assert len(await third.list_versions()) == 1
    assert list(spool.records()) == []


async def test_calls_that_are_repeated_after_a_death_are_entered_once() -> None:
    """An actor with as many calls as it admits dies after its first blocks; all are made again, in any order."""
    objects = MemoryObjectStore()
    drafts = [tag_draft(f"id{i}") for i in range(4096)]
    dying = Ledger(objects, retry_delays=NO_DELAYS)
    calls = [asyncio.ensure_future(dying.append(draft)) for draft in drafts]
    while sum(call.done() for call in calls) < 256:
        await asyncio.sleep(0)
    assert dying._sequencer is not None
    dying._sequencer.cancel()
    for call in calls:
        call.cancel()
    random.Random(1).shuffle(drafts)
    again = Ledger(objects, retry_delays=NO_DELAYS)
    await asyncio.gather(*(again.append(draft) for draft in drafts[:4000]))
    await asyncio.gather(*(again.append(draft) for draft in drafts[4000:]))
    async with opened(objects) as store:
        counts = Counter(entry.commit_id for entry in await store.list_entries())
    assert len(counts) == 4096
    assert set(counts.values()) == {1}
    await again.close()


async def test_one_commit_id_is_for_one_checkpoint() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await store.commit(b"these bytes", record("id"))
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=r"commit_id 'id' belongs to (entry 0|v0+), which names blobs/.* and not"
            ):
                await store.commit(b"other bytes", record("id"))
            await fill(store, MANY)
        one = asyncio.ensure_future(store.commit(b"first", record("both")))
        other = asyncio.ensure_future(store.commit(b"second", record("both")))
        results = await asyncio.gather(one, other, return_exceptions=True)
        assert sum(isinstance(result, ConfigError) for result in results) == 1
        assert len(await store.list_versions()) == 2


async def test_a_checkpoint_that_was_never_uploaded_is_not_committed() -> None:
    async with opened(MemoryObjectStore()) as store:
        with pytest.raises(Conflict, match=r"was never uploaded, or was collected .*: upload it again"):
            await store.append_commit(record("a"), "0" * 64, 5)
        digest, size = await store.upload(b"bytes")
        with pytest.raises(ConfigError, match="has 5 bytes, the commit says 6"):
            await store.append_commit(record("a"), digest, size + 1)
        assert (await store.append_commit(record("a"), digest, size)).counter == 0


# --- a writer behind others, and one beside a busy one -------------------------------------------------


class Rounds:
    """A store whose requests are answered together, round by round: `rounds` is how many round trips it took.

    A round ends when the loop has had nothing more to ask for a few turns; no clock ends it, which would count a busy
    machine's pauses as rounds.
    """

    TURNS = 25

    def __init__(self, inner: MemoryObjectStore) -> None:
        self.inner, self.rounds, self.requests = inner, 0, 0
        self._waiting: list[asyncio.Future[None]] = []

    async def _turn(self) -> None:
        self.requests += 1
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._answer_when_quiet, 1, self.TURNS)
        await mine

    def _answer_when_quiet(self, waiting: int, turns: int) -> None:
        if turns and len(self._waiting) == waiting:
            asyncio.get_running_loop().call_soon(self._answer_when_quiet, waiting, turns - 1)
        elif turns:
            asyncio.get_running_loop().call_soon(self._answer_when_quiet, len(self._waiting), self.TURNS)
        else:
            self._answer()

    def _answer(self) -> None:
        self.rounds += 1
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def __getattr__(self, operation: str) -> Any:
        async def request(*arguments: Any) -> Any:
            await self._turn()
            return await getattr(self.inner, operation)(*arguments)

        return request

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await self._turn()
        async for info in self.inner.list(prefix):
            yield info


@pytest.mark.parametrize(("blocks", "most"), [(1, 6), (30, 14), (300, 20), (5000, 30)])
async def test_a_writer_is_a_few_round_trips_behind_any_number_of_blocks(blocks: int, most: int) -> None:
    objects = MemoryObjectStore()
    counted = Rounds(objects)
    async with opened(counted) as behind, opened(objects) as ahead:
        await behind.ledger.append(tag_draft("mine"))
        await asyncio.sleep(0.05)
        await fill(ahead, blocks, width=1)
        await ahead.ledger.close()
        counted.rounds = 0
        entry = await behind.ledger.append(tag_draft("mine too"))
        rounds = counted.rounds
        assert entry.index == blocks + 1
    print(f"\n{blocks} blocks behind: {rounds} round trips")
    assert rounds <= most


async def test_an_old_hint_costs_a_few_requests() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await store.ledger.append(tag_draft("first"))
        await store.ledger.close()
        old = objects.objects["head.json"]
        await fill(store, 3000, width=1)
        await store.ledger.close()
    requests = {}
    for name in ("new", "old"):
        if name == "old":
            objects.objects["head.json"] = old
        counted = FaultStore(objects, lambda call, operation, key: None)
        async with opened(counted) as store:
            assert (await store.ledger.refresh()).index == 3001
            requests[name] = counted.calls
    print(f"\nrequests with the newest hint and with the oldest: {requests}")
    assert requests["old"] <= requests["new"] + 60


async def test_a_writer_gets_its_turn_beside_one_that_never_pauses() -> None:
    class Slow(MemoryObjectStore):
        async def create(self, key: str, data: Any) -> None:
            await asyncio.sleep(0.003)
            await super().create(key, data)

    objects = Slow()
    waits = []
    async with opened(objects) as busy, opened(objects) as other:
        done = False

        async def never_pauses() -> int:
            count = 0
            while not done:
                await busy.ledger.append(tag_draft(f"busy{count}"))
                count += 1
            return count

        appending = asyncio.ensure_future(never_pauses())
        await asyncio.sleep(0.3)
        for i in range(4):
            started = time.monotonic()
            await asyncio.wait_for(other.ledger.append(tag_draft(f"other{i}")), 30)
            waits.append(time.monotonic() - started)
        done = True
        count = await appending
        assert (await other.verify()).ok
    print(f"\n{count} entries of the busy writer; the other waited {', '.join(f'{w:.2f}' for w in waits)} s")
    assert max(waits) < 5


async def test_a_wrong_index_is_made_again_by_whoever_writes() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await fill(store, 3 * 256 + 5, width=1)
        await store.ledger.close()
    good = {key: value for key, value in objects.objects.items() if key.startswith("index/")}
    assert len(good) == 3
    now = next(iter(good.values()))[1]
    text = orjson.loads(good["index/0000000001.json"][0])
    text["blocks"][7], text["blocks"][8] = text["blocks"][7] + text["blocks"][8], text["blocks"][9]
    text["blocks"][9:] = [*text["blocks"][10:], text["blocks"][9]]
    bad = {
        "index/0000000000.json": good["index/0000000000.json"][0].replace(b"filling7", b"filling0"),
        "index/0000000001.json": orjson.dumps(text),
        "index/0000000002.json": b"{}",
    }
    objects.objects.update({key: (data, now) for key, data in bad.items()})
    async with opened(objects) as store:
        await store.commit(b"more", record("more"))
        await store.ledger.close()
        assert {key: objects.objects[key][0] for key in good} == {key: value[0] for key, value in good.items()}
        assert (await store.verify()).ok


async def test_where_a_block_ends_is_not_taken_from_an_index(tmp_path: Path) -> None:
    """An index that divides the same entries otherwise would let whoever remembers a block refuse the true ledger."""
    for told in (True, False):
        objects = MemoryObjectStore()
        async with opened(objects) as store:
            await fill(store, 256 * 2, width=2)
            await store.ledger.close()
        if not told:  # as earlier versions wrote it
            renewed = MemoryObjectStore()
            tail = Tail(last_collect=UNKNOWN)
            for n in range(256):
                drafts = [tag_draft(f"filling{2 * n + i}") for i in range(2)]
                data = build_block(tail, drafts).replace(b'"block":%d,' % n, b"")
                await renewed.create(block_key(n), rehashed(data, tail.parent_hash))
                tail = tail.after(parse_block(n, rehashed(data, tail.parent_hash)))
            objects = renewed
            async with opened(objects) as store:
                await store.ledger.append(tag_draft("last"))
                await store.ledger.close()
        texts = orjson.loads(objects.objects["index/0000000000.json"][0])
        lines = [line for block in texts["blocks"] for line in block.splitlines(keepends=True)]
        blocks = [lines[0], *("".join(lines[i : i + 2]) for i in range(1, 509, 2)), "".join(lines[509:])]
        assert len(blocks) == 256
        await objects.put("index/0000000000.json", orjson.dumps({**texts, "blocks": blocks}))
        async with opened(objects) as store:
            catalog = await store.catalog()
            assert all(len(entries) == 2 for entries in await store.ledger.read_blocks(0, 256))
            assert catalog.tail.index == len(await store.list_entries())


def rehashed(data: bytes, parent: str) -> bytes:
    lines = []
    for line in data.splitlines(keepends=True):
        line = orjson.dumps({**orjson.loads(line), "parent_hash": parent}) + b"\n"
        parent = hashlib.sha256(line).hexdigest()
        lines.append(line)
    return b"".join(lines)


# --- a collector deletes nothing that is acknowledged ---------------------------------------------------


class Clock:
    """Lets the time of every machine go on at once, as when this one is suspended; whoever waits long does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead, self.deleting = 0.0, 0
        real, real_sleep = time.clock_gettime, asyncio.sleep

        async def sleep(seconds: float, result: Any = None) -> Any:
            if seconds > 1:
                while self.deleting:  # a request that is on its way arrives within its time limit
                    await real_sleep(0)
                self.sleep(seconds)
            return await real_sleep(0 if seconds > 1 else seconds, result)

        class Later(datetime):
            """The time of day of every machine, the server's included, which dates what is written."""

            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.now(tz) + timedelta(seconds=clock.ahead)

        clock = self
        monkeypatch.setattr("time.clock_gettime", lambda clock: real(clock) + self.ahead)
        monkeypatch.setattr("asyncio.sleep", sleep)
        for module in (chain, checkpoints, gc, memory_objects, reader):
            monkeypatch.setattr(module, "datetime", Later)

    def sleep(self, seconds: float) -> None:
        self.ahead += seconds


class Sleeping(FaultStore):
    """A collector's store: before or after one of its requests something else happens, and it notices late."""

    def __init__(self, inner: MemoryObjectStore, at: Callable[[str, str], bool], what: Any, after: bool) -> None:
        super().__init__(inner, lambda call, operation, key: None)
        self.at, self.what, self.after, self.done = at, what, after, False

    async def _do(self, operation: str, key: str, *arguments: Any) -> Any:
        now = not self.done and self.at(operation, key)
        self.done = self.done or now
        if now and not self.after:
            await self.what()
        result = await super()._do(operation, key, *arguments)
        if now and self.after:
            await self.what()
        return result


@pytest.mark.parametrize("hours", [0.02, 1.5, 30])
@pytest.mark.parametrize("again", ["recovered", "committed", "tagged"])
@pytest.mark.parametrize("moment", ["before the first look", "after the first look", "after the last look"])
async def test_a_collector_that_sleeps_deletes_nothing_that_was_acknowledged(
    hours: float, again: str, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    objects = MemoryObjectStore()
    clock = Clock(monkeypatch)
    spool = Spool(tmp_path)
    async with opened(objects) as store:
        versions = [await store.commit(b"checkpoint %d" % i, record(f"c{i}")) for i in range(5)]
        orphan, _ = await store.upload(b"spooled")
    spool.save(record("spooled"), b"spooled")
    clock.sleep(2 * 3600)
    victims = {"recovered": orphan, "committed": versions[2].content_hash, "tagged": versions[2].content_hash}
    victim = victims[again]
    acknowledged: list[str] = []

    async def meanwhile() -> None:
        async with opened(objects) as other:
            try:
                if again == "tagged":
                    await other.tag("wanted", versions[2])
                elif again == "recovered":
                    await recover(other, spool)
                else:
                    await other.commit(b"checkpoint 2", record("again"))
                acknowledged.append(victim)
            except Conflict:
                pass  # it is told, and nothing is lost
        clock.sleep(3600 * hours)

    stats = sorted(map(blob_key, {orphan, *(v.content_hash for v in versions[1:4])}))
    when = {
        "before the first look": stats[0],
        "after the first look": blob_key(victim),
        "after the last look": stats[-1],
    }
    sleeping = Sleeping(objects, lambda op, key: op == "stat" and key == when[moment], meanwhile, "after" in moment)
    async with opened(sleeping) as collector:
        policy = RetentionPolicy(keep_last=1)
        plan = await plan_collection(collector, policy)
        assert set(plan.blobs) == {orphan, *(v.content_hash for v in versions[1:4])}
        result = await collect(collector, policy, plan)
        assert sleeping.done
        assert result.deleted >= 3 - len(acknowledged) or hours > 5
        for content_hash in acknowledged:
            assert blob_key(content_hash) in objects.objects, "an acknowledged checkpoint is gone"
        report = await collector.verify(blobs=True)
        assert report.ok, report.problems


EVENTS = st.tuples(
    st.sampled_from(["new", "equal", "recovered", "tagged"]),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.02, 0.9, 1.5, 30.0]),
    st.booleans(),
)
happened: Counter[str] = Counter()


@pytest.mark.long
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.integers(0, 60), EVENTS, max_size=4))
def test_whatever_happens_at_any_request_of_a_collector_that_sleeps(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[int, tuple[str, int, float, bool]]
) -> None:
    """At the request with a number somebody commits or tags, and the collector notices hours later."""
    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(interleaved(Spool(tmp_path_factory.mktemp("spool")), plan, patch))


async def interleaved(spool: Spool, plan: dict[int, tuple[str, int, float, bool]], patch: pytest.MonkeyPatch) -> None:
    objects = MemoryObjectStore()
    clock = Clock(patch)
    async with opened(objects) as store:
        versions = [await store.commit(b"checkpoint %d" % i, record(f"c{i}")) for i in range(6)]
        for i in range(3):
            await store.upload(b"spooled %d" % i)
            spool.save(record(f"s{i}"), b"spooled %d" % i)
    clock.sleep(2 * 3600)
    acknowledged: set[str] = set()

    async def happens(call: int, what: str, which: int) -> None:
        happened[what] += 1
        async with opened(objects) as other:
            with suppress(Conflict):
                if what == "tagged":
                    await other.tag(f"tag{call}", versions[which])
                    acknowledged.add(versions[which].content_hash)
                elif what == "recovered":
                    acknowledged.update(v.content_hash for v in await recover(other, spool))
                else:
                    data = b"checkpoint %d" % which if what == "equal" else b"new %d" % call
                    acknowledged.add((await other.commit(data, record(f"{what}{call}"))).content_hash)

    class Interrupted(FaultStore):
        async def _do(self, operation: str, key: str, *arguments: Any) -> Any:
            call, event = self.calls, plan.get(self.calls)
            if event is None:
                return await self._done(operation, key, *arguments)
            what, which, hours, after = event
            del plan[call]
            # Whoever sleeps between its last look and its request cannot know what happened.
            after |= operation == "delete"
            if after:
                result = await self._done(operation, key, *arguments)
            await happens(call, what, which)
            await asyncio.sleep(3600 * hours)
            return result if after else await self._done(operation, key, *arguments)

        async def _done(self, operation: str, key: str, *arguments: Any) -> Any:
            clock.deleting += operation == "delete"
            try:
                return await super()._do(operation, key, *arguments)
            finally:
                clock.deleting -= operation == "delete"

    async with opened(Interrupted(objects, lambda call, operation, key: None)) as collector:
        with suppress(SpectralMCError):
            await collect(collector, RetentionPolicy(keep_last=1))
    async with opened(objects) as reader:
        catalog = await reader.catalog()
        for content_hash in acknowledged:  # what was there before the collection is the policy's to keep or not
            gone = blob_key(content_hash) not in objects.objects
            assert not gone or catalog.collected_at(content_hash) is not None, "an acknowledged checkpoint is gone"
        report = await reader.verify(blobs=True)
        assert report.ok, report.problems


@pytest.mark.long
def test_enough_happened_to_collectors() -> None:
    print(f"\nwhat happened at a collector's requests: {dict(happened)}")
    assert not happened or sum(happened.values()) > 30


async def test_a_collector_goes_by_the_servers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is hours ahead: what was uploaded a moment ago looks old to it."""
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i in range(3):
            await store.commit(b"checkpoint %d" % i, record(f"c{i}"))
        plan = await plan_collection(store, RetentionPolicy(keep_last=1, min_age=timedelta(0)))
        assert len(plan.blobs) == 1
        result = await collect(store, RetentionPolicy(keep_last=1, min_age=timedelta(hours=1)), plan)
        assert (result.deleted, result.spared) == (0, 1)


async def test_a_writer_that_opened_late_knows_of_a_collection_far_behind() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        content = await store.upload(b"x")
        for name in "abc":  # each behind more commits than are read at opening
            await store.ledger.append(Draft("collect", f"of {name}", {"content_hashes": [name * 64]}))
            await fill(store, 300, f"between {name}", width=1)
            await asyncio.gather(*(store.append_commit(record(f"{name}{i}"), *content) for i in range(1400)))
        await store.ledger.close()
    payload = {
        "size": 4, "experiment": "", "step": 1, "loss": None, "metrics": {}, "message": "", "resumed_from": None,
    }  # fmt: skip
    calls = []
    for names in ("", "abc"):
        counted = FaultStore(objects, lambda call, operation, key: None)
        late = Ledger(counted, retry_delays=NO_DELAYS)
        await late.prepare()
        for name in names:
            draft = Draft("commit", f"late {name}", {**payload, "content_hash": name * 64}, fresh=True)
            with pytest.raises(Conflict, match="is being collected"):
                await late.append(draft)
        calls.append(counted.calls)
    print(f"\nrequests to open: {calls[0]}, and to know three collections far behind: {calls[1]}")
    assert calls[1] <= calls[0] + 5


# --- versions are found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 256, 700])
async def test_every_version_is_found_however_many_blocks_without_commits_stand_between(gap: int) -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        content = await store.upload(b"x")
        count = 0
        for commits, others in ((1, gap), (3, gap), (1200, 2 * gap), (2, gap), (1100, 3)):
            await asyncio.gather(*(store.append_commit(record(f"c{count + i}"), *content) for i in range(commits)))
            count += commits
            await fill(store, others, f"after{count}-", width=1)
    async with opened(objects) as reader:
        for counter in (0, 1, 2, 3, 4, 700, 1203, 1204, 1205, 1206, count - 1):
            assert (await reader.get_version(f"v{counter:010d}")).commit_id == f"c{counter}"
        with pytest.raises(NotFound):
            await reader.get_version(f"v{count:010d}")


# --- verification ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [9_999_999_999, 4_000_000, 700])
@pytest.mark.parametrize("data", [b"anything", b"", "the last block"])
async def test_a_planted_block_is_named_in_time_that_the_log_bounds(
    number: int, data: bytes | str, tmp_path: Path
) -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await fill(store, 40, width=10)
        await store.ledger.close()
        planted = objects.objects[block_key(3)][0] if isinstance(data, str) else data
        await objects.put(block_key(number), planted)
        started = time.monotonic()
        report = await store.verify()
        assert time.monotonic() - started < 5
    named = [key for key, _ in report.problems]
    assert block_key(number) in named
    assert len(named) < 1000
    assert report.entries <= 50
    verify = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "verify_ledger.py"))["verify"]
    for key, (value, _) in objects.objects.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(value)
    assert block_key(number) in [key for key, _ in verify(tmp_path)[2]]


async def test_an_auditor_who_kept_an_entry_sees_whether_the_log_goes_on_from_it(
    on_moto: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "seen.json"

    def run(*arguments: str) -> tuple[int, str]:
        status = storage_command(["verify", on_moto, *arguments])
        return status, "".join(capsys.readouterr())

    def in_thread(*arguments: str) -> Any:
        return asyncio.to_thread(run, *arguments)

    async with AsyncBlockchainModelStore(on_moto, retry_delays=NO_DELAYS) as store:
        first = await store.commit(b"1", record("a"))
        await store.ledger.close()
        status, out = await in_thread("--memory", str(memory))
        assert (status, f"newest entry 0:{first.entry_hash}" in out) == (0, True)
        second = await store.commit(b"2", record("b"))
        await store.ledger.close()
        for arguments in (("--memory", str(memory)), ("--since", f"0:{first.entry_hash}")):
            assert (await in_thread(*arguments))[0] == 0
        assert orjson.loads(memory.read_bytes())["index"] == 1
        status, out = await in_thread("--since", f"1:{first.entry_hash}")
        assert status == 1
        assert "log/0000000001.jsonl: entry 1 has hash" in out
        with pytest.raises(SystemExit):
            await in_thread("--since", "latest")
        capsys.readouterr()
        # Cut back, with head.json and all: only who remembers can tell.
        await store.objects.delete(block_key(1))
        hint = {"block": 0, "index": 0, "hash": first.entry_hash}
        await store.objects.put("head.json", orjson.dumps(hint))
        assert (await in_thread())[0] == 0
        status, out = await in_thread("--memory", str(memory))
        assert (status, f"entry 1 with hash {second.entry_hash[:12]}" in out) == (1, True)
        assert orjson.loads(memory.read_bytes())["index"] == 1


# --- a hash is what one gets ------------------------------------------------------------------------------


async def test_who_asks_for_a_hash_gets_those_bytes_or_an_error() -> None:
    objects = MemoryObjectStore()
    files = []
    for steps in (2, 3):
        pricer = GbmCVNNPricer(small_config())
        pricer.train(small_training(steps))
        files.append(encode(Snapshot.of(pricer.snapshot())))
    asked, other = files
    async with opened(objects) as store:
        version = await store.commit(asked, record("lies", model_hash=model_hash(other)))
        again = await store.commit(asked, record("honest", model_hash=model_hash(asked)))
        await objects.put(blob_key(version.content_hash), other + b"" if len(other) == len(asked) else other)
        for reference in (version.content_hash, version.content_hash[:8], version.content_hash[:20]):
            with pytest.raises(Corrupt):
                await ModelFollower(store, reference).poll()
        with pytest.raises(Corrupt):
            await store.load_model(again, whole=True)
        await objects.put(blob_key(version.content_hash), asked)
        with pytest.raises(Corrupt, match="does not have the hash of its checkpoint's model"):
            await store.load_model(version, whole=True)
        follower = ModelFollower(store, version.content_hash)
        await follower.poll()
        assert follower.served is not None
        assert follower.served.version == again


def rewritten(file: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A checkpoint that describes itself otherwise; its tensors are the same."""
    with_metadata = safetensors.torch.load(file)
    size = int.from_bytes(file[:8], "little")
    fields = orjson.loads(orjson.loads(file[8 : 8 + size])["__metadata__"]["spectralmc"])
    change(fields)
    return safetensors.torch.save(with_metadata, metadata={"spectralmc": orjson.dumps(fields).decode()})


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["network"].update(hidden=[11_000, 11_000]),
        lambda f: f["network"].update(hidden=[60_000, 60_000]),
        lambda f: f["network"].update(hidden=[16, 10**9]),
        lambda f: f["network"].update(hidden=[1] * 100_000),
        lambda f: f["network"].update(numbers="real"),
        lambda f: f["network"].update(activation="modrelu"),
        lambda f: f["simulation"]["sim_params"].update(network_size=2**27, batches_per_mc_run=1),
        lambda f: f["simulation"]["sim_params"].update(dtype="float64"),
    ],
)
async def test_nothing_is_allocated_on_a_checkpoints_word(change: Any, on_moto: str, tmp_path: Path) -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    hostile = rewritten(encode(Snapshot.of(pricer.snapshot())), change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Corrupt, match="the checkpoint contradicts itself"):
        restore(decode(hostile))
    with suppress(SpectralMCError):  # a template may fit all the same
        GbmCVNNPricer(restore(decode(hostile), small_config().cvnn))
    async with opened(MemoryObjectStore()) as store:
        await store.commit(hostile, record("a", model_hash=model_hash(hostile)))
        with pytest.raises(Corrupt, match="the checkpoint contradicts itself"):
            await ModelFollower(store).poll()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(hostile)
    assert await asyncio.to_thread(storage_command, ["import", on_moto, str(path)]) == 2
    async with AsyncBlockchainModelStore(on_moto) as real:
        assert await real.list_versions() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# --- limits, files, names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"message": "x" * 70_000}, "message"),
        ({"message": "\x01" * 12_000}, "message"),  # six bytes each in JSON
        ({"experiment": "x" * 10**6}, "experiment"),
        ({"parameters": {"a": ["x" * 100] * 700}}, "parameters"),
        ({"metrics": {f"metric{i}": i / 7 for i in range(3000)}}, "metrics"),
    ],
)
async def test_an_entry_that_every_reader_would_have_to_read_for_ever_is_limited(
    changes: dict[str, Any], field: str
) -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        with pytest.raises(ConfigError, match=f"64,000 are allowed; its largest field, {field}, has"):
            await store.commit(b"x", record("large", **changes))
        assert await store.list_entries() == []
        await store.commit(b"x", record("a", message="x" * 63_000))


async def test_a_block_has_a_largest_size() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        content = await store.upload(b"x")
        calls = [store.append_commit(record(f"c{i}", message="x" * 60_000), *content) for i in range(100)]
        versions = await asyncio.gather(*calls)
        assert [v.counter for v in versions] == list(range(100))
    sizes = [len(data) for key, (data, _) in objects.objects.items() if key.startswith("log/")]
    assert max(sizes) <= 1_000_000
    assert len(sizes) == 7


async def test_a_collection_of_any_size_fits_into_entries() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        await store.commit(b"kept", record("kept"))
        for i in range(2500):
            await store.objects.put(blob_key(f"{i:064x}"), b"orphan")
        assert (await collect(store, RetentionPolicy(keep_last=1, min_age=timedelta(0)))).deleted == 2500
        assert max(len(e.line) for e in await store.list_entries()) <= 64_000
        assert (await store.verify()).ok


def test_what_is_spooled_is_private(tmp_path: Path) -> None:
    open_to_all = tmp_path / "spool"
    open_to_all.mkdir(mode=0o777)
    before = os.umask(0)
    try:
        path = Spool(open_to_all).save(record("a"), b"checkpoint")
    finally:
        os.umask(before)
    for file in (path, path.with_suffix(".json")):
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["log", "blobs", "index", "head.json", "waiting.json"])
def test_a_ledger_cannot_stand_inside_another(name: str) -> None:
    for uri in (f"s3://bucket/a/{name}", f"s3://bucket/{name}/b", f"s3://bucket/{name}"):
        with pytest.raises(ConfigError, match=r"would take .* for a part of its own"):
            AsyncBlockchainModelStore(uri)
    AsyncBlockchainModelStore(f"s3://bucket/{name}s")


def test_an_empty_tensor_may_stand_anywhere_in_a_file() -> None:
    tensors = {"b": torch.ones(3), "a": torch.empty(0), "c": torch.empty(4, 0), "d": torch.ones(2)}
    file = safetensors.torch.save(tensors)
    size = int.from_bytes(file[:8], "little")
    fields = orjson.loads(file[8 : 8 + size])
    for seed in range(24):
        names = list(fields)
        random.Random(seed).shuffle(names)
        text = orjson.dumps({name: fields[name] for name in names})
        text += b" " * (size - len(text))
        header = parse_header(text.join([file[:8], file[8 + size :]]), len(file))
        shapes = {name: place.shape for name, place in header.places.items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert np.frombuffer(file[header.places["d"].start : header.places["d"].stop], "<f4").tolist() == [1, 1]
