"""The verifier of this package and the one written from the format's description say the same of every input."""

from __future__ import annotations

import asyncio
import hashlib
import runpy
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.storage import AsyncBlockchainModelStore
from smc.storage.chain import block_key
from smc.storage.gc import RetentionPolicy, collect
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS

VERIFIER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "verify_ledger.py"))
HASH = "a" * 64
Change = Callable[[dict[str, Any]], Any] | Mapping[str, Any]


def opened(objects: MemoryObjectStore) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS, timeout=0.1)


async def a_ledger() -> MemoryObjectStore:
    """Four versions, of which some were collected, an alias that moved, and one that ended."""
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for step in range(4):
            record = CommitRecord(ledger="x", message=f"m{step}", step=step, loss=0.5, experiment="e")
            await store.commit(b"checkpoint %d" % step, record)
        versions = await store.list_versions()
        plan_of = RetentionPolicy(keep_last=1, min_age=timedelta(0))
        await store.tag("best", versions[1])
        await collect(store, plan_of)
        await store.tag("best", versions[3])
        await store.tag("other", versions[3])
        await store.untag("other")
        assert (await store.verify(blobs=True)).ok
    return objects


class Verdicts:
    """Both verifiers' verdicts on a ledger, and the objects that each names."""

    def __init__(self, objects: MemoryObjectStore, folder: Path) -> None:
        for key, (data, _) in objects.objects.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        self.standalone = {key for key, _ in VERIFIER["verify"](folder)[2]}
        self.package = {key for key, _ in asyncio.run(self._verified(objects)).problems}

    @staticmethod
    async def _verified(objects: MemoryObjectStore) -> Any:
        async with opened(objects) as store:
            return await store.verify(blobs=True)


@pytest.fixture(scope="module")
def ledger() -> MemoryObjectStore:
    return asyncio.run(a_ledger())


def with_last_line(ledger: MemoryObjectStore, make: Callable[[dict[str, Any]], bytes]) -> MemoryObjectStore:
    """The ledger with one more block, whose one line `make` makes; hash, index and head are right."""
    objects = MemoryObjectStore()
    objects.objects = dict(ledger.objects)
    number = sum(key.startswith("log/") for key in objects.objects)
    last = objects.objects[block_key(number - 1)][0].splitlines(keepends=True)[-1]
    entry = {
        "format": 1,
        "index": orjson.loads(last)["index"] + 1,
        "kind": "commit",
        "parent_hash": hashlib.sha256(last).hexdigest(),
        "timestamp": "2026-01-02T03:04:05.678901Z",
        "commit_id": "one more",
    }
    line = make(entry)
    now = objects.objects[block_key(0)][1]
    objects.objects[block_key(number)] = line, now
    head = {"block": number, "index": entry["index"], "hash": hashlib.sha256(line).hexdigest()}
    objects.objects["head.json"] = orjson.dumps(head), now
    return objects


CONTENT = hashlib.sha256(b"checkpoint 3").hexdigest()
KINDS: dict[str, dict[str, Any]] = {
    "commit": {
        "counter": 4,
        "content_hash": CONTENT,
        "size": 12,
        "experiment": "e",
        "step": 7,
        "loss": None,
        "metrics": {},
        "message": "",
        "resumed_from": None,
    },
    "tag": {"alias": "best", "counter": 3, "content_hash": CONTENT, "message": ""},
    "collect": {"content_hashes": [], "message": ""},
    "spare": {"content_hashes": [], "through": 3},
    "seal": {"by": "a later version"},
}

# kind, what is changed in a sound entry of it (None: the field is left out), whether the ledger is sound with it.
ROWS: list[tuple[str, Change, bool]] = [
    *((kind, {}, True) for kind in KINDS),
    ("seal", {"counter": None}, True),
    ("seal", {"counter": "three"}, True),
    ("seal", {"counter": True, "content_hash": 3}, True),
    ("commit", {"unknown": [{"a": None}]}, True),
    ("commit", {"model_hash": HASH, "parameters": {"a": [1, None, "x"]}}, False),  # not that of this checkpoint
    ("commit", {"model_hash": None}, True),
    ("commit", {"plan_end": 60, "pruned": True}, True),
    ("commit", {"plan_end": -1}, False),
    ("commit", {"plan_end": 60.0}, False),
    ("commit", {"plan_end": True}, False),
    ("commit", {"pruned": 1}, False),
    ("commit", {"parameters": []}, False),
    ("commit", {"loss": 1}, True),
    ("commit", {"loss": 0.5, "step": -3}, True),
    ("commit", {"metrics": {"a": 1, "b": -2.5e300}}, True),
    ("commit", {"counter": True}, False),
    ("commit", {"counter": 4.0}, False),
    ("commit", {"counter": "4"}, False),
    ("commit", {"counter": None}, False),
    ("commit", {"counter": 5}, False),
    ("commit", {"counter": -1}, False),
    ("commit", {"size": "12"}, False),
    ("commit", {"size": 12.0}, False),
    ("commit", {"size": 13}, False),
    ("commit", {"size": -12}, False),
    ("commit", {"size": 2**64}, False),
    ("commit", {"step": "7"}, False),
    ("commit", {"step": True}, False),
    ("commit", {"step": 7.5}, False),
    ("commit", {"loss": "0.5"}, False),
    ("commit", {"loss": False}, False),
    ("commit", {"metrics": {"a": "1"}}, False),
    ("commit", {"metrics": {"a": None}}, False),
    ("commit", {"metrics": {"a": True}}, False),
    ("commit", {"metrics": []}, False),
    ("commit", {"message": None}, False),
    ("commit", {"message": 3}, False),
    ("commit", {"experiment": None}, False),
    ("commit", {"resumed_from": 3}, False),
    ("commit", {"content_hash": CONTENT.upper()}, False),
    ("commit", {"content_hash": CONTENT + "\n"}, False),
    ("commit", {"model_hash": "a"}, False),
    ("commit", {"commit_id": None}, False),
    ("commit", {"commit_id": 5}, False),
    ("commit", {"index": True}, False),
    ("commit", {"index": -1}, False),
    ("commit", {"format": True}, False),
    ("commit", {"format": "1"}, False),
    ("commit", {"format": 1.0}, False),
    ("commit", {"format": 2}, False),
    ("commit", {"kind": ["commit"]}, False),
    ("commit", {"parent_hash": HASH}, False),
    ("commit", {"block": 3}, False),
    ("commit", {"block": "11"}, False),
    ("commit", {"last_collect": -1}, False),
    ("commit", {"last_collect": None}, True),
    ("commit", {"last_collect": -2}, False),
    ("seal", {"timestamp": "2026-01-02T03:04:05"}, False),  # without a zone
    ("seal", {"timestamp": "2026-01-02T03:04:05+01:00"}, True),
    ("seal", {"timestamp": "2026-01-02T03:04:05Z"}, True),
    ("seal", {"timestamp": "2026-01-02 03:04:05Z"}, False),
    ("seal", {"timestamp": "20260102T030405Z"}, False),
    ("seal", {"timestamp": "2026-02-30T03:04:05Z"}, False),
    ("seal", {"timestamp": "2026-W01-2"}, False),
    ("seal", {"timestamp": 1767323045}, False),
    ("tag", {"counter": 9}, False),
    ("tag", {"counter": 2}, False),
    ("tag", {"counter": True}, False),
    ("tag", {"counter": "3"}, False),
    ("tag", {"counter": None, "content_hash": None}, False),  # None leaves both out
    ("tag", lambda e: {**e, "counter": None, "content_hash": None}, True),
    ("tag", lambda e: {**e, "counter": None}, False),
    ("tag", lambda e: {**e, "content_hash": None}, False),
    ("tag", {"alias": "head"}, False),
    ("tag", {"alias": "v0000000001"}, False),
    ("tag", {"alias": "abcdef0123"}, False),
    ("tag", {"alias": "9lives"}, False),
    ("tag", {"alias": "a" * 65}, False),
    ("tag", {"alias": "a" * 64}, False),  # hexadecimal digits alone
    ("tag", {"alias": "g" * 64}, True),
    ("tag", {"alias": "best\n"}, False),
    ("tag", {"message": 1}, False),
    ("collect", {"content_hashes": [CONTENT[:-1]]}, False),
    ("collect", {"content_hashes": {CONTENT: 1}}, False),
    ("collect", {"content_hashes": [None]}, False),
    ("collect", {"content_hashes": [CONTENT, CONTENT]}, True),
    ("spare", {"through": True}, False),
    ("spare", {"through": -1}, True),
    ("spare", {"through": -2}, False),
    ("spare", {"through": 10**6}, False),
    ("spare", {"through": None}, False),
    ("seal", {"deep": None}, True),
    ("seal", lambda e: {**e, "deep": nested(63)}, True),
    ("seal", lambda e: {**e, "deep": nested(64)}, False),
    ("seal", lambda e: {**e, "text": "[" * 200}, True),
]
# The bytes of a last line, and whether the ledger is sound with it.
RAW: list[tuple[Callable[[bytes], bytes], bool]] = [
    (lambda line: line.replace(b'"by"', b'"b\\u0079"'), True),
    (lambda line: line.replace(b'":', b'" :\t'), True),
    (lambda line: line[:-1] + b" \n", True),
    (lambda line: line[:-2] + b',"x":1,"x":2}\n', True),
    (lambda line: line[:-2] + b',"index":0}\n', False),
    (lambda line: line[:-2] + b',"x":NaN}\n', False),
    (lambda line: line[:-2] + b',"x":-Infinity}\n', False),
    (lambda line: line[:-2] + b',"x":1e999}\n', False),
    (lambda line: line[:-2] + b',"x":1e308}\n', True),
    (lambda line: line[:-2] + b',"x":' + b"9" * 30 + b"}\n", True),
    (lambda line: line[:-2] + b',"x":' + b"9" * 400 + b"}\n", False),
    (lambda line: line[:-2] + b',"x":' + b"9" * 5000 + b"}\n", False),
    (lambda line: line[:-2] + b',"x":01}\n', False),
    (lambda line: line[:-2] + b',"x":"\\ud800"}\n', False),
    (lambda line: line[:-2] + b',"x":"\\ud83d\\ude00"}\n', True),
    (lambda line: line[:-2] + b',"x":"\xff"}\n', False),
    (lambda line: line[:-2] + b',"x":"\t"}\n', False),
    (lambda line: line[:-2] + b',"x":"\\u0000\x7f"}\n', True),
    (lambda line: line[:-2] + b',"x":"\xe2\x80\xa8\xc2\x85"}\n', True),
    (lambda line: line[:-2] + b',"x":' + b"[" * 3000 + b"]" * 3000 + b"}\n", False),
    (lambda line: b"\xef\xbb\xbf" + line, False),
    (lambda line: line[:-1], False),
    (lambda line: line[:-1] + b"\r\n", False),
    (lambda line: line + b"\n", False),
    (lambda line: line + line, False),
    (lambda line: line.decode().encode("utf-16"), False),
    (lambda line: b"", False),
    (lambda line: b"[]\n", False),
    (lambda line: b"null\n", False),
]


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def changed(kind: str, change: Change) -> Callable[[dict[str, Any]], bytes]:
    def make(entry: dict[str, Any]) -> bytes:
        fields = {**entry, "kind": kind, **KINDS[kind]}
        if callable(change):
            fields = change(fields)
        else:
            fields = {k: v for k, v in {**fields, **change}.items() if not (k in change and change[k] is None)}
            if kind == "commit" and change == {"model_hash": None}:
                fields["model_hash"] = None
            if kind == "seal" and change == {"counter": None}:
                fields["counter"] = None
        return plain(fields)

    return make


def plain(fields: Any) -> bytes:
    import json

    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def check(objects: MemoryObjectStore, folder: Path, sound: bool) -> None:
    found = Verdicts(objects, folder)
    assert (found.package == set()) is sound, found.package
    assert (found.standalone == set()) is sound, found.standalone
    if not sound:
        assert {_place(key) for key in found.package} & {_place(key) for key in found.standalone}


def _place(key: str) -> str:
    """Of two blocks that do not fit, one may name the first and the other the second."""
    return "log/" if key.startswith("log/") else key


def test_the_table_is_long_enough() -> None:
    print(f"\n{len(ROWS) + len(RAW)} inputs on which both verifiers have to agree")
    assert len(ROWS) + len(RAW) >= 100


@pytest.mark.parametrize(("kind", "change", "sound"), ROWS)
def test_both_agree_on_an_entry(
    kind: str, change: Change, sound: bool, ledger: MemoryObjectStore, tmp_path: Path
) -> None:
    check(with_last_line(ledger, changed(kind, change)), tmp_path, sound)


@pytest.mark.parametrize(("raw", "sound"), RAW)
def test_both_agree_on_bytes(
    raw: Callable[[bytes], bytes], sound: bool, ledger: MemoryObjectStore, tmp_path: Path
) -> None:
    check(with_last_line(ledger, lambda entry: raw(changed("seal", {})(entry))), tmp_path, sound)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 12)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([CONTENT, HASH, "best", "2026-01-02T03:04:05Z", 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
@pytest.mark.slow
def test_both_agree_on_any_value_of_any_field(
    tmp_path_factory: pytest.TempPathFactory, ledger: MemoryObjectStore, kind: str, data: st.DataObject
) -> None:
    names = ["format", "index", "kind", "timestamp", "commit_id", "block", "last_collect", "parameters", *KINDS[kind]]
    changes = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=2))
    objects = with_last_line(ledger, lambda entry: plain({**entry, "kind": kind, **KINDS[kind], **changes}))
    found = Verdicts(objects, tmp_path_factory.mktemp("both"))
    assert bool(found.package) == bool(found.standalone), (changes, found.package, found.standalone)
