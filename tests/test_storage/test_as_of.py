"""What a ledger said at an earlier time, what its aliases named since, and that nothing of it is collected."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.errors import ConfigError, NotFound
from smc.learning.pricer import GbmCVNNPricer
from smc.problem.contracts import BoundSpec
from smc.serving.client import InferenceClient, ModelFollower
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.__main__ import main
from smc.storage.chain import Draft, block_key, build_block
from smc.storage.gc import RetentionPolicy, collect
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord, new_commit_id
from tests.conftest import NO_DELAYS, small_config, small_training

START = datetime(2026, 11, 26, 12, tzinfo=UTC)


def hash_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def commit_draft(number: int) -> Draft:
    payload = {
        "content_hash": hash_of(number),
        "size": 1,
        "experiment": "a",
        "step": number,
        "loss": None,
        "metrics": {},
        "message": "",
        "resumed_from": None,
    }
    return Draft("commit", new_commit_id(), payload)


def move_draft(alias: str, number: int | None, message: str = "") -> Draft:
    content_hash = None if number is None else hash_of(number)
    payload = {"alias": alias, "counter": number, "content_hash": content_hash, "message": message}
    return Draft("tag", new_commit_id(), payload)


async def write(store: AsyncBlockchainModelStore, drafts: Sequence[Draft], time: datetime) -> None:
    tail = await store.ledger.refresh()
    await store.objects.create(block_key(tail.block), build_block(tail, drafts, time))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 90), st.lists(st.sampled_from(["commit", "a", "b", "none a"]), min_size=1, max_size=4)
        ),
        max_size=12,
    ),
    st.lists(st.integers(-5, 1100), min_size=1, max_size=8),
)
def test_the_ledger_of_a_time_is_what_its_entries_said_by_then(
    blocks: list[tuple[int, list[str]]], asked: list[int]
) -> None:
    async def check() -> None:
        async with AsyncBlockchainModelStore("memory", objects=MemoryObjectStore(), retry_delays=NO_DELAYS) as store:
            minute, count = 0, 1
            state: dict[str, int] = {}
            history: list[tuple[int, int, dict[str, int]]] = [(0, 1, {})]
            await write(store, [commit_draft(0)], START)
            for pause, acts in blocks:
                minute += pause
                drafts = []
                for act in acts:
                    if act == "commit":
                        drafts.append(commit_draft(count))
                        count += 1
                    elif act == "none a":
                        drafts.append(move_draft("a", None))
                        state.pop("a", None)
                    else:
                        drafts.append(move_draft(act, count - 1))
                        state[act] = count - 1
                await write(store, drafts, START + timedelta(minutes=minute))
                history.append((minute, count, dict(state)))
            for at in asked:
                past = [(versions, aliases) for when, versions, aliases in history if when <= at]
                if not past:
                    with pytest.raises(NotFound, match="had no entry at"):
                        await store.catalog_at(START + timedelta(minutes=at))
                    continue
                catalog = await store.catalog_at(START + timedelta(minutes=at))
                assert len(catalog.versions) == past[-1][0]
                assert {name: version.counter for name, version in catalog.aliases.items()} == past[-1][1]

    asyncio.run(check())


async def test_an_entry_behind_one_of_a_later_time_is_left_out_and_counted(
    memory_store: AsyncBlockchainModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with memory_store as store:
        await write(store, [commit_draft(0)], START)
        await write(store, [commit_draft(1)], START + timedelta(hours=1))  # by a clock that is fast
        await write(store, [move_draft("a", 1), commit_draft(2)], START + timedelta(minutes=1))
        with caplog.at_level(logging.WARNING):
            catalog = await store.catalog_at(START + timedelta(minutes=30))
        assert (len(catalog.versions), dict(catalog.aliases)) == (1, {})
        assert "2 entries say a time before" in caplog.text
        caplog.clear()
        assert len((await store.catalog_at(START + timedelta(hours=1))).versions) == 3
        assert not caplog.records


async def test_an_empty_ledger_said_nothing_at_any_time(memory_store: AsyncBlockchainModelStore) -> None:
    async with memory_store as store:
        with pytest.raises(NotFound, match=r"had no entry at 2026-11-26 12:00:00 UTC: it is empty"):
            await store.catalog_at(START)


async def test_a_past_longer_than_an_index_segment_is_read(memory_store: AsyncBlockchainModelStore) -> None:
    async with memory_store as store:
        for number in range(300):
            await write(store, [commit_draft(number), move_draft("a", number)], START + timedelta(minutes=number))
        for minutes in (0, 254, 255, 256, 257, 299):
            catalog = await store.catalog_at(START + timedelta(minutes=minutes, seconds=30))
            assert catalog.aliases["a"].counter == minutes == len(catalog.versions) - 1


@pytest.fixture
def moved(on_seaweed: str) -> str:
    """A ledger of three trained versions; `production` named the first, the second, and since 12:20 the third."""

    async def build() -> None:
        async with AsyncBlockchainModelStore(on_seaweed, retry_delays=NO_DELAYS) as store:
            pricer, drafts = GbmCVNNPricer(small_config()), []
            async with AsyncBlockchainModelStore(
                "memory", objects=MemoryObjectStore(), retry_delays=NO_DELAYS
            ) as source:
                for _ in range(3):
                    pricer.train(small_training(2), blockchain_store=source, auto_commit=True, experiment="desk")
                for entry in await source.list_entries():
                    keep = ("content_hash", "size", "experiment", "step", "loss", "metrics", "message", "resumed_from")
                    drafts.append(Draft("commit", new_commit_id(), {key: entry.fields[key] for key in keep}))
                    assert entry.version is not None
                    blob = f"blobs/{entry.version.content_hash}.safetensors"
                    await store.objects.put(blob, bytes(await source.load_checkpoint(entry.version)))
            for number, draft in enumerate(drafts):
                move = {
                    "alias": "production",
                    "counter": number,
                    "content_hash": draft.payload["content_hash"],
                    "message": f"move {number}\n",
                }
                time = START + timedelta(minutes=10 * number)
                await write(store, [draft, Draft("tag", new_commit_id(), move)], time)
            await store.ledger.prepare()  # which writes head.json

    asyncio.run(build())
    return on_seaweed


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return orjson.loads(capsys.readouterr().out)


def test_commands_show_an_earlier_time(moved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--at", "2026-11-26T12:15")
    assert told(capsys, "inspect", moved, "production")["version"]["counter"] == 2
    assert told(capsys, "inspect", moved, "production", *at)["version"]["counter"] == 1
    assert told(capsys, "inspect", moved, *at)["version"]["aliases"] == ["production"]
    assert [v["counter"] for v in told(capsys, "list-versions", moved, *at)] == [0, 1]
    assert [v["counter"] for v in told(capsys, "list-versions", moved, "--tag", "production", *at)] == [1]
    assert [v["counter"] for v in told(capsys, "diff", moved, "0", "production", *at)["versions"]] == [0, 1]
    assert [len(run["versions"]) for run in told(capsys, "lineage", moved, *at)] == [2]
    file = tmp_path / "yesterday.safetensors"
    assert told(capsys, "export", moved, "production", str(file), *at)["version"]["counter"] == 1
    assert (
        hashlib.sha256(file.read_bytes()).hexdigest() == told(capsys, "inspect", moved, "1")["version"]["content_hash"]
    )
    page = tmp_path / "report.html"
    assert told(capsys, "report", moved, "--out", str(page), "--contracts", "16", *at)["versions"] == 3  # verified
    assert "2026-11-26 12:15:00 UTC" in page.read_text()
    assert "production, v0000000001" in page.read_text()
    assert main(["inspect", moved, "--at", "2026-11-26T11:59"]) == 2
    assert (
        "had no entry at 2026-11-26 11:59:00 UTC: its first entry is of 2026-11-26 12:00:00" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as refused:
        main(["inspect", moved, "--at", "yesterday"])
    assert refused.value.code == 2
    assert "'yesterday' is no time: like 2026-11-25" in capsys.readouterr().err


def test_the_history_of_an_alias(moved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tag", moved, "candidate", "0"]) == 0
    assert main(["untag", moved, "candidate", "--message", "not good"]) == 0
    rows = told(capsys, "alias-history", moved, "production")
    assert [(row["version"], row["time"][11:16], row["entry"]) for row in rows] == [
        ("v0000000000", "12:00", 1),
        ("v0000000001", "12:10", 3),
        ("v0000000002", "12:20", 5),
    ]
    assert main(["alias-history", moved]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("2026-11-26 12:00:00  production  v0000000000  ")
    assert lines[1].endswith(r"move 0\n")
    assert "  nothing  " in lines[5]
    assert lines[5].endswith("not good")
    assert main(["alias-history", moved, "best"]) == 2
    assert "there has never been an alias 'best': there have been candidate, production" in capsys.readouterr().err
    assert main(["alias-history", moved + "x"]) == 2


async def test_what_an_alias_once_named_is_collected_only_when_that_is_asked_for(
    memory_store: AsyncBlockchainModelStore,
) -> None:
    async with memory_store as store:
        versions: list[ModelVersion] = []
        for step in range(8):
            record = CommitRecord(ledger="x", message="", step=step, loss=None, experiment="a")
            versions.append(await store.commit(b"checkpoint %d" % step, record))
        for alias, number in (("production", 2), ("production", 3), ("candidate", 4), ("production", 5)):
            await store.tag(alias, versions[number])
        await store.untag("candidate")
        policy = RetentionPolicy(1, min_age=timedelta(0))
        assert policy.reasons(await store.catalog()) == {
            0: "the genesis",
            2: "alias production named it once",
            3: "alias production named it once",
            4: "alias candidate named it once",
            5: "alias production",
            7: "among the last 1",
        }
        assert (await collect(store, policy)).deleted == 2
        for number in (0, 2, 3, 4, 5, 7):
            assert await store.load_checkpoint(versions[number])
        assert (await collect(store, RetentionPolicy(1, min_age=timedelta(0), keep_once_named=False))).deleted == 3
        assert (await store.verify(blobs=True)).ok


def test_gc_has_an_option_for_it(moved: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = told(capsys, "gc-preview", moved, "1", "--min-age", "0")["kept"]
    assert [row["version"] for row in kept] == ["v0000000000", "v0000000001", "v0000000002"]
    kept = told(capsys, "gc-preview", moved, "1", "--min-age", "0", "--no-alias-history")["kept"]
    assert [row["version"] for row in kept] == ["v0000000000", "v0000000002"]


def test_a_price_is_proved_by_what_the_page_says_to_log(moved: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps of docs/proving-a-price.md, with the client of that day and the commands of a later one."""
    contracts = [[100, 105, 1.0, 0.03, 0.01, 0.25], [90, 100, 0.5, 0.02, 0.0, 0.3]]
    with InferenceClient(moved, "production") as client:
        served = client.current
        prices = served.predict_price(contracts)
        entry = f"{served.version.index}:{served.version.entry_hash}"
    assert main(["tag", moved, "production", "0"]) == 0
    assert main(["gc-run", moved, "1", "--min-age", "0", "--yes"]) == 0
    assert main(["verify", moved, "--since", entry, "--blobs"]) == 0
    version = told(capsys, "inspect", moved, served.version.content_hash)["version"]
    assert version["entry_hash"] == served.version.entry_hash
    with InferenceClient(moved, served.version.content_hash) as again:
        np.testing.assert_allclose(again.predict_price(contracts), prices, rtol=0, atol=1e-8 * 100)


# --- the domain that a client expects ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "field"),
    [
        ({"X0": {"lower": 50, "upper": 151}}, "X0"),
        ({"K": {"lower": 49, "upper": 150}}, "K"),
        ({"T": BoundSpec(lower=0.05, upper=3)}, "T"),
        ({"v": {"lower": 0.05, "upper": 20}}, "v"),
        ({"r": {"lower": -0.01, "upper": 0.08}, "d": {"lower": 0, "upper": 0.04}}, "r"),
    ],
)
def test_a_model_of_another_domain_is_not_served(moved: str, domain: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"was trained on {field} from .* to .*, and is to be asked from"):
        InferenceClient(moved, "production", domain=domain).start()


@pytest.mark.parametrize("domain", [{}, {"X0": {"lower": 50, "upper": 150}}, {"T": {"lower": 0.1, "upper": 1}}])
def test_a_model_of_a_domain_that_holds_it_is_served(moved: str, domain: Any) -> None:
    with InferenceClient(moved, "production", domain=domain) as client:
        assert client.status.problem is None


async def test_a_client_keeps_its_model_when_its_alias_moves_onto_one_of_another_domain(
    memory_store: AsyncBlockchainModelStore,
) -> None:
    async with memory_store as store:
        versions = []
        for bounds in ({}, {"T": BoundSpec(lower=0.05, upper=1)}):
            pricer = GbmCVNNPricer(replace(small_config(), domain_bounds=bounds))
            pricer.train(small_training(2), blockchain_store=store, auto_commit=True)
            head = await store.get_head()
            assert head is not None
            versions.append(head)
        await store.tag("production", versions[0])
        follower = ModelFollower(store, "production", domain={"T": {"lower": 0.5, "upper": 2}})
        await follower.poll()
        await store.tag("production", versions[1])
        for _ in range(3):
            with pytest.raises(ConfigError, match=r"v0000000001 was trained on T from 0.05 to 1, and .*in years"):
                await follower.poll()
            assert follower.served is not None
            assert follower.served.version == versions[0]
        assert "v0000000001 was trained on T" in (follower.status.problem or "")
        await store.tag("production", versions[0])
        for _ in range(100):  # the hint is written beside the entry
            with suppress(ConfigError):
                await follower.poll()
            if follower.status.problem is None:
                break
            await asyncio.sleep(0.05)
        assert follower.status.problem is None
        assert follower.status.wanted == versions[0]


def test_a_client_refuses_bounds_that_are_none(on_seaweed: str) -> None:
    for domain in ({"S0": {"lower": 1, "upper": 2}}, {"T": {"lower": 2, "upper": 1}}, {"T": 1}):
        with pytest.raises(ConfigError, match="domain_bounds"):
            InferenceClient(on_seaweed, domain=domain)  # type: ignore[arg-type]
