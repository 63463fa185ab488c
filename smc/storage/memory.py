"""What somebody remembers of a ledger: its last entry, in a file. One that does not go on from there is another ledger.

A server that serves a model and an auditor who verifies a ledger keep the same kind of file.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import orjson

from smc.errors import ConfigError

__all__ = ["Seen", "parse_seen", "read_memory", "write_memory"]

_SEEN = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Seen:
    """The last entry of a ledger as somebody saw it. Files of earlier versions have no `index`."""

    ledger: str
    block: int
    hash: str
    index: int | None = None

    def ends(self, block: bytes) -> bool:
        """Whether these bytes of a block end with the entry."""
        lines = block.splitlines(keepends=True)
        return bool(lines) and hashlib.sha256(lines[-1]).hexdigest() == self.hash


def parse_seen(text: str) -> tuple[int, str]:
    """Index and hash of an entry, from INDEX:HASH. Raises: ConfigError."""
    match = _SEEN.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an entry: give INDEX:HASH, as `verify` prints it, like 41:{'3f' * 32}")
    return int(match[1]), match[2]


def read_memory(path: Path | None, ledger: str) -> Seen | None:
    """What a file remembers of this ledger; None where there is no file yet. Raises: ConfigError."""
    if path is None or not path.exists():
        return None
    try:
        fields = orjson.loads(path.read_bytes())
        index = fields.get("index")
        seen = Seen(fields["ledger"], int(fields["block"]), fields["hash"], None if index is None else int(index))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} does not say where a ledger ended: remove it to trust the ledger as it is") from None
    if seen.ledger != ledger:
        raise ConfigError(f"{path} is about {seen.ledger}, not {ledger}: give each ledger a file of its own")
    parse_seen(f"{seen.block}:{seen.hash}")
    return seen


def write_memory(path: Path, seen: Seen) -> None:
    """Replace what the file remembers. Raises: OSError."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(orjson.dumps(vars(seen)))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
