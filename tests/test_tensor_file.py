"""A layout makes the bytes that the safetensors library makes."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc.checkpoint.tensor_file import _TYPES, Layout
from smc.checkpoint.tensor_header import is_tensor_name, model_hash
from smc.errors import ConfigError


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    layout = Layout(tensors)
    data = torch.empty(layout.size, dtype=torch.uint8)
    for name, place in layout.views(data).items():
        place.copy_(tensors[name])
    return layout.header(metadata) + data.numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    width = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, (*shape, width), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape) if raw.size else torch.empty(shape, dtype=dtype)


tensors = st.dictionaries(
    (st.text(max_size=8) | st.sampled_from(["model.w", "model.b", "scaling.mean", "rng.cpu"])).filter(
        lambda name: name != "__metadata__" and name.isprintable() and is_tensor_name(name)
    ),
    st.tuples(st.sampled_from(list(_TYPES)), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(drawn=tensors, text=st.text())
def test_the_bytes_are_those_of_the_library(drawn: dict[str, tuple[torch.dtype, list[int], int]], text: str) -> None:
    given_tensors = {name: random_tensor(dtype, tuple(shape), seed) for name, (dtype, shape, seed) in drawn.items()}
    metadata = {"of": text}
    data = file_of(given_tensors, metadata)
    assert data == safetensors.torch.save(given_tensors, metadata=metadata)
    assert Layout(given_tensors).model_hash(memoryview(data)) == model_hash(data)


def test_tensors_that_do_not_lie_in_order_are_written_in_order() -> None:
    transposed = {"a": torch.arange(6.0).view(2, 3).T}
    assert file_of(transposed, {}) == safetensors.torch.save({"a": transposed["a"].contiguous()}, metadata={})


def test_a_layout_fits_what_it_was_made_for_and_nothing_else() -> None:
    layout = Layout({"a": torch.zeros(2), "b": torch.zeros(3)})
    assert layout.fits({"b": torch.ones(3), "a": torch.ones(2)})
    for other in (
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(4)},
        {"a": torch.zeros(2), "c": torch.zeros(3)},
    ):
        assert not layout.fits(other)
    assert not layout.fits({"a": torch.zeros(2), "b": torch.zeros(3).double()})


def test_a_type_that_the_format_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'model.w' is torch.complex128, which a checkpoint cannot hold: U64, .*F32"):
        Layout({"model.w": torch.zeros(1, dtype=torch.complex128)})


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "..", "model...w", ".hidden", "a\x00b", "a\nb", "n" * 513])
def test_a_name_that_could_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"a checkpoint cannot hold a tensor named .*: slashes and '..' are not allowed"
    ):
        Layout({name: torch.zeros(1)})
