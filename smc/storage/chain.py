"""The ledger's format: entries, blocks, hashes and what must hold between them. Pure, no I/O.

`docs/ledger-format.md` describes the same for somebody who writes a verifier in another language.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from smc.errors import ConfigError, Corrupt
from smc.storage.elapsed import Elapsed

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
BLOCK_DIGITS: Final = 10
# An entry stays for ever and every reader reads it, so what is submitted is limited. In bytes, newlines included.
LARGEST_ENTRY: Final = 64_000
LARGEST_BLOCK: Final = 1_000_000
# A reader that began in the middle of a log of earlier versions cannot tell where its newest collection is.
UNKNOWN: Final = -2
# Readers of JSON differ in how deep they go: the one used here 1,024 levels, the one of Python's library fewer.
_DEEPEST: Final = 64
# No collector's request may take longer, whatever one says: others wait for it.
_LONGEST_REQUEST: Final = 120.0

_HASH = re.compile(r"^[0-9a-f]{64}\Z")
_HASH_PREFIX = re.compile(r"^[0-9a-f]{8,64}\Z")
_VERSION = re.compile(r"^v([0-9]{10})\Z")
_ALIAS = re.compile(r"^[A-Za-z][A-Za-z0-9._-]{0,63}\Z")
_TIMESTAMP = re.compile(
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})\Z"
)

# What JSON says is read as it stands: true is not 1, and "3" is not 3.
WholeNumber = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Hash = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]

M = TypeVar("M", bound=BaseModel)


class ModelVersion(BaseModel):
    """One commit: a model version of the ledger, as its entry says it.

    `plan_end` is the step at which its training is done, None where nobody said; `pruned`: it was given up there.
    """

    model_config = ConfigDict(frozen=True)

    counter: WholeNumber
    content_hash: Hash
    size: WholeNumber
    experiment: Text
    step: Annotated[int, Field(strict=True)]
    loss: Number | None
    metrics: dict[str, Number]
    commit_message: Text = Field(alias="message")
    resumed_from: Text | None
    model_hash: Hash | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    plan_end: WholeNumber | None = None
    pruned: Annotated[bool, Field(strict=True)] = False
    commit_id: Text
    timestamp: datetime
    index: WholeNumber
    parent_hash: Hash
    entry_hash: Hash
    block: WholeNumber

    @model_validator(mode="before")
    @classmethod
    def _as_said_before(cls, fields: Any) -> Any:
        """Earlier versions said both among the metrics."""
        if not isinstance(fields, dict) or not isinstance(metrics := fields.get("metrics"), dict):
            return fields
        end, said = metrics.get("plan_end"), dict(fields)
        if "plan_end" not in fields and isinstance(end, int | float) and end >= 0 and float(end).is_integer():
            said["plan_end"] = int(end)
        if "pruned" not in fields and metrics.get("pruned") == 1:
            said["pruned"] = True
        return said

    @property
    def version_id(self) -> str:
        """The name of the version, like v0000000042."""
        return version_id(self.counter)

    @property
    def is_finished(self) -> bool:
        """Whether training was done with this version, as its entry says."""
        return self.plan_end is not None and self.step >= self.plan_end


class AliasMove(BaseModel):
    """One tag entry: from here on `alias` names a version, or nothing if `counter` is None."""

    model_config = ConfigDict(frozen=True)

    alias: Text
    counter: WholeNumber | None
    content_hash: Hash | None
    message: Text
    timestamp: datetime
    index: WholeNumber

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
    def counter(self) -> int | None:
        """The number of the version, for an entry that commits one."""
        return int(self.fields["counter"]) if self.kind == "commit" else None

    @property
    def is_in_place(self) -> bool:
        """Whether it stands in the block that it says. What earlier versions wrote does not say it."""
        return self.fields.get("block", self.block) == self.block

    @property
    def time(self) -> datetime:
        """When the entry was written, by its writer's clock."""
        return datetime.fromisoformat(self.fields["timestamp"])

    @property
    def last_collect(self) -> int:
        """The newest block before this one that has a `collect`; -1 for none, `UNKNOWN` if the entry does not say."""
        return int(self.fields.get("last_collect", UNKNOWN))

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
        if type(through) is not int or not -1 <= through < self.index:
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
        self.request_seconds = 0.0  # how long a request of a collector may take, by what they said

    def apply(self, entry: Entry) -> None:
        """Take in the next entry. Raises: Corrupt, before anything is changed."""
        collected, (spared, through) = entry.collected, entry.spared
        self._note_seconds(entry)
        if entry.kind == "commit":
            self._at.pop(str(entry.fields.get("content_hash")), None)
        for content_hash in collected:
            self._at.setdefault(content_hash, []).append(entry.index)
        for content_hash in spared:
            left = [index for index in self._at.pop(content_hash, ()) if index > through]
            if left:
                self._at[content_hash] = left

    def apply_earlier(self, entry: Entry) -> None:
        """Take in a `collect` that stands before all that was taken in. Raises: Corrupt."""
        for content_hash in entry.collected:
            self._at.setdefault(content_hash, []).insert(0, entry.index)
        self._note_seconds(entry)

    def _note_seconds(self, entry: Entry) -> None:
        told = entry.fields.get("request_seconds") if entry.kind == "collect" else None
        if isinstance(told, int | float):
            self.request_seconds = max(self.request_seconds, min(float(told), _LONGEST_REQUEST))

    def of(self, content_hash: str) -> Sequence[int]:
        """Entries that announced a checkpoint's deletion, since it was last committed or spared."""
        return self._at.get(content_hash, ())

    def __contains__(self, content_hash: object) -> bool:
        return isinstance(content_hash, str) and content_hash in self._at


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
    if not _HASH.match(fields["parent_hash"]):
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
