"""The ledger's format: entries, blocks, hashes and what must hold between them. Pure, no I/O.

`docs/ledger-format.md` describes the same for somebody who writes a verifier in another language.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from smc.errors import ConfigError, Corrupt

__all__ = [
    "FORMAT",
    "GENESIS_PARENT",
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
BLOCK_DIGITS: Final = 10

_HASH = re.compile(r"^[0-9a-f]{64}\Z")
_HASH_PREFIX = re.compile(r"^[0-9a-f]{8,64}\Z")
_VERSION = re.compile(r"^v([0-9]{10})\Z")
_ALIAS = re.compile(r"^[A-Za-z][A-Za-z0-9._-]{0,63}\Z")

M = TypeVar("M", bound=BaseModel)


class ModelVersion(BaseModel):
    """One commit: a model version of the ledger, as its entry says it."""

    model_config = ConfigDict(frozen=True)

    counter: int = Field(ge=0)
    content_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    experiment: str
    step: int
    loss: float | None
    metrics: dict[str, float]
    commit_message: str = Field(alias="message")
    resumed_from: str | None
    model_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    commit_id: str
    timestamp: datetime
    index: int
    parent_hash: str
    entry_hash: str
    block: int

    @property
    def version_id(self) -> str:
        """The name of the version, like v0000000042."""
        return version_id(self.counter)


class AliasMove(BaseModel):
    """One tag entry: from here on `alias` names a version, or nothing if `counter` is None."""

    model_config = ConfigDict(frozen=True)

    alias: str
    counter: int | None = Field(ge=0)
    content_hash: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    message: str
    timestamp: datetime
    index: int

    @model_validator(mode="after")
    def _names_a_version_or_none(self) -> AliasMove:
        check_alias(self.alias)
        if (self.counter is None) != (self.content_hash is None):
            raise ValueError("counter and content_hash go together")
        return self


@dataclass(frozen=True)
class Entry:
    """One line of the log. `line` is its bytes as stored, newline included; the hash is over them."""

    block: int
    line: bytes
    fields: Mapping[str, Any]
    hash: str

    @property
    def index(self) -> int:
        return int(self.fields["index"])

    @property
    def kind(self) -> str:
        return str(self.fields["kind"])

    @property
    def commit_id(self) -> str:
        return str(self.fields["commit_id"])

    @property
    def version(self) -> ModelVersion | None:
        """The model version, for an entry that commits one.

        Raises: Corrupt if a field of the commit is missing or wrong.
        """
        return self._read(ModelVersion) if self.kind == "commit" else None

    @property
    def alias_move(self) -> AliasMove | None:
        """What a tag entry says. Raises: Corrupt if it says it wrongly."""
        return self._read(AliasMove) if self.kind == "tag" else None

    @property
    def collected(self) -> tuple[str, ...]:
        """Hashes of the checkpoints that a collect entry announces the deletion of. Raises: Corrupt."""
        return self._hashes() if self.kind == "collect" else ()

    @property
    def spared(self) -> tuple[tuple[str, ...], int]:
        """Hashes that are not deleted after all, whatever entries up to an index announced. Raises: Corrupt."""
        if self.kind != "spare":
            return (), -1
        through = self.fields.get("through")
        if not isinstance(through, int) or not -1 <= through < self.index:
            raise self._corrupt("through is not the index of an entry before it")
        return self._hashes(), through

    def _hashes(self) -> tuple[str, ...]:
        hashes = self.fields.get("content_hashes")
        if not isinstance(hashes, list) or not all(isinstance(h, str) and _HASH.match(h) for h in hashes):
            raise self._corrupt("content_hashes is not a list of SHA-256 in hexadecimal")
        return tuple(hashes)

    def check(self) -> None:
        """Raises: Corrupt if what it says of its kind is missing or wrong."""
        _ = self.version, self.alias_move, self.collected, self.spared

    def _read(self, model: type[M]) -> M:
        try:
            return model.model_validate({**self.fields, "entry_hash": self.hash, "block": self.block})
        except ValidationError as error:
            problem = error.errors()[0]
            raise self._corrupt(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")) from None

    def _corrupt(self, reason: str) -> Corrupt:
        return Corrupt(f"{block_key(self.block)}: entry {self.index}: {reason}")


class Announcements:
    """Which checkpoints a log says are being deleted: entry by entry, in order."""

    def __init__(self) -> None:
        self._at: dict[str, list[int]] = {}

    def apply(self, entry: Entry) -> None:
        """Take in the next entry. Raises: Corrupt, before anything is changed."""
        collected, (spared, through) = entry.collected, entry.spared
        if entry.kind == "commit":
            self._at.pop(str(entry.fields.get("content_hash")), None)
        for content_hash in collected:
            self._at.setdefault(content_hash, []).append(entry.index)
        for content_hash in spared:
            left = [index for index in self._at.pop(content_hash, ()) if index > through]
            if left:
                self._at[content_hash] = left

    def of(self, content_hash: str) -> Sequence[int]:
        """Entries that announced a checkpoint's deletion, since it was last committed or spared."""
        return self._at.get(content_hash, ())

    def __contains__(self, content_hash: object) -> bool:
        return content_hash in self._at


@dataclass(frozen=True)
class Draft:
    """An entry before it has a place: what its submitter says, and an identity kept through retries.

    `vetted`: the checkpoint it names is there for certain, whatever was announced of its deletion.
    """

    kind: str
    commit_id: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    vetted: bool = False


@dataclass(frozen=True)
class Tail:
    """Where the next entry goes: what follows from everything before it."""

    block: int = 0
    index: int = 0
    counter: int = 0
    parent_hash: str = GENESIS_PARENT

    def after(self, entries: Sequence[Entry]) -> Tail:
        """The tail once one more block holds these entries."""
        commits = [e for e in entries if e.kind == "commit"]
        last = entries[-1]
        counter = int(commits[-1].fields["counter"]) + 1 if commits else self.counter
        return Tail(last.block + 1, last.index + 1, counter, last.hash)


def block_key(number: int) -> str:
    """Object key of a block."""
    return f"log/{number:0{BLOCK_DIGITS}d}.jsonl"


def blob_key(content_hash: str) -> str:
    """Object key of a checkpoint."""
    return f"blobs/{content_hash}.safetensors"


def is_content_hash(text: str) -> bool:
    """Whether this is a SHA-256 in lower-case hexadecimal."""
    return _HASH.match(text) is not None


def version_id(counter: int) -> str:
    """The name of a version by its counter."""
    return f"v{counter:010d}"


def check_alias(name: str) -> str:
    """The name, if an alias may have it: nothing that could be a version, a hash or a word of this program.

    Raises: ConfigError saying what is allowed.
    """
    if not _ALIAS.match(name) or _VERSION.match(name) or _HASH_PREFIX.match(name) or name == "head":
        raise ConfigError(
            f"{name!r} cannot be an alias: a letter, then letters, digits, '.', '_' and '-', 64 at most; "
            "not 'head', not like a version, not 8 or more hexadecimal digits alone"
        )
    return name


def parse_version_id(name: str) -> int:
    """The counter in a version's name. Raises: ConfigError if it is not one."""
    match = _VERSION.match(name)
    if match is None:
        raise ConfigError(f"{name!r} is not a version: versions look like {version_id(42)}")
    return int(match.group(1))


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
        if entry.kind == "commit":
            version = entry.version
            assert version is not None
            if version.counter != counter:
                raise _corrupt(key, f"entry {index}: counter is {version.counter}, should be {counter}")
            counter += 1
        index, parent = index + 1, entry.hash
    return Tail(entries[0].block + 1, index, counter, parent)


def _wrong_field(fields: object) -> str | None:
    if not isinstance(fields, dict):
        return "not a JSON object"
    if fields.get("format") != FORMAT:
        return f"format is {fields.get('format')!r}, this version reads {FORMAT}"
    for name, kind in (("index", int), ("kind", str), ("parent_hash", str), ("timestamp", str), ("commit_id", str)):
        if not isinstance(fields.get(name), kind) or isinstance(fields.get(name), bool):
            return f"{name} is missing or not a {kind.__name__}"
    if not _HASH.match(fields["parent_hash"]):
        return "parent_hash is not 64 hexadecimal digits"
    try:
        datetime.fromisoformat(fields["timestamp"])
    except ValueError:
        return f"timestamp {fields['timestamp']!r} is not ISO 8601"
    if fields["kind"] == "commit" and not isinstance(fields.get("counter"), int):
        return "counter is missing from a commit"
    return None


def _corrupt(key: str, reason: str) -> Corrupt:
    return Corrupt(f"{key}: {reason}", ((key, reason),))
