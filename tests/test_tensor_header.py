"""A header is believed only when it describes exactly the file it stands in."""

from __future__ import annotations

import tracemalloc
from typing import Any

import orjson
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.checkpoint.file import Snapshot, decode, decode_parts, encode
from smc.checkpoint.tensor_header import header_size, merged, model_hash, parse_header
from smc.errors import Corrupt
from smc.learning.pricer import GbmCVNNPricer
from tests.conftest import small_config, small_training


def file_of(fields: Any, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else orjson.dumps(fields)
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_library_writes_is_read() -> None:
    tensors = {"model.w": torch.ones(2, 3), "rng": torch.zeros(5, dtype=torch.uint8), "none": torch.zeros(0, 4)}
    data = safetensors.torch.save(tensors, metadata={"a": "b"})
    header = parse_header(data, len(data))
    assert header.metadata == {"a": "b"}
    assert {name: place.shape for name, place in header.places.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    assert data[header.places["model.w"].start : header.places["model.w"].stop] == bytes(torch.ones(6).numpy())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        ((10 * 2**30).to_bytes(8, "little") + b"{}", "its header should have 10737418240 bytes, the file has 10"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "its header should have 18446744073709551615 bytes"),
        (file_of(b"\xff\xfe{}"), "its header is not JSON"),
        (file_of(b'{"a\xff": {}}'), "its header is not JSON"),
        (file_of(b"[" * 5000), "its header is not JSON"),
        (file_of([]), "its header is not a JSON object"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
        (file_of({"../../etc/passwd": tensor()}, b"12345678"), "is no name for a tensor"),
        (file_of({"/etc/passwd": tensor()}, b"12345678"), "is no name for a tensor"),
        (file_of({"a\x00b": tensor()}, b"12345678"), "is no name for a tensor"),
        (file_of({"": tensor()}, b"12345678"), "is no name for a tensor"),
        (file_of({"a": []}, b"12345678"), "is not described by an object"),
        (file_of({"a": tensor(dtype="OBJECT")}, b"12345678"), "has type 'OBJECT'"),
        (file_of({"a": tensor(dtype=3)}, b"12345678"), "has type 3"),
        (file_of({"a": tensor(shape=[2.0])}, b"12345678"), "are not lists of sizes"),
        (file_of({"a": tensor(shape=[-2], offsets=(0, -8))}, b"12345678"), "are not lists of sizes"),
        (file_of({"a": tensor(shape=[True, 2])}, b"12345678"), "are not lists of sizes"),
        (file_of({"a": tensor(offsets=(0, 4, 8))}, b"12345678"), "are not lists of sizes"),
        (file_of({"a": tensor(shape=[2**40, 2**40])}, b"12345678"), "does not fill 8 bytes"),
        (file_of({"a": tensor(offsets=(8, 0))}, b"12345678"), "does not fill -8 bytes"),
        (file_of({"a": tensor(offsets=(8, 16))}, b"12345678" * 2), "begins at"),
        (file_of({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"1234" * 3), "begins at"),
        (file_of({"a": tensor()}, b"1234"), "the file has"),
        (file_of({"a": tensor()}, b"12345678more"), "the file has"),
    ],
)
def test_a_hostile_file_is_refused_before_anything_is_allocated(data: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(Corrupt) as refused:
        parse_header(data, len(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(refused.value)
    assert peak < 2**20
    with pytest.raises(Corrupt):
        decode(data)
    assert model_hash(data) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
fields = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries({}, optional={"dtype": json_values, "shape": json_values, "data_offsets": json_values})
    | json_values,
    max_size=3,
)


@settings(max_examples=500, deadline=None)
@given(fields=fields, data=st.binary(max_size=16), cut=st.integers(0, 8))
def test_any_bytes_are_read_or_refused_as_corrupt(fields: dict[str, Any], data: bytes, cut: int) -> None:
    whole = file_of(fields, data)
    for file in (whole, whole[: len(whole) - cut], data):
        try:
            header = parse_header(file, len(file))
        except Corrupt:
            continue
        # What is believed covers the file.
        assert [header.size, *(p.stop for p in header.places.values())][-1] == len(file)


def test_the_model_of_a_checkpoint_by_its_parts() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    data = encode(Snapshot.of(pricer.snapshot()))
    header = parse_header(data[: header_size(data, len(data))], len(data))
    places = header.for_inference()
    assert {name.split(".")[0] for name in places} == {"model", "scaling"}
    assert sum(stop - start for start, stop in merged(places.values())) < 0.5 * len(data)
    part = decode_parts(header, {name: memoryview(data)[p.start : p.stop] for name, p in places.items()})
    whole = decode(data)
    assert part.metadata == whole.metadata
    assert all(torch.equal(value, whole.tensors[name]) for name, value in part.tensors.items())


def test_the_hash_of_a_model_depends_on_all_that_inference_reads_and_on_nothing_else() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(2))
    data = encode(Snapshot.of(pricer.snapshot()))
    header = parse_header(data, len(data))
    was = model_hash(data)
    assert was is not None
    for name, place in header.places.items():
        if place.stop == place.start:
            continue
        changed = bytearray(data)
        changed[place.start] ^= 1
        assert (model_hash(changed) != was) == (name in header.for_inference()), name
