"""The spool: a local directory that keeps what could not be committed, for `recover` to commit later.

Each commit is two files, `<commit_id>.safetensors` and then `<commit_id>.json`, both written under
another name, flushed and renamed: a JSON file means that its checkpoint is whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from smc.errors import ConfigError, Corrupt

__all__ = ["CommitRecord", "Spool", "SpooledCommit", "new_commit_id", "spool_directory"]

# Snapshots, of as many trainers as a node may have: while S3 is away for long, older ones would leave no room for them.
_ROOM_FOR: Final = 8
# Bytes of an entry, which has 64,000, without its message, metrics and what the ledger adds.
_LARGEST: Final = 48_000


def new_commit_id() -> str:
    """An id that no other commit has."""
    return uuid.uuid4().hex


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, which is no Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class CommitRecord(BaseModel):
    """What a commit's entry will say, apart from the checkpoint's hash and size.

    `model_hash` is the hash of what inference reads of the checkpoint, see `smc.checkpoint.tensor_header`; `parameters`
    are what a sweep chose for the experiment; `plan_end` is the step at which its training is done, and `pruned` says
    that it was given up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ledger: str
    commit_id: str = Field(default_factory=new_commit_id, pattern=r"^[0-9A-Za-z._-]{1,128}$")
    message: Text
    step: int
    loss: float | None
    experiment: Text = ""
    metrics: dict[Text, float] = Field(default_factory=dict)
    resumed_from: str | None = None
    model_hash: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    plan_end: int | None = Field(default=None, ge=0)
    pruned: bool = False

    @classmethod
    def checked(cls, **fields: Any) -> CommitRecord:
        """A record of what a user gave. Raises: ConfigError naming the field that no entry can hold."""
        try:
            record = cls(**fields)
            size = len(orjson.dumps(record.model_dump(exclude={"message", "metrics"})))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = str(first["msg"]).removeprefix("Value error, ")
            raise ConfigError(f"{where}: {message}; an entry holds what JSON does") from None
        except TypeError as error:  # whole numbers beyond 64 bits, text that is not Unicode
            raise ConfigError(f"experiment or parameters: {error}; an entry holds what JSON does") from None
        if size > _LARGEST:
            raise ConfigError(f"experiment and parameters have {size:,} bytes; an entry has room for {_LARGEST:,}")
        return record


class SpooledCommit(CommitRecord):
    """A commit in the spool. `content_hash` is its checkpoint's SHA-256 (None: an older version kept it)."""

    content_hash: str | None = None


def spool_directory() -> Path:
    """`SMC_SPOOL_DIR`, or `~/.smc/spool`: outside the working directory, which Ray deletes after a job."""
    if named := os.environ.get("SMC_SPOOL_DIR"):
        return Path(named)
    try:
        return Path.home() / ".smc" / "spool"
    except RuntimeError:
        raise OSError(errno.ENOENT, "this user has no home: set SMC_SPOOL_DIR to a folder for the spool") from None


class Spool:
    """A directory of commits that wait for their ledger."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where it is. Raises: OSError if this user has no home, and none was named."""
        return self._directory or spool_directory()

    def save(self, record: CommitRecord, data: bytes | bytearray | memoryview, *, final: bool = True) -> Path:
        """Keep one commit; -> the checkpoint's path. Raises: OSError when the disk does.

        One that is not `final` is refused when it would leave room for few more: that is for the final ones.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not final and shutil.disk_usage(self.directory).free < (1 + _ROOM_FOR) * len(data):
            raise OSError(errno.ENOSPC, f"what is left of the disk is for {_ROOM_FOR} final snapshots", self.directory)
        path = self.directory / f"{record.commit_id}.safetensors"
        try:
            _write(path, data)
            kept = SpooledCommit(**record.model_dump() | {"content_hash": hashlib.sha256(data).hexdigest()})
            _write(path.with_suffix(".json"), orjson.dumps(kept.model_dump(), option=orjson.OPT_INDENT_2))
        except BaseException:
            path.unlink(missing_ok=True)  # a disk that is full should not stay so for what is of no use
            raise
        return path

    def records(self) -> Iterator[SpooledCommit]:
        """Every whole commit, the earliest step first. Raises: Corrupt, after the last, naming what is no record."""
        found, damaged = self.read()
        yield from found
        if damaged:
            raise Corrupt(f"spool: {'; '.join(damaged)}")

    def read(self) -> tuple[list[SpooledCommit], list[str]]:
        """Every whole commit, the earliest step first, and what stands in the place of a record and is none."""
        found: list[SpooledCommit] = []
        damaged = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                record = SpooledCommit.model_validate_json(path.read_bytes())
            except ValidationError as error:
                damaged.append(f"{path} is not a commit record: {error.errors()[0]['msg']}")
            except OSError as error:
                damaged.append(f"{path} cannot be read: {error.strerror}")
            else:
                if record.commit_id == path.stem:
                    found.append(record)
                else:
                    damaged.append(f"{path} is the record of {record.commit_id}: it has another file's name")
        return sorted(found, key=lambda r: (r.ledger, r.experiment, r.step)), damaged

    def load(self, record: SpooledCommit) -> bytes:
        """The checkpoint of a record. Raises: Corrupt if it is not what was kept."""
        path = self.directory / f"{record.commit_id}.safetensors"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise Corrupt(f"spool: {path} is gone, {path.with_suffix('.json')} is there") from None
        except OSError as error:
            raise Corrupt(f"spool: {path} cannot be read: {error.strerror}") from None
        if record.content_hash not in (None, hashlib.sha256(data).hexdigest()):
            raise Corrupt(f"spool: {path} is not what was kept: its SHA-256 is not {record.content_hash}")
        return data

    def remove(self, record: CommitRecord) -> None:
        """Forget a commit, the record first: what is left without one is not a commit any more."""
        path = self.directory / f"{record.commit_id}.json"
        path.unlink(missing_ok=True)
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def _write(path: Path, data: bytes | bytearray | memoryview) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        # A checkpoint is nobody else's business, also where the directory was made by somebody who lets others in.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
