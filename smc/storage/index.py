"""Index objects: 256 blocks of the log in one, so that a long ledger is read in few requests.

`index/<k>.json` repeats the bytes of blocks 256 k ... 256 k + 255. It is derived and never
authoritative: what is read from it counts only if its hashes lead to a block read from the log itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from smc.storage.limits import LIMITS

__all__ = ["decode_index", "encode_index", "index_key"]


def index_key(segment: int) -> str:
    """Object key of the index of a segment."""
    return f"index/{segment:010d}.json"


def encode_index(segment: int, blocks: Sequence[bytes]) -> bytes:
    """The index of one whole segment."""
    texts = [block.decode() for block in blocks]
    return orjson.dumps({"format": 1, "first": segment * LIMITS.segment, "blocks": texts})


def decode_index(segment: int, data: bytes) -> list[bytes] | None:
    """The bytes of the segment's blocks, or None if this is not its index."""
    try:
        fields = orjson.loads(data)
        blocks = [block.encode() for block in fields["blocks"]]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError):
        return None
    # What it is derived from determines every byte of it.
    return blocks if len(blocks) == LIMITS.segment and encode_index(segment, blocks) == data else None
