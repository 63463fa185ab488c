"""Entries of the ledger: what one line of the log says, and the names of versions, blocks and checkpoints. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from smc.errors import ConfigError, Corrupt

__all__ = [
    "UNKNOWN",
    "AliasMove",
    "Announcements",
    "Entry",
    "ModelVersion",
    "blob_key",
    "block_key",
    "check_alias",
    "is_content_hash",
    "parse_version_id",
    "version_id",
]

BLOCK_DIGITS: Final = 10
# A reader that began in the middle of a log of earlier versions cannot tell where its newest collection is.
UNKNOWN: Final = -2
# No collector's request may take longer, whatever one says: others wait for it.
_LONGEST_REQUEST: Final = 120.0

_HASH = re.compile(r"^[0-9a-f]{64}\Z")
_HASH_PREFIX = re.compile(r"^[0-9a-f]{8,64}\Z")
_VERSION = re.compile(r"^v([0-9]{10})\Z")
_ALIAS = re.compile(r"^[A-Za-z][A-Za-z0-9._-]{0,63}\Z")

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
