"""Which commit ids a log has, in some 12 bytes each: a repeated submission is recognised however old it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np

from smc.storage.limits import LIMITS

__all__ = ["CommitIds"]


class CommitIds:
    """A set of commit ids, each with the number of the block that it stands in.

    An id is remembered by 64 bits of a hash. Two ids may have the same bits, so `blocks` names the places to look at
    and whoever asks reads them there. The hash has a key of this process: nobody can choose ids that collide.
    """

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._new: dict[int, int] = {}
        self._hashes = np.empty(0, np.uint64)
        self._blocks = np.empty(0, np.uint32)

    def add(self, block: int, commit_ids: Iterable[str]) -> None:
        """Remember ids of a block. One that is added again keeps its first block beside the new one."""
        for commit_id in commit_ids:
            key = self._hash(commit_id)
            if self._new.get(key, block) != block:
                self._sort_in()
            self._new[key] = block
        # New ids are kept in a dict until there are so many, or an eighth of what is sorted.
        if len(self._new) > max(LIMITS.sorted_in, len(self._hashes) // 8):
            self._sort_in()

    def blocks(self, commit_id: str) -> list[int]:
        """The blocks that may have this id; none if the log certainly has not."""
        key = self._hash(commit_id)
        first = np.searchsorted(self._hashes, np.uint64(key), "left")
        last = np.searchsorted(self._hashes, np.uint64(key), "right")
        found = {int(block) for block in self._blocks[first:last]}
        if key in self._new:
            found.add(self._new[key])
        return sorted(found)

    def __len__(self) -> int:
        return len(self._new) + len(self._hashes)

    def _hash(self, commit_id: str) -> int:
        digest = hashlib.blake2b(commit_id.encode(errors="surrogatepass"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little")

    def _sort_in(self) -> None:
        hashes = np.concatenate([self._hashes, np.fromiter(self._new.keys(), np.uint64, len(self._new))])
        blocks = np.concatenate([self._blocks, np.fromiter(self._new.values(), np.uint32, len(self._new))])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._blocks = hashes[order], blocks[order]
        self._new = {}
