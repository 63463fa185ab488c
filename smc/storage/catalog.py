"""What a ledger says, replayed entry by entry: its versions, where its aliases point, what was collected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from datetime import datetime

from smc.errors import ConfigError, Corrupt, NotFound
from smc.storage.chain import AliasMove, Announcements, Entry, ModelVersion, Tail, block_key, check_after, version_id

__all__ = ["Catalog"]

_SHORTEST_HASH = 8


class Catalog:
    """The state of a ledger as of `tail`. It grows by whole blocks, each checked to follow the last."""

    def __init__(self) -> None:
        self.tail = Tail()
        self.versions: list[ModelVersion] = []
        self.moves: list[AliasMove] = []
        self._hashes = bytearray()  # of all entries, 32 bytes each
        self._aliases: dict[str, int] = {}
        self._announcements = Announcements()
        self._collect_times: dict[int, datetime] = {}

    def apply(self, entries: Sequence[Entry]) -> None:
        """Take in one more block.

        Raises: Corrupt if it does not follow, or an entry contradicts itself; then nothing of it is taken in.
        """
        tail = check_after(self.tail, entries)
        new: list[ModelVersion] = []
        moves: list[AliasMove] = []
        for entry in entries:
            version, move, _ = entry.version, entry.alias_move, (entry.collected, entry.spared)
            if version is not None:
                new.append(version)
            if move is not None:
                moves.append(move)
            if move is not None and move.counter is not None:
                known = len(self.versions)
                before = self.versions[move.counter :][:1] if move.counter < known else new[move.counter - known :][:1]
                if [version.content_hash for version in before] != [move.content_hash]:
                    reason = f"entry {entry.index}: alias {move.alias} names a version that is not before it"
                    raise Corrupt(f"{block_key(entry.block)}: {reason}", ((block_key(entry.block), reason),))
        self.tail = tail
        self.versions += new
        for entry in entries:
            self._hashes += bytes.fromhex(entry.hash)
            self._announcements.apply(entry)
            if entry.kind == "collect":
                self._collect_times[entry.index] = datetime.fromisoformat(entry.fields["timestamp"])
        self.moves += moves
        for move in moves:
            if move.counter is None:
                self._aliases.pop(move.alias, None)
            else:
                self._aliases[move.alias] = move.counter

    def has(self, index: int | None, entry_hash: str) -> bool:
        """Whether the log has an entry with this hash, at this index where one is given."""
        digest = bytes.fromhex(entry_hash)
        if index is not None:
            return self._hashes[32 * index : 32 * (index + 1)] == digest
        at = self._hashes.find(digest)
        while at % 32 and at >= 0:
            at = self._hashes.find(digest, at + 1)
        return at >= 0

    @property
    def head(self) -> ModelVersion | None:
        """The newest version."""
        return self.versions[-1] if self.versions else None

    @property
    def heads(self) -> Mapping[str, ModelVersion]:
        """The newest version of each experiment, by its name."""
        return {version.experiment: version for version in self.versions}

    @property
    def furthest(self) -> Mapping[str, ModelVersion]:
        """The version that each experiment goes on from: what was recovered late may stand behind one of more steps."""
        found: dict[str, ModelVersion] = {}
        for version in self.versions:
            if version.experiment not in found or version.step >= found[version.experiment].step:
                found[version.experiment] = version
        return found

    @property
    def aliases(self) -> Mapping[str, ModelVersion]:
        """Where each alias points, by name."""
        return {name: self.versions[counter] for name, counter in sorted(self._aliases.items())}

    @property
    def ever_named(self) -> Mapping[str, Sequence[ModelVersion]]:
        """The versions that each alias has named since the ledger began, in order, whether it still does or not."""
        found: dict[str, list[ModelVersion]] = {}
        for move in self.moves:
            if move.counter is not None:
                found.setdefault(move.alias, []).append(self.versions[move.counter])
        return found

    def moves_of(self, alias: str) -> Sequence[AliasMove]:
        """Every move of an alias, in order. Raises: NotFound if it has never named anything."""
        moves = [move for move in self.moves if move.alias == alias]
        if not moves:
            known = ", ".join(sorted({move.alias for move in self.moves})) or "none"
            raise NotFound(f"there has never been an alias {alias!r}: there have been {known}")
        return moves

    def before(self, alias: str) -> ModelVersion:
        """The version that an alias named before the one it names now. Raises: NotFound."""
        moves = [move.counter for move in self.moves if move.alias == alias]
        if not moves:
            raise NotFound(f"there is no alias {alias!r}: there are {', '.join(self.aliases) or 'none'}")
        earlier = [counter for counter in moves if counter is not None and counter != moves[-1]]
        if not earlier:
            raise NotFound(f"alias {alias!r} has named no other version before: give one")
        return self.versions[earlier[-1]]

    def aliases_of(self, version: ModelVersion) -> list[str]:
        """The aliases that point at a version."""
        return [name for name, counter in sorted(self._aliases.items()) if counter == version.counter]

    def collected_at(self, content_hash: str) -> int | None:
        """The entry that announced a checkpoint's deletion, unless it has been committed or spared since."""
        announced = self._announcements.of(content_hash)
        return announced[-1] if announced else None

    def announcements(self, content_hash: str) -> Mapping[int, datetime]:
        """All of those entries, with their times."""
        return {index: self._collect_times[index] for index in self._announcements.of(content_hash)}

    def resolve(self, reference: str) -> ModelVersion:
        """The version that somebody means.

        `reference` is a version (v0000000042, or 42), `head`, `head:EXPERIMENT`, an alias, or the beginning of a
        content hash, 8 digits at least. Raises: NotFound, with what there is; ConfigError if it means several.
        """
        if reference == "head":
            return self._existing(self.head, "the ledger is empty")
        if reference.startswith("head:"):
            names = ", ".join(sorted(self.heads)) or "none"
            name = reference.removeprefix("head:")
            return self._existing(self.heads.get(name), f"there is no experiment {name!r}: there are {names}")
        if reference in self._aliases:
            return self.versions[self._aliases[reference]]
        digits = reference.removeprefix("v")
        if (
            digits.isdecimal()
            and digits.isascii()
            and (len(digits) == 10 or (digits == reference and len(digits) < 10))
        ):
            counter = int(digits)
            if counter < len(self.versions):
                return self.versions[counter]
            if digits != reference or len(digits) < _SHORTEST_HASH:
                newest = "it is empty" if self.head is None else f"its newest is {self.head.version_id}"
                raise NotFound(f"the ledger has no version {version_id(counter)}: {newest}")
        if len(reference) >= _SHORTEST_HASH and set(reference) <= set("0123456789abcdef"):
            return self._by_hash(reference)
        close = difflib.get_close_matches(reference, [*self._aliases, *(f"head:{name}" for name in self.heads)])
        hint = f"; did you mean {close[0]}?" if close else ""
        aliases = ", ".join(sorted(self._aliases)) or "none"
        raise NotFound(
            f"{reference!r} is no version here: give v0000000042 or 42, head, head:EXPERIMENT, {_SHORTEST_HASH} or "
            f"more digits of a hash, or an alias (there are: {aliases}){hint}"
        )

    def is_hash(self, reference: str) -> bool:
        """Whether a reference that means a version is the beginning of its hash: it asks for bytes, not for a place."""
        if len(reference) < _SHORTEST_HASH or reference in self._aliases:
            return False
        return self.resolve(reference).content_hash.startswith(reference)

    def _by_hash(self, prefix: str) -> ModelVersion:
        found = [version for version in self.versions if version.content_hash.startswith(prefix)]
        if len({version.content_hash for version in found}) > 1:
            several = ", ".join(version.version_id for version in found[:4])
            raise ConfigError(f"the hash {prefix} is ambiguous: {several} begin like this")
        return self._existing(found[-1] if found else None, f"no version has a content hash that begins with {prefix}")

    @staticmethod
    def _existing(version: ModelVersion | None, otherwise: str) -> ModelVersion:
        if version is None:
            raise NotFound(otherwise)
        return version
