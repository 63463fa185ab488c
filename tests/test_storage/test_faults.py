"""Every fault at every request of a history; any history against a list; any change to any object."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from smc.errors import Unavailable
from smc.storage import AsyncBlockchainModelStore, recover
from smc.storage.chain import Draft
from smc.storage.limits import LIMITS
from smc.storage.objects import MemoryObjectStore, ObjectStore
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import NO_DELAYS, tag_draft
from tests.faults import FAULTS, FaultStore


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of four blocks and a memory of eight entries, so that short histories are longer than either."""
    monkeypatch.setattr(LIMITS, "segment", 4)
    monkeypatch.setattr(LIMITS, "remembered", 8)
    monkeypatch.setattr(LIMITS, "sorted_in", 4)


def opened(objects: ObjectStore) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS, timeout=0.03)


def record(name: str) -> CommitRecord:
    return CommitRecord(ledger="s3://memory", commit_id=name, message=name, step=1, loss=None)


class History:
    """A scripted life of a ledger. Every operation is acknowledged by noting its commit_id and index."""

    EXPECTED = ("a", "b", "c", "d", "tag", "e", "collect", "spooled-1", "spooled-2", "f", "g", "untag", "h")

    def __init__(self, objects: ObjectStore, spool: Spool) -> None:
        self.objects, self.spool = objects, spool
        self.acknowledged: list[tuple[str, int]] = []

    async def commit(self, store: AsyncBlockchainModelStore, name: str) -> None:
        version = await store.commit(f"checkpoint {name}".encode(), record(name))
        self.acknowledged.append((name, version.index))

    async def append(self, store: AsyncBlockchainModelStore, draft: Draft) -> None:
        entry = await store.ledger.append(draft)
        self.acknowledged.append((draft.commit_id, entry.index))

    async def run(self) -> None:
        async with opened(self.objects) as store:
            await store.ledger.prepare()
            await self.commit(store, "a")
            await asyncio.gather(*(self.commit(store, name) for name in "bcd"))
            await self.append(store, tag_draft("tag"))
            await self.commit(store, "e")
            await self.append(store, Draft("collect", "collect", {"content_hashes": []}))
        async with opened(self.objects) as store:  # opened again by another process
            await store.list_versions()
            head = await store.get_head()
            assert head is not None
            assert await store.load_checkpoint(head) == f"checkpoint {head.commit_message}".encode()
            for version in await recover(store, self.spool):
                self.acknowledged.append((version.commit_id, version.index))
            await self.commit(store, "f")
            await self.commit(store, "g")
            assert (await store.get_version("v0000000001")).counter == 1
        async with opened(self.objects) as store:
            for version in await store.list_versions():
                await store.load_checkpoint(version)
            await self.append(store, tag_draft("untag"))
            await self.commit(store, "h")


async def ended(history: Coroutine[Any, Any, None], crashed: asyncio.Event) -> None:
    """Run until it ends, fails, or the process is gone."""
    running = asyncio.ensure_future(history)
    crash = asyncio.ensure_future(crashed.wait())
    await asyncio.wait({running, crash}, return_when=asyncio.FIRST_COMPLETED)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    with contextlib.suppress(BaseException):
        await running
    await asyncio.sleep(0)


async def scenario(call: int, fault: str, tmp_path: Path) -> int:
    """One fault at one request, then a crash, then a process that does it all again; -> requests made."""
    inner = MemoryObjectStore()
    spool = Spool(tmp_path / f"{call}-{fault}")
    for name in ("spooled-1", "spooled-2"):
        spool.save(record(name), f"checkpoint {name}".encode())
    objects = FaultStore(inner, lambda n, operation, key: fault if n == call else None)
    first = History(objects, spool)
    await ended(first.run(), objects.crashed)
    # What was acknowledged is there, whatever happened after it.
    async with opened(inner) as store:
        stored = {entry.commit_id: entry.index for entry in await store.list_entries()}
        for name, index in first.acknowledged:
            assert stored.get(name) == index, (call, fault, objects.log[call], name)
        await store.ledger.prepare()
    # The next process submits everything again under the same identities.
    second = History(inner, spool)
    await second.run()
    for name in ("spooled-1", "spooled-2"):
        if name not in dict(second.acknowledged):
            second.acknowledged.append((name, stored.get(name, dict(first.acknowledged).get(name, -1))))
    async with opened(inner) as store:
        entries = await store.list_entries()
        assert Counter(e.commit_id for e in entries) == Counter(History.EXPECTED), (call, fault, objects.log[call])
        assert [e.index for e in entries] == list(range(len(entries)))
        for name, index in first.acknowledged:
            assert next(e.index for e in entries if e.commit_id == name) == index
        report = await store.verify(blobs=True)
        assert report.ok, (call, fault, objects.log[call], report.problems)
    assert list(spool.records()) == []
    return objects.calls


@pytest.mark.long
def test_every_fault_at_every_request_of_a_history_loses_and_doubles_nothing(tmp_path: Path) -> None:
    total = asyncio.run(scenario(-1, "none", tmp_path))
    count = 0
    for fault in FAULTS:
        for call in range(total):
            asyncio.run(scenario(call, fault, tmp_path))
            count += 1
    print(f"\n{count} scenarios: {len(FAULTS)} faults at each of {total} requests")
    assert count >= 300


class LedgerMachine(RuleBasedStateMachine):
    """Two writers, crashes and faults, against a list. A failure is replayed by its printed seed."""

    longest_behind = submitted_again = forgotten = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.inner = MemoryObjectStore()
        self.faults: list[str] = []
        self.stores: list[AsyncBlockchainModelStore | None] = [None, None]
        self.order: list[str] = []  # the model: commit_ids as they stand in the ledger
        self.unsure: set[str] = set()
        self.names = 0

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def start(self) -> None:
        for writer in (0, 1):
            self.open(writer)
        self.submit(0, [self.draft("tag") for _ in range(6)])  # a history that is longer than what is remembered
        self.submit(1, [self.draft("commit") for _ in range(6)])

    def open(self, writer: int) -> None:
        def plan(call: int, operation: str, key: str) -> str | None:
            return self.faults.pop(0) if self.faults else None

        store = opened(FaultStore(self.inner, plan))
        self.run(store.__aenter__())
        self.stores[writer] = store

    def submit(self, writer: int, drafts: list[Draft]) -> None:
        store = self.stores[writer]
        assert store is not None
        results = self.run(_all(store.ledger.append(d) for d in drafts))
        for draft, result in zip(drafts, results, strict=True):
            if isinstance(result, Unavailable):
                self.unsure.add(draft.commit_id)
            elif isinstance(result, BaseException):
                raise result

    def draft(self, kind: str) -> Draft:
        self.names += 1
        if kind == "tag":
            return tag_draft(f"id{self.names}")
        payload: dict[str, Any] = {"content_hashes": []}
        if kind == "commit":
            payload = {
                "content_hash": f"{self.names:064x}",
                "size": 1,
                "experiment": "",
                "step": self.names,
                "loss": None,
                "metrics": {},
                "message": "",
                "resumed_from": None,
            }
        return Draft(kind, f"id{self.names}", payload)

    @rule(
        writer=st.sampled_from([0, 1]),
        kinds=st.lists(st.sampled_from(["commit", "tag", "collect"]), min_size=1, max_size=5),
    )
    def append(self, writer: int, kinds: list[str]) -> None:
        self.submit(writer, [self.draft(kind) for kind in kinds])

    @precondition(lambda self: self.order)
    @rule(writer=st.sampled_from([0, 1]), data=st.data())
    def submit_again(self, writer: int, data: st.DataObject) -> None:
        # Entries that a writer has forgotten are what this is about: they are drawn where there are some.
        name = data.draw(st.sampled_from(self.order[:-8] or self.order))
        LedgerMachine.submitted_again += 1
        LedgerMachine.forgotten += self.order.index(name) < len(self.order) - 8
        store = self.stores[writer]
        assert store is not None
        with contextlib.suppress(Unavailable):
            entry = self.run(store.ledger.append(tag_draft(name)))
            assert entry.index == self.order.index(name)

    @rule(blocks=st.integers(1, 60), kind=st.sampled_from(["commit", "tag", "collect"]))
    def somebody_else_writes(self, blocks: int, kind: str) -> None:
        """Both writers are so many blocks behind, and have forgotten what they read before."""
        drafts = [self.draft(kind) for _ in range(blocks)]

        async def write() -> None:
            async with opened(self.inner) as store:
                for draft in drafts:
                    await store.ledger.append(draft)

        self.faults, waiting = [], self.faults
        self.run(write())
        self.faults = waiting
        LedgerMachine.longest_behind = max(LedgerMachine.longest_behind, blocks)

    @rule(writer=st.sampled_from([0, 1]))
    def crash_and_reopen(self, writer: int) -> None:
        self.open(writer)  # the old one is dropped as it is

    @rule(faults=st.lists(st.sampled_from(["fails", "applied", "hangs", "hangs-applied", "truncated"]), max_size=6))
    def requests_will_fail(self, faults: list[str]) -> None:
        self.faults = list(faults)

    @invariant()
    def the_ledger_is_the_list(self) -> None:
        self.faults, waiting = [], self.faults

        async def read() -> list[str]:
            async with opened(self.inner) as store:
                return [entry.commit_id for entry in await store.list_entries()]

        stored = self.run(read())
        assert stored[: len(self.order)] == self.order, "what was there has changed"
        assert len(set(stored)) == len(stored), "an entry stands there twice"
        new = set(stored[len(self.order) :])
        acknowledged = {f"id{n}" for n in range(1, self.names + 1)} - self.unsure
        assert acknowledged <= set(stored), "an acknowledged entry is missing"
        assert new <= acknowledged | self.unsure
        self.order = stored
        self.faults = waiting

    def teardown(self) -> None:
        self.faults = []

        async def finish() -> None:
            async with opened(self.inner) as store:
                await store.ledger.prepare()
            async with opened(self.inner) as store:
                report = await store.verify()
                missing = [p for p in report.problems if not p[0].startswith("blobs/")]
                assert not missing, missing

        self.run(finish())
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


async def _all(calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None, print_blob=True)


class TestLedgerMachine(LedgerMachine.TestCase):  # type: ignore[name-defined,misc]
    """The machine above, with short segments."""


def test_the_machine_went_past_what_is_remembered() -> None:
    if LedgerMachine.submitted_again == 0:  # this test runs alone, or before the machine
        run_state_machine_as_test(LedgerMachine, settings=LedgerMachine.TestCase.settings)
    print(
        f"\n{LedgerMachine.submitted_again} entries submitted again, {LedgerMachine.forgotten} of them older than what "
        f"is remembered; at most {LedgerMachine.longest_behind} blocks behind"
    )
    assert LedgerMachine.forgotten > 5
    assert LedgerMachine.longest_behind > 30


async def _small_ledger() -> MemoryObjectStore:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for step in range(7):
            await store.commit(f"checkpoint {step}".encode() * 20, record(f"c{step}"))
        await asyncio.gather(*(store.ledger.append(tag_draft(f"t{i}")) for i in range(4)))
        await store.commit(b"last", record("last"))
    return objects


def _mutate(objects: dict[str, bytes], old_heads: list[bytes], rng: random.Random) -> tuple[str, set[str]]:
    """One random change to a copy of a ledger; -> what it was, and the objects it touched."""
    keys = sorted(objects)
    key = rng.choice(keys)
    data = objects[key]
    kind = rng.choice(["flip", "truncate", "swap", "delete", "reorder", "head", "extend"])
    if kind == "flip":
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        objects[key] = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    elif kind == "truncate":
        objects[key] = data[: rng.randrange(len(data))]
    elif kind == "extend":
        objects[key] = data + rng.choice([b"\n", b"{}\n", b" ", data])
    elif kind == "swap":
        other = rng.choice([k for k in keys if k != key and objects[k] != data])
        objects[key], objects[other] = objects[other], data
        return f"swap {key} {other}", {key, other}
    elif kind == "delete":
        del objects[key]
    elif kind == "reorder":
        key = rng.choice([k for k in keys if objects[k].count(b"\n") > 1])
        lines = objects[key].splitlines(keepends=True)
        objects[key] = b"".join(lines[1:] + lines[:1])
    else:
        key = "head.json"
        objects[key] = rng.choice(old_heads)
    return f"{kind} {key}", {key}


def test_none_of_a_thousand_random_changes_to_a_ledger_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def instantly(delay: float, *rest: Any) -> None:
        await real_sleep(0)

    real_sleep = asyncio.sleep
    monkeypatch.setattr("smc.storage.verify.asyncio.sleep", instantly)

    async def run() -> Counter[str]:
        original = await _small_ledger()
        data = {key: value for key, (value, _) in original.objects.items()}
        assert (await opened_verify(original)).ok
        entries = [line for n in range(7) for line in data[f"log/{n:010d}.jsonl"].splitlines(keepends=True)]
        old_heads = [
            b'{"block":%d,"index":%d,"hash":"%s"}' % (n, n, hashlib.sha256(entries[n]).hexdigest().encode())
            for n in range(7)
        ]
        rng = random.Random(20261123)
        kinds: Counter[str] = Counter()
        for _ in range(1000):
            changed = dict(data)
            what, touched = _mutate(changed, old_heads, rng)
            copy = MemoryObjectStore()
            for key, value in changed.items():
                await copy.put(key, value)
            report = await opened_verify(copy)
            assert not report.ok, f"missed: {what}"
            named = {key for key, _ in report.problems}
            assert named & touched, f"{what}: named {report.problems}"
            kinds[what.split()[0]] += 1
        return kinds

    kinds = asyncio.run(run())
    print(f"\n{sum(kinds.values())} changes, none missed: {dict(kinds)}")


async def opened_verify(objects: MemoryObjectStore) -> Any:
    async with opened(objects) as store:
        return await store.verify(blobs=True)


async def test_an_index_that_lies_is_passed_over_and_named() -> None:
    objects = await _small_ledger()
    good = objects.objects["index/0000000000.json"][0]
    lie = good.replace(b"c2", b"c9")
    assert lie != good
    await objects.put("index/0000000000.json", lie)
    async with opened(objects) as store:
        assert [v.commit_id for v in await store.list_versions()] == [f"c{i}" for i in range(7)] + ["last"]
        report = await store.verify()
        assert [key for key, _ in report.problems] == ["index/0000000000.json"]


async def test_missing_indexes_are_made_again_by_the_next_writer() -> None:
    objects = await _small_ledger()
    kept = dict(objects.objects)
    for key in [k for k in objects.objects if k.startswith("index/")]:
        await objects.delete(key)
    async with opened(objects) as store:
        await store.commit(b"one more", record("more"))
    for key in [k for k in kept if k.startswith("index/")]:
        assert objects.objects[key][0] == kept[key][0]


async def test_a_long_ledger_is_opened_and_listed_in_few_requests() -> None:
    inner = MemoryObjectStore()
    async with opened(inner) as store:
        for i in range(200):
            await store.ledger.append(tag_draft(f"t{i}"))
    counted = FaultStore(inner, lambda call, operation, key: None)
    async with opened(counted) as store:
        assert len(await store.list_entries()) == 200
    gets = [key for operation, key in counted.log if operation == "get"]
    assert sum(key.startswith("log/") for key in gets) < 12
