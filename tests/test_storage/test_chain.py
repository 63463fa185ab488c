from __future__ import annotations

import hashlib
import subprocess
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.errors import ConfigError, Corrupt
from smc.storage.chain import (
    GENESIS_PARENT,
    Draft,
    ModelVersion,
    Tail,
    build_block,
    check_after,
    parse_block,
    parse_version_id,
    version_id,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def commit(name: str, **changes: object) -> Draft:
    payload: dict[str, object] = {
        "content_hash": hashlib.sha256(name.encode()).hexdigest(),
        "size": 10,
        "experiment": "e",
        "step": 1,
        "loss": 0.5,
        "metrics": {},
        "message": "m",
        "resumed_from": None,
    }
    return Draft("commit", name, {**payload, **changes})


def test_a_block_is_json_lines_whose_hashes_sha256sum_agrees_with(tmp_path: object) -> None:
    data = build_block(Tail(), [commit("a"), commit("b")], NOW)
    path = f"{tmp_path}/0000000000.jsonl"
    with open(path, "wb") as file:
        file.write(data)
    entries = parse_block(0, data)
    shell = subprocess.run(f"sed -n 1p {path} | sha256sum", shell=True, capture_output=True, text=True, check=True)
    assert shell.stdout.split()[0] == entries[0].hash == entries[1].fields["parent_hash"]
    first = orjson.loads(data.splitlines()[0])
    assert first["parent_hash"] == GENESIS_PARENT
    assert first["timestamp"] == "2026-01-02T03:04:05.678901Z"
    assert list(first)[:7] == ["format", "index", "kind", "parent_hash", "timestamp", "commit_id", "counter"]


@given(st.lists(st.lists(st.sampled_from(["commit", "tag", "future"]), min_size=1, max_size=4), max_size=8))
def test_any_blocks_chain_and_number_densely(kinds: list[list[str]]) -> None:
    tail, built, names = Tail(), [], 0
    for number, block in enumerate(kinds):
        drafts = []
        for kind in block:
            drafts.append(commit(str(names)) if kind == "commit" else Draft(kind, str(names), {"x": 1}))
            names += 1
        data = build_block(tail, drafts, NOW)
        entries = parse_block(number, data)
        after = check_after(tail, entries)
        assert after == tail.after(entries)
        tail = after
        built += entries
    assert [e.index for e in built] == list(range(names))
    versions = [v for e in built if (v := e.version)]
    assert [v.counter for v in versions] == list(range(len(versions)))
    assert tail.counter == len(versions)


def test_a_kind_this_version_does_not_know_is_carried() -> None:
    data = build_block(Tail(), [Draft("seal", "x", {"by": "somebody"})], NOW)
    (entry,) = parse_block(0, data)
    assert entry.kind == "seal"
    assert entry.version is None
    assert check_after(Tail(), [entry]).index == 1


GOOD = build_block(Tail(), [commit("a"), commit("b")], NOW)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: b"", "the block is empty"),
        (lambda d: d[:-1], "truncated"),
        (lambda d: d[:-40] + b"\n", "line 2 is not JSON"),
        (lambda d: b"[]\n", "not a JSON object"),
        (lambda d: d.replace(b'"format":1', b'"format":9'), "format is 9"),
        (lambda d: d.replace(b'"index":0', b'"index":"0"'), "index is missing or not a int"),
        (lambda d: d.replace(b'"kind":"commit"', b'"kind":null'), "kind is missing"),
        (lambda d: d.replace(b'"parent_hash":"0', b'"parent_hash":"g'), "parent_hash is not 64"),
        (lambda d: d.replace(b"2026-01", b"2026-13"), "is not ISO 8601"),
        (lambda d: d.replace(b'"counter":0,', b""), "counter is missing"),
        (lambda d: d.replace(b"\n", b"\r\n"), "control character"),
    ],
)
def test_a_damaged_block_is_named_with_its_reason(damage: object, reason: str) -> None:
    with pytest.raises(Corrupt, match=reason) as caught:
        parse_block(3, damage(GOOD))  # type: ignore[operator]
    assert caught.value.problems[0][0] == "log/0000000003.jsonl"


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (Tail(parent_hash="1" * 64), "parent_hash is 000000000000"),
        (Tail(index=5), "entry 0 stands where entry 5 should"),
        (Tail(counter=2), "counter is 0, should be 2"),
    ],
)
def test_a_block_that_does_not_follow_is_corrupt(tail: Tail, reason: str) -> None:
    with pytest.raises(Corrupt, match=reason):
        check_after(tail, parse_block(0, GOOD))


def test_a_commit_with_a_wrong_field_is_corrupt() -> None:
    data = build_block(Tail(), [commit("a", content_hash="xyz")], NOW)
    with pytest.raises(Corrupt, match="content_hash"):
        check_after(Tail(), parse_block(0, data))


def test_version_ids_round_trip_and_others_are_refused() -> None:
    assert version_id(42) == "v0000000042"
    assert parse_version_id("v0000000042") == 42
    for bad in ("42", "v42", "v00000000042", "V0000000042", "latest", ""):
        with pytest.raises(ConfigError, match="is not a version: versions look like v0000000042"):
            parse_version_id(bad)


@pytest.mark.parametrize(
    ("said", "end", "pruned"),
    [
        ({"metrics": {}}, None, False),
        ({"metrics": {"plan_end": 60.0, "pruned": 1.0}}, 60, True),
        ({"metrics": {"plan_end": 60.0}, "plan_end": 80, "pruned": False}, 80, False),
        ({"metrics": {"plan_end": 60.0, "pruned": 1.0}, "plan_end": None}, None, True),
        ({"metrics": {"plan_end": 0.5, "pruned": 0.0}}, None, False),
        ({"metrics": {"plan_end": -1.0}}, None, False),
        ({"metrics": {"plan_end": 1e300}}, int(1e300), False),
    ],
)
def test_where_a_plan_ends_is_read_from_entries_of_earlier_versions_too(
    said: dict[str, Any], end: int | None, pruned: bool
) -> None:
    fields = {
        "counter": 0, "content_hash": "0" * 64, "size": 1, "experiment": "a", "step": 60, "loss": None, "message": "",
        "resumed_from": None, "commit_id": "c", "timestamp": "2026-11-27T00:00:00Z", "index": 0,
        "parent_hash": "0" * 64, "entry_hash": "0" * 64, "block": 0, **said,
    }  # fmt: skip
    version = ModelVersion.model_validate(fields)
    assert (version.plan_end, version.pruned) == (end, pruned)
    assert version.is_finished == (end is not None and end <= 60)
