"""The header of a safetensors file: parsed without trust and without torch, before a byte of data is believed.

Source: the format's description, https://huggingface.co/docs/safetensors. Beyond what the format asks, names that look
like paths are refused, as somebody may make files of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import orjson

from smc.errors import Corrupt

__all__ = [
    "FOR_INFERENCE",
    "ITEM_SIZES",
    "Place",
    "TensorHeader",
    "hash_of_spans",
    "header_size",
    "is_tensor_name",
    "merged",
    "model_hash",
    "parse_header",
]

# Bytes of one value, by the type's name in the file.
ITEM_SIZES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# As the reference implementation has it: nobody needs more, and a hostile length field would ask for it.
_LARGEST_HEADER = 100_000_000
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,512}")
FOR_INFERENCE: Final = ("model.", "scaling.")


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: its type's name, its shape, and the bytes of the file from `start` to before `stop`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of itself. `size` is that of the header with its length; `places` are in the file's order."""

    size: int
    metadata: Mapping[str, str]
    places: Mapping[str, Place]

    def for_inference(self) -> Mapping[str, Place]:
        """The tensors that a prediction needs, in the file's order: the model's and its scaling."""
        return {name: place for name, place in self.places.items() if name.startswith(FOR_INFERENCE)}


def is_tensor_name(name: str) -> bool:
    """Whether a checkpoint may name a tensor like this: no slash, no control character, no part that is `..`."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".") and ".." not in name


def header_size(start: bytes | bytearray | memoryview, file_size: int) -> int:
    """How long the header is, with the 8 bytes of its length that stand first. Raises: Corrupt."""
    if len(start) < 8 or file_size < 8:
        raise Corrupt(f"not a safetensors file: it has {file_size} bytes")
    length = int.from_bytes(bytes(start[:8]), "little")
    if length > min(_LARGEST_HEADER, file_size - 8):
        raise Corrupt(f"not a safetensors file: its header should have {length} bytes, the file has {file_size}")
    return 8 + length


def parse_header(data: bytes | bytearray | memoryview, file_size: int) -> TensorHeader:
    """The header of a file, from its first bytes. Nothing is allocated on its word.

    Raises: Corrupt unless it describes exactly the data that follow, without gaps, overlaps or unknown types.
    """
    size = header_size(data, file_size)
    try:
        fields = orjson.loads(bytes(data[8:size]))
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise Corrupt("not a safetensors file: its header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Corrupt("safetensors header: __metadata__ is not an object of strings")
    # An empty tensor begins where its neighbour does, and stands before it.
    found = ((name, _place(name, field, size)) for name, field in fields.items())
    places = sorted(found, key=lambda place: (place[1].start, place[1].stop))
    ends = [size, *(place.stop for _, place in places)]
    for (name, place), end in zip(places, ends, strict=False):
        if place.start != end:
            raise Corrupt(f"safetensors header: {name!r} begins at {place.start}, what is before it ends at {end}")
    if ends[-1] != file_size:
        raise Corrupt(f"safetensors header: it describes {ends[-1]} bytes, the file has {file_size}")
    return TensorHeader(size, metadata, dict(places))


def _place(name: str, field: object, offset: int) -> Place:
    if not is_tensor_name(name):
        raise Corrupt(f"safetensors header: {name!r} is no name for a tensor")
    if not isinstance(field, dict):
        raise Corrupt(f"safetensors header: {name!r} is not described by an object")
    dtype, shape, offsets = field.get("dtype"), _sizes(field.get("shape")), _sizes(field.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise Corrupt(f"safetensors header: {name!r} has type {dtype!r}; known are {', '.join(ITEM_SIZES)}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise Corrupt(f"safetensors header: shape or data_offsets of {name!r} are not lists of sizes")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_SIZES[dtype]:
        raise Corrupt(
            f"safetensors header: {name!r} of type {dtype} and shape {shape} does not fill {stop - start} bytes"
        )
    return Place(dtype, tuple(shape), offset + start, offset + stop)


def _sizes(values: object) -> list[int] | None:
    fine = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return values if fine and isinstance(values, list) else None


def model_hash(data: bytes | bytearray | memoryview) -> str | None:
    """SHA-256 of what inference reads of a checkpoint: the header, then the tensors `for_inference` in their order.

    None if these bytes are not a safetensors file, or have no model.
    """
    view = memoryview(data)
    try:
        header = parse_header(view, len(view))
    except Corrupt:
        return None
    if not any(name.startswith("model.") for name in header.places):
        return None
    return hash_of_spans(view, header.size, merged(header.for_inference().values()))


def hash_of_spans(file: memoryview, header_size: int, spans: Iterable[tuple[int, int]]) -> str:
    """SHA-256 of a header and these bytes behind it."""
    digest = hashlib.sha256(file[:header_size])
    for start, stop in spans:
        digest.update(file[start:stop])
    return digest.hexdigest()


def merged(places: Iterable[Place]) -> list[tuple[int, int]]:
    """The bytes that these places, in order, cover: neighbours as one."""
    spans: list[tuple[int, int]] = []
    for place in places:
        if spans and spans[-1][1] == place.start:
            spans[-1] = spans[-1][0], place.stop
        elif place.stop > place.start:
            spans.append((place.start, place.stop))
    return spans
