"""The ledger's format: blocks, hashes and what must hold between entries. Pure, no I/O.

`docs/ledger-format.md` describes the same for somebody who writes a verifier in another language.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from smc.errors import Corrupt
from smc.storage.elapsed import Elapsed
from smc.storage.entries import (
    UNKNOWN,
    AliasMove,
    Announcements,
    Entry,
    ModelVersion,
    blob_key,
    block_key,
    check_alias,
    is_content_hash,
    parse_version_id,
    version_id,
)

__all__ = [
    "FORMAT",
    "GENESIS_PARENT",
    "LARGEST_BLOCK",
    "LARGEST_ENTRY",
    "UNKNOWN",
    "AliasMove",
    "Announcements",
    "Draft",
    "Entry",
    "ModelVersion",
    "Tail",
    "blob_key",
    "block_key",
    "build_block",
    "check_after",
    "check_alias",
    "is_content_hash",
    "parse_block",
    "parse_version_id",
    "version_id",
]

FORMAT: Final = 1
GENESIS_PARENT: Final = "0" * 64
# An entry stays for ever and every reader reads it, so what is submitted is limited. In bytes, newlines included.
LARGEST_ENTRY: Final = 64_000
LARGEST_BLOCK: Final = 1_000_000
# Readers of JSON differ in how deep they go: the one used here 1,024 levels, the one of Python's library fewer.
_DEEPEST: Final = 64

_TIMESTAMP = re.compile(
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})\Z"
)


@dataclass(frozen=True)
class Draft:
    """An entry before it has a place: what its submitter says, and an identity kept through retries.

    `vetted` is set where the deletion of the checkpoint that it names was announced: the time since somebody saw that
    the checkpoint is there all the same, and young. `fresh` says that the identity was made after the ledger was opened
    by whoever appends, so that no entry from before can have it.
    """

    kind: str
    commit_id: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    vetted: Elapsed | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Tail:
    """Where the next entry goes: what follows from everything before it.

    `last_collect` is the newest block that has a `collect`, -1 if there is none, `UNKNOWN` if that is not known.
    """

    block: int = 0
    index: int = 0
    counter: int = 0
    parent_hash: str = GENESIS_PARENT
    last_collect: int = -1

    @classmethod
    def before(cls, entry: Entry, counter: int) -> Tail:
        """The tail in front of the first entry of a block, given how many versions there are before it."""
        return cls(entry.block, entry.index, counter, str(entry.fields["parent_hash"]), entry.last_collect)

    def after(self, entries: Sequence[Entry]) -> Tail:
        """The tail once one more block holds these entries."""
        last = entries[-1]
        counters = [e.counter for e in entries if e.counter is not None]
        counter = counters[-1] + 1 if counters else self.counter
        return Tail(last.block + 1, last.index + 1, counter, last.hash, self._last_collect_after(entries))

    def _last_collect_after(self, entries: Sequence[Entry]) -> int:
        if any(entry.kind == "collect" for entry in entries):
            return entries[0].block
        # Whoever began in the middle of the log learns it from the first entry that says it.
        return entries[-1].last_collect if self.last_collect == UNKNOWN else self.last_collect


def build_block(tail: Tail, drafts: Sequence[Draft], now: datetime | None = None) -> bytes:
    """The bytes of the block that puts these drafts after this tail."""
    stamp = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    index, counter, parent = tail.index, tail.counter, tail.parent_hash
    lines = []
    for draft in drafts:
        fields = {
            "format": FORMAT,
            "index": index,
            "kind": draft.kind,
            "parent_hash": parent,
            "timestamp": stamp,
            "commit_id": draft.commit_id,
        }
        if draft.kind == "commit":
            fields["counter"] = counter
            counter += 1
        fields["block"] = tail.block
        if tail.last_collect != UNKNOWN:
            fields["last_collect"] = tail.last_collect
        # Copied: what orjson returns lies in a buffer of kilobytes, and thousands of lines are remembered.
        line = bytes(memoryview(orjson.dumps({**fields, **draft.payload}, option=orjson.OPT_APPEND_NEWLINE)))
        parent = hashlib.sha256(line).hexdigest()
        index += 1
        lines.append(line)
    return b"".join(lines)


def parse_block(number: int, data: bytes) -> list[Entry]:
    """The entries of a stored block, each checked by itself; `check_after` checks them against the chain.

    Raises: Corrupt naming the object and the line.
    """
    key = block_key(number)
    if not data:
        raise _corrupt(key, "the block is empty")
    if not data.endswith(b"\n"):
        raise _corrupt(key, "the block is truncated: its last line has no end")
    entries = []
    for at, line in enumerate(data.splitlines(keepends=True)):
        if not line.endswith(b"\n") or b"\r" in line:
            raise _corrupt(key, f"line {at + 1} has a control character that JSON does not allow")
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _corrupt(key, f"line {at + 1} is not JSON ({error})") from None
        reason = _wrong_field(fields)
        if reason is None and line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(fields) > _DEEPEST:
            reason = f"it is nested more than {_DEEPEST} levels deep"
        if reason:
            raise _corrupt(key, f"line {at + 1}: {reason}")
        entries.append(Entry(number, line, fields, hashlib.sha256(line).hexdigest()))
    return entries


def check_after(tail: Tail, entries: Sequence[Entry]) -> Tail:
    """Check that a block continues the chain, and return the tail after it.

    Raises: Corrupt naming the object and what is wrong.
    """
    index, counter, parent = tail.index, tail.counter, tail.parent_hash
    key = block_key(entries[0].block)
    for entry in entries:
        if entry.fields["parent_hash"] != parent:
            raise _corrupt(
                key,
                f"entry {entry.index}: parent_hash is {entry.fields['parent_hash']}, "
                f"the entry before it has hash {parent}",
            )
        if entry.index != index:
            raise _corrupt(key, f"entry {entry.index} stands where entry {index} should")
        if not entry.is_in_place:
            raise _corrupt(key, f"entry {index} says that it stands in block {entry.fields['block']}")
        told = entry.last_collect
        if UNKNOWN not in (told, tail.last_collect) and told != tail.last_collect:
            raise _corrupt(key, f"entry {index}: last_collect is {told}, should be {tail.last_collect}")
        if entry.kind == "commit":
            version = entry.version
            assert version is not None
            if version.counter != counter:
                raise _corrupt(key, f"entry {index}: counter is {version.counter}, should be {counter}")
            counter += 1
        index, parent = index + 1, entry.hash
    return tail.after(entries)


def _wrong_field(fields: object) -> str | None:
    if not isinstance(fields, dict):
        return "not a JSON object"
    if type(fields.get("format")) is not int or fields["format"] != FORMAT:
        return f"format is {fields.get('format')!r}, this version reads {FORMAT}"
    for name, kind in (("index", int), ("kind", str), ("parent_hash", str), ("timestamp", str), ("commit_id", str)):
        if type(fields.get(name)) is not kind:
            return f"{name} is missing or not a {kind.__name__}"
    if fields["index"] < 0:
        return "index is below 0"
    if not is_content_hash(fields["parent_hash"]):
        return "parent_hash is not 64 hexadecimal digits"
    try:
        if not _TIMESTAMP.match(fields["timestamp"]):
            raise ValueError
        datetime.fromisoformat(fields["timestamp"])
    except ValueError:
        return f"timestamp {fields['timestamp']!r} is not ISO 8601 with a zone"
    if fields["kind"] == "commit" and (type(fields.get("counter")) is not int or fields["counter"] < 0):
        return "counter is missing from a commit, or not a whole number"
    for name, least in (("block", 0), ("last_collect", -1)):
        if name in fields and (type(fields[name]) is not int or fields[name] < least):
            return f"{name} is not the number of a block"
    return None


def _depth(value: object) -> int:
    """How deep lists and objects are nested. Not recursive: it is asked about what may be too deep for that."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _corrupt(key: str, reason: str) -> Corrupt:
    return Corrupt(f"{key}: {reason}", ((key, reason),))
