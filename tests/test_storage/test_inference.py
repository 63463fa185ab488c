"""Serving: whole, verified models, swapped beside predictions; and ledgers that are refused."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smc.checkpoint.file import Snapshot, encode
from smc.checkpoint.tensor_header import model_hash
from smc.errors import ConfigError, Corrupt, NotFound, NumericsError, Unavailable
from smc.learning.pricer import GbmCVNNPricer
from smc.problem.contracts import DEFAULT_DOMAIN
from smc.problem.sobol_sampler import SobolSampler
from smc.serving.client import InferenceClient, ModelFollower, load_predictor
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.chain import blob_key
from smc.storage.ledger import HEAD_KEY
from smc.storage.objects import MemoryObjectStore, ObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS, small_config, small_training
from tests.faults import FaultStore

CONTRACTS = SobolSampler(DEFAULT_DOMAIN, seed=5).sample(4)


def opened(objects: ObjectStore) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS)


@pytest.fixture(scope="module")
def checkpoints() -> list[tuple[bytes, np.ndarray]]:
    """Twenty states, each with what it predicts."""
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(3))
    state = pricer.snapshot()
    made = []
    for _ in range(20):
        with torch.no_grad():
            next(state.cvnn.parameters()).add_(0.01)
        made.append((encode(Snapshot.of(state)), np.asarray(GbmCVNNPricer(state).predict_price(CONTRACTS))))
    return made


class Ledger:
    """A ledger in memory, and what its versions predict."""

    def __init__(self, checkpoints: list[tuple[bytes, np.ndarray]]) -> None:
        self.objects, self.checkpoints = MemoryObjectStore(), checkpoints
        self.prices: dict[int, np.ndarray] = {}

    async def commit(self, store: AsyncBlockchainModelStore, experiment: str = "a") -> ModelVersion:
        data, prices = self.checkpoints[len(self.prices) % len(self.checkpoints)]
        step = len(self.prices)
        record = CommitRecord(
            ledger="x", message="m", step=step, loss=None, experiment=experiment, model_hash=model_hash(data)
        )
        version = await store.commit(data, record)
        self.prices[version.counter] = prices
        return version

    def check(self, follower: ModelFollower | InferenceClient, version: ModelVersion) -> None:
        served = follower.served if isinstance(follower, ModelFollower) else follower.current
        assert served is not None
        assert served.version == version
        np.testing.assert_array_equal(served.predict_price(CONTRACTS), self.prices[version.counter])


@pytest.fixture
def ledger(checkpoints: list[tuple[bytes, np.ndarray]]) -> Ledger:
    return Ledger(checkpoints)


async def settled(follower: ModelFollower) -> None:
    for _ in range(3):
        await follower.poll()


async def test_what_a_reference_means_is_served_and_followed(ledger: Ledger) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        first, second = await ledger.commit(store, "one"), await ledger.commit(store, "two")
        await store.tag("live", first)
        followers = {
            name: ModelFollower(reader, name.removeprefix("pinned:"), track=False if ":live" in name else None)
            for name in ("head", "head:one", "live", "pinned:live", "v0000000001", second.content_hash[:10])
        }
        for follower in followers.values():
            await settled(follower)
        for name, wanted in zip(followers, (second, first, first, first, second, second), strict=True):
            ledger.check(followers[name], wanted)
        third, fourth = await ledger.commit(store, "two"), await ledger.commit(store, "one")
        await store.tag("live", third)
        await store.ledger.close()  # the hint is written beside the acknowledgements
        for follower in followers.values():
            await follower.poll()
        for name, wanted in zip(followers, (fourth, fourth, third, first, second, second), strict=True):
            ledger.check(followers[name], wanted)
            assert followers[name].status.problem is None
        await store.tag("live", second)  # a rollback is a move like any other
        await store.ledger.close()
        await followers["live"].poll()
        ledger.check(followers["live"], second)


async def test_an_idle_poll_is_one_request_and_a_pinned_one_none(ledger: Ledger) -> None:
    counted = FaultStore(ledger.objects, lambda call, operation, key: None)
    async with opened(ledger.objects) as store, opened(counted) as reader:
        version = await ledger.commit(store)
        await store.ledger.close()
        follower = ModelFollower(reader)
        await settled(follower)
        for _ in range(64):
            before = counted.calls
            await follower.poll()
            assert counted.calls == before + 1
        assert {operation for operation, _ in counted.log[-64:]} == {"get_if_changed", "stat"}
        ledger.check(follower, version)
        pinned = ModelFollower(reader, version.version_id)
        await pinned.poll()
        before = counted.calls
        await pinned.poll()
        assert counted.calls == before


async def test_only_the_model_is_read(ledger: Ledger) -> None:
    counted = FaultStore(ledger.objects, lambda call, operation, key: None)
    async with opened(ledger.objects) as store, opened(counted) as reader:
        await ledger.commit(store)
        await ModelFollower(reader).poll()
    assert {operation for operation, key in counted.log if key.startswith("blobs/")} == {"get_range"}


async def test_a_hint_that_is_lost_or_stale_is_made_up_for(ledger: Ledger) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        await ledger.commit(store)
        await store.ledger.close()
        follower = ModelFollower(reader)
        await settled(follower)
        stale = ledger.objects.objects[HEAD_KEY]
        newer = await ledger.commit(store)
        await store.ledger.close()
        ledger.objects.objects[HEAD_KEY] = stale  # as if the writer had been killed before it wrote another
        for _ in range(16):
            await follower.poll()
        ledger.check(follower, newer)


async def test_the_old_model_is_served_while_the_new_one_is_corrupt_or_gone(ledger: Ledger) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        old = await ledger.commit(store)
        follower = ModelFollower(reader)
        await settled(follower)
        new = await ledger.commit(store)
        await store.ledger.close()
        key = blob_key(new.content_hash)
        data, modified = ledger.objects.objects[key]
        ledger.objects.objects[key] = (data[:-9000] + b"\x00" * 9000, modified)
        spoilt = bytearray(data)
        spoilt[data.index(b"model.layers.0.weight") + 5000] ^= 1
        for content, error in ((bytes(spoilt), Corrupt), (data[: len(data) // 2], Corrupt), (None, NotFound)):
            if content is None:
                del ledger.objects.objects[key]
            else:
                ledger.objects.objects[key] = (content, modified)
            follower._retry_at = 0.0
            for _ in range(2):
                with pytest.raises(error, match=key):
                    await follower.poll()
                ledger.check(follower, old)
                status = follower.status
                assert (status.serving, status.wanted) == (old, new)
                assert status.problem is not None
                assert status.problem.startswith(f"{error.__name__}: ")
        ledger.objects.objects[key] = (data, modified)
        follower._retry_at = 0.0
        await follower.poll()
        ledger.check(follower, new)
        assert follower.status.problem is None


async def test_the_model_is_served_while_s3_is_down(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    down = False
    flaky = FaultStore(ledger.objects, lambda call, operation, key: "fails" if down else None)
    async with opened(ledger.objects) as store, opened(flaky) as reader:
        old = await ledger.commit(store)
        follower = ModelFollower(reader)
        await settled(follower)
        down = True
        for _ in range(20):
            with pytest.raises(Unavailable):
                await follower.poll()
            ledger.check(follower, old)
        (line,) = (r.message for r in caplog.records if r.levelname == "WARNING")
        assert line.endswith("; goes on with v0000000000")
        assert "Unavailable: head.json: 503" in line
        new = await ledger.commit(store)
        await store.ledger.close()
        down = False
        await follower.poll()
        ledger.check(follower, new)


async def test_a_model_that_does_not_predict_is_not_served(ledger: Ledger) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        old = await ledger.commit(store)
        follower = ModelFollower(reader)
        await settled(follower)
        state = small_config()
        record = CommitRecord(ledger="x", message="", step=0, loss=None)
        untrained = await store.commit(encode(Snapshot.of(state)), record)
        with pytest.raises(ConfigError, match="was committed before any training"):
            await load_predictor(store, untrained)
        pricer = GbmCVNNPricer(state)
        pricer.train(small_training(1))
        with torch.no_grad():
            next(pricer.model.parameters()).fill_(float("nan"))
        data = encode(Snapshot.of(pricer.snapshot()))
        await store.commit(data, CommitRecord(ledger="x", message="", step=1, loss=None, model_hash=model_hash(data)))
        await store.ledger.close()
        with pytest.raises(NumericsError, match="v0000000002 does not predict"):
            await follower.poll()
        ledger.check(follower, old)


def rolled_back(objects: MemoryObjectStore, earlier: dict[str, Any], other: dict[str, Any]) -> None:
    """Everything as it was some commits ago."""
    objects.objects = dict(earlier)


def truncated(objects: MemoryObjectStore, earlier: dict[str, Any], other: dict[str, Any]) -> None:
    """Only the log's last block is gone; head.json still names it."""
    objects.objects = {k: v for k, v in objects.objects.items() if k != max(k for k in objects.objects if "log/" in k)}


def forked(objects: MemoryObjectStore, earlier: dict[str, Any], other: dict[str, Any]) -> None:
    """Another history from some commits ago on, longer than this one."""
    objects.objects = dict(other)


@pytest.mark.parametrize("change", [rolled_back, truncated, forked])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_ledger_that_does_not_lead_on_from_what_was_served_is_refused(
    change: Any, restarted: bool, ledger: Ledger, tmp_path: Path
) -> None:
    memory = tmp_path / "seen.json"
    async with opened(ledger.objects) as store:
        for _ in range(3):
            await ledger.commit(store)
        await store.ledger.close()
    earlier = dict(ledger.objects.objects)
    another = MemoryObjectStore()
    another.objects = dict(earlier)
    async with opened(another) as store:
        for i in range(6):
            await store.tag(f"fork{i}", await store.resolve("0"))
    async with opened(ledger.objects) as store:
        for _ in range(3):
            served = await ledger.commit(store)
    async with opened(ledger.objects) as reader:
        follower = ModelFollower(reader, memory=memory)
        await settled(follower)
        ledger.check(follower, served)
        whole = dict(ledger.objects.objects)
        change(ledger.objects, earlier, another.objects)
        if not restarted:
            problems = []
            for _ in range(32):
                with suppress(Corrupt):
                    await follower.poll()
                problems.append(follower.status.problem)
                ledger.check(follower, served)
            first = next(i for i, problem in enumerate(problems) if problem)
            assert first <= 16
            assert all(
                problem and problem.startswith("Corrupt: log/0000000005.jsonl: ") for problem in problems[first:]
            )
            ledger.objects.objects = whole
            await follower.poll()
            assert follower.status.problem is None
    if restarted:
        async with opened(ledger.objects) as reader:
            again = ModelFollower(reader, memory=memory)
            for _ in range(2):
                with pytest.raises(Corrupt, match=r"log/0000000005.jsonl: (the block, which was there|its last entry)"):
                    await again.poll()
                assert again.served is None
        ledger.objects.objects = whole
        async with opened(ledger.objects) as reader:
            again = ModelFollower(reader, memory=memory)
            await again.poll()
            ledger.check(again, served)


async def test_an_alias_that_is_gone_for_a_while_is_followed_again(ledger: Ledger) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        old, new = await ledger.commit(store), await ledger.commit(store)
        await store.tag("live", old)
        follower = ModelFollower(reader, "live")
        await settled(follower)
        await store.untag("live")
        await store.ledger.close()
        for _ in range(20):
            with pytest.raises(NotFound, match="'live' is no version here"):
                await follower.poll()
            ledger.check(follower, old)
        await store.tag("live", new)
        await store.ledger.close()
        await follower.poll()
        ledger.check(follower, new)
        assert follower.status.problem is None


async def test_a_memory_that_cannot_be_written_is_a_problem_and_no_hindrance(ledger: Ledger, tmp_path: Path) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        await ledger.commit(store)
        follower = ModelFollower(reader, memory=tmp_path / "gone" / "seen.json")
        await settled(follower)
        newer = await ledger.commit(store)
        await store.ledger.close()
        await follower.poll()
        ledger.check(follower, newer)
        assert follower.status.problem is not None
        assert follower.status.problem.startswith("FileNotFoundError: ")
        (tmp_path / "gone").mkdir()
        await ledger.commit(store)
        await store.ledger.close()
        await follower.poll()
        assert follower.status.problem is None
        assert os.listdir(tmp_path / "gone") == ["seen.json"]


def test_a_client_starts_and_ends_as_often_as_one_likes(ledger: Ledger) -> None:
    client = InferenceClient(opened(ledger.objects), poll_seconds=0.01)
    for _ in range(2):
        with pytest.raises(NotFound, match="the ledger is empty"):
            client.start()
    version = asyncio.run(_one_commit(ledger))
    for _ in range(10):
        client.start()
        client.close()
    ledger.check(client, version)
    client.close()
    threads = [threading.Thread(target=client.start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([thread for thread in threading.enumerate() if thread.name == "smc-serving"]) == 1
    client.close()


def test_a_server_that_never_answers_holds_up_neither_start_nor_close(ledger: Ledger) -> None:
    hangs = FaultStore(ledger.objects, lambda call, operation, key: "hangs")
    client = InferenceClient(opened(hangs))
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"nothing to serve after 0.2 s"):
        client.start(timeout=0.2)
    assert time.monotonic() - started < 5


def test_what_goes_wrong_in_loading_is_a_problem_and_tried_again(
    ledger: Ledger, client: InferenceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = client.current.version

    def full(*arguments: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("smc.serving.follower._built", full)
        new = asyncio.run(_one_commit(ledger))
        deadline = time.monotonic() + 20
        while client.status.problem is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.status.problem == "RuntimeError: CUDA out of memory"
        ledger.check(client, old)
    while client.status.serving != new and time.monotonic() < deadline:
        time.sleep(0.01)
    ledger.check(client, new)


async def test_wrong_input_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    async with opened(ledger.objects) as store, opened(ledger.objects) as reader:
        with pytest.raises(NotFound, match="the ledger is empty"):
            await ModelFollower(reader).poll()
        await ledger.commit(store)
        with pytest.raises(NotFound, match="'live' is no version here"):
            await ModelFollower(reader, "live").poll()
        with pytest.raises(ConfigError, match="v0000000000 never moves: there is nothing to track"):
            await ModelFollower(reader, "v0000000000", track=True).poll()
        with pytest.raises(ConfigError, match=r"sees no CUDA device|only 'cpu' and 'cuda'"):
            ModelFollower(reader, device="cuda" if not torch.cuda.is_available() else "meta")
        memory = tmp_path / "seen.json"
        memory.write_text("{}")
        with pytest.raises(ConfigError, match="does not say where a ledger ended"):
            ModelFollower(reader, memory=memory)
        memory.write_text('{"ledger": "s3://other", "block": 0, "hash": "0"}')
        with pytest.raises(ConfigError, match="is about s3://other, not s3://memory"):
            ModelFollower(reader, memory=memory)
    with pytest.raises(ConfigError, match="poll_seconds must be above 0"):
        InferenceClient(opened(ledger.objects), poll_seconds=0)
    client = InferenceClient(opened(ledger.objects), "nothing")
    with pytest.raises(ConfigError, match="nothing is served yet"):
        client.predict_price(CONTRACTS)
    with pytest.raises(NotFound, match="'nothing' is no version here"):
        client.start()
    assert not [thread for thread in threading.enumerate() if thread.name == "smc-serving"]


def test_a_server_that_is_away_is_waited_for(ledger: Ledger) -> None:
    asyncio.run(_one_commit(ledger))
    fails = FaultStore(ledger.objects, lambda call, operation, key: "fails" if call < 30 else None)
    with InferenceClient(opened(fails), poll_seconds=0.01) as client:
        ledger.check(client, client.current.version)
    never = FaultStore(ledger.objects, lambda call, operation, key: "fails")
    with pytest.raises(Unavailable, match="503"):
        InferenceClient(opened(never), poll_seconds=0.01).start(timeout=0.5)


async def _one_commit(ledger: Ledger) -> ModelVersion:
    async with opened(ledger.objects) as store:
        return await ledger.commit(store)


@pytest.fixture
def client(ledger: Ledger) -> Iterator[InferenceClient]:
    asyncio.run(_one_commit(ledger))
    with InferenceClient(opened(ledger.objects), poll_seconds=0.001) as client:
        yield client


@pytest.mark.long
def test_a_thousand_commits_are_served_whole_and_swapped_unseen(ledger: Ledger, client: InferenceClient) -> None:
    """As many swaps as ten minutes of polls could see; callers never wait for one, nor see half of one."""
    stop = threading.Event()
    seen: list[tuple[int, bytes]] = []
    swaps: list[float] = []  # seconds to get the model, for calls that met a new one
    first_calls: list[float] = []
    other_calls: list[float] = []

    def ask() -> None:
        last = -1
        while not stop.is_set():
            started = time.perf_counter()
            served = client.current
            got = time.perf_counter()
            prices = np.asarray(served.predict_price(CONTRACTS))
            done = time.perf_counter()
            counter = served.version.counter
            seen.append((counter, prices.tobytes()))
            if counter != last:
                swaps.append(got - started)
            (first_calls if counter != last else other_calls).append(done - got)
            last = counter
            time.sleep(0.002)

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()

    async def commit_all() -> None:
        async with opened(ledger.objects) as store:
            for _ in range(1000):
                version = await ledger.commit(store)
                await store.ledger.close()  # the hint is written beside the acknowledgements
                while client.status.serving != version:
                    assert client.status.problem is None
                    await asyncio.sleep(0.0005)

    asyncio.run(commit_all())
    stop.set()
    for caller in callers:
        caller.join()
    assert client.status.swaps == 1001
    for counter, prices in seen:
        assert prices == ledger.prices[counter].tobytes()
    assert len({counter for counter, _ in seen}) > 900
    p99, ratio = np.quantile(swaps, 0.99), np.median(first_calls) / np.median(other_calls)
    print(
        f"\n{len(seen)} predictions, {len(swaps)} swaps seen: p99 {1e6 * p99:.0f} us; "
        f"a version's first call takes {ratio:.2f} x the others"
    )
    assert p99 < 1e-3
    assert ratio < 5
    assert len(client._follower._retired) <= 4  # what nobody holds any more is gone
