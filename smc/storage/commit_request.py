"""A commit as it is asked for, who carries it out, and what becomes of it."""

from __future__ import annotations

import re
import reprlib
import string
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from smc.errors import ConfigError
from smc.storage.spool import CommitRecord

__all__ = [
    "DEFAULT_MESSAGE",
    "CommitOutcome",
    "CommitRequest",
    "CommitSeconds",
    "CommitTarget",
    "Committer",
    "check_entry",
    "check_template",
]

DEFAULT_MESSAGE = "Training checkpoint: step={step}, loss={loss:.6f}"
# Of a commit's message and of each number in it, in characters.
_LONGEST_MESSAGE: Final = 2_000
_WIDEST: Final = 100


@dataclass(frozen=True)
class CommitRequest:
    """What the entry of a snapshot will say, except for the loss, which may still be on its way from the device."""

    step: int
    batch: int
    template: str = DEFAULT_MESSAGE
    experiment: str = ""
    resumed_from: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    plan_end: int | None = None
    pruned: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class CommitSeconds:
    """Seconds that each stage of a commit took; None for a stage that it did not reach.

    `clone` is what the next step waits for; `copy` goes from a GPU to the host, `put` into Ray's object store,
    `sequence` is the wait for earlier commits and the append, and `acknowledged` everything from the submission.
    """

    clone: float | None = None
    copy: float | None = None
    encode: float | None = None
    put: float | None = None
    upload: float | None = None
    sequence: float | None = None
    acknowledged: float | None = None


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What became of one commit.

    `version_id` is set when committed; `reason` and `spooled` (a path, or None if that failed too) when not.
    """

    step: int
    status: Literal["committed", "replaced", "failed"]
    version_id: str | None = None
    content_hash: str | None = None
    reason: str | None = None
    spooled: str | None = None
    seconds: CommitSeconds = CommitSeconds()


class Committer(Protocol):
    """The steps of a commit, on the event loop that opened it."""

    async def put(self, data: memoryview) -> Any:
        """Place a checkpoint where `upload` finds it; -> what `upload` takes. The data stay as they are until then."""
        ...

    async def upload(self, placed: Any) -> tuple[str, int]:
        """Store a checkpoint by content; -> its SHA-256 and size."""
        ...

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        """Enter it in the ledger; -> its version id. Idempotent in `record.commit_id`.

        Raises: Conflict if a collector deleted it after the upload.
        """
        ...

    def settled(self, outcome: CommitOutcome, experiment: str) -> None:
        """Hear what became of a commit, for whoever watches the ledger."""
        ...


class CommitTarget(Protocol):
    """Something a pricer can commit to: a store, or a LedgerActor's handle."""

    @property
    def uri(self) -> str:
        """Where the ledger is, for the spool."""
        ...

    def committer(self) -> AbstractAsyncContextManager[Committer]:
        """A connection of its own, opened and closed on the loop that uses it."""
        ...


def check_template(template: str) -> None:
    """Refuse a commit message template that could fail later.

    Raises: ConfigError (a ValueError) naming what is wrong; {step}, {loss}, {batch} are allowed.
    """
    where = f"commit_message_template {reprlib.repr(template)}"
    try:
        for _, name, form, _ in string.Formatter().parse(template):
            if name is not None and name not in ("step", "loss", "batch"):
                raise ConfigError(
                    f"commit_message_template: unknown variable {{{name}}}; allowed are {{step}}, {{loss}}, {{batch}}"
                )
            if "{" in (form or "") or any(int(n) > _WIDEST for n in re.findall(r"[0-9]+", form or "")):
                raise ConfigError(f"{where}: a format has a width of at most {_WIDEST}, and no variable in it")
        message = template.format(step=10**15, loss=0.5, batch=10**15)
        message.encode()
    except ConfigError:
        raise
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if len(message) > _LONGEST_MESSAGE:
        raise ConfigError(f"{where}: the message has {len(message):,} characters, {_LONGEST_MESSAGE:,} are allowed")


def check_entry(experiment: str, parameters: Mapping[str, Any]) -> None:
    """Refuse what an entry cannot hold. Raises: ConfigError."""
    CommitRecord.checked(ledger="", message="", step=0, loss=None, experiment=experiment, parameters=dict(parameters))
