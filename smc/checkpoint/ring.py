"""Snapshots taken between two steps, and the few buffers that hold them until they are committed.

On a GPU the training thread only launches: the state is cloned into one flat device buffer in the order of
the step's own work, and another stream copies that into pinned memory while training goes on. On a CPU
it is copied there and then. Either way the buffer is the checkpoint's file, see `smc.checkpoint.tensor_file`.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smc.checkpoint.file import CheckpointMetadata, metadata_fields
from smc.checkpoint.tensor_file import Layout
from smc.errors import ConfigError

__all__ = ["SnapshotRing", "TakenSnapshot"]

# Room for a header that is longer than the first, whose counters had fewer digits.
_GROWTH = 4096
_ALIGNMENT = 64
_DEVICE_BUFFERS = 2


@dataclass(eq=False)
class _Slot:
    """Host memory for one snapshot: the header ends, and the data begins, at `start`."""

    memory: Tensor
    start: int
    layout: Layout
    events: _Events | None = None
    data: Tensor = field(init=False)
    views: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.memory[self.start :]
        self.views = self.layout.views(self.data)


class _Events:
    """Of a snapshot on a GPU: its clone begun and done, its copy to the host begun and done."""

    def __init__(self) -> None:
        made = (torch.cuda.Event(enable_timing=True) for _ in range(4))  # type: ignore[no-untyped-call]
        self.begun, self.cloned, self.copying, self.copied = made


class TakenSnapshot:
    """One state on its way to the ledger. Nothing that training does later changes it.

    `file`, `loss` and `finite` wait until it has arrived; `release` gives its memory back.
    """

    def __init__(
        self,
        ring: SnapshotRing,
        slot: _Slot,
        metadata: CheckpointMetadata,
        host: Mapping[str, Tensor],
        clone_seconds: float = 0.0,
    ) -> None:
        self._ring, self._slot, self._metadata, self._host = ring, slot, metadata, host
        self._clone_seconds = clone_seconds

    def wait(self) -> None:
        """Block, without Python's lock, until the copy to the host is done."""
        if self._slot.events is not None:
            self._slot.events.copied.synchronize()

    def seconds(self) -> dict[str, float]:
        """How long the clone took, and on a GPU the copy to the host."""
        self.wait()
        events = self._slot.events
        if events is None:
            return {"clone": self._clone_seconds}
        clone, copy = events.begun.elapsed_time(events.cloned), events.copying.elapsed_time(events.copied)
        return {"clone": clone / 1e3, "copy": copy / 1e3}

    @property
    def loss(self) -> float:
        """The loss of the step it was taken after."""
        self.wait()
        return float(self._ring.tail(self._slot)[0])

    @property
    def finite(self) -> bool:
        """Whether every loss up to then was finite."""
        self.wait()
        return bool(self._ring.tail(self._slot)[1].isfinite())

    def file(self) -> memoryview:
        """The checkpoint, byte for byte what `encode` of the same state gives. Valid until `release`."""
        self.wait()
        slot = self._slot
        for name, value in self._host.items():
            slot.views[name].copy_(value)
        header = slot.layout.header(metadata_fields(self._metadata))
        whole = memoryview(slot.memory.numpy())  # type: ignore[arg-type]  # numpy's stubs leave it out before 3.12
        first, last = slot.start - len(header), slot.start + slot.layout.size
        if first < 0:
            return memoryview(header + whole[slot.start : last])
        whole[first : slot.start] = header
        return whole[first:last]

    def model_hash(self, file: memoryview) -> str | None:
        """The hash of what inference reads of `file`."""
        return self._slot.layout.model_hash(file)

    def release(self) -> None:
        """Give the memory back. Nothing may use `file` any more; doing it twice does no harm."""
        slot, self._slot = self._slot, None  # type: ignore[assignment]
        if slot is not None:
            self._ring._give_back(slot)


class SnapshotRing:
    """At most `slots` snapshots of one training run at a time; memory for each is allocated once.

    Beyond that `take` has no room. On a GPU the bound is `slots` states in pinned memory and two on the device. It is
    made for one state: what it is given later must have the same tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: CheckpointMetadata, *, slots: int) -> None:
        self._layout = Layout(tensors)
        self._device = next((t.device for t in tensors.values() if t.device.type == "cuda"), torch.device("cpu"))
        self._start = _rounded(len(self._layout.header(metadata_fields(metadata))) + _GROWTH)
        self._tail = _rounded(self._layout.size)
        self._size = self._tail + 2 * 8
        self._free: deque[_Slot] = deque()
        self._lock = threading.Lock()
        self._on_device: deque[_DeviceBuffer] = deque()
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            for _ in range(_DEVICE_BUFFERS):
                self._on_device.append(_DeviceBuffer(self._size, self._layout, self._device))
        for _ in range(slots):
            memory = _host_memory(self._start + self._size, self._device)
            events = _Events() if self._device.type == "cuda" else None
            self._free.append(_Slot(memory, self._start, self._layout, events))
        self._made = list(self._free)
        self._rehearse(tensors, metadata)

    @property
    def state_bytes(self) -> int:
        """The size of one snapshot's tensors."""
        return self._layout.size

    def take(
        self, tensors: Mapping[str, Tensor], metadata: CheckpointMetadata, outcome: Tensor
    ) -> TakenSnapshot | None:
        """A snapshot of these tensors as they are in the device's order of work, or None without room for one.

        `outcome` is (loss, something finite only if all losses were), on the same device. Returns at once on a GPU.
        Raises: ConfigError for tensors that it was not made for.
        """
        if not self._layout.fits(tensors):
            raise ConfigError("the model's tensors have other names, types or shapes than when training began")
        slot = self._take_slot()
        if slot is None:
            return None
        started, device, events = time.perf_counter(), self._device, slot.events
        there = {name: value.detach() for name, value in tensors.items() if value.device == device}
        host = {name: value.detach().clone() for name, value in tensors.items() if value.device != device}
        if self._stream is None or events is None:
            _copy(slot.views, there)
            self.tail(slot).copy_(outcome)
            return TakenSnapshot(self, slot, metadata, host, time.perf_counter() - started)
        buffer = self._on_device[0]
        self._on_device.rotate(-1)
        compute = torch.cuda.current_stream(device)
        compute.wait_event(buffer.copied)  # its last snapshot has left it
        events.begun.record(compute)
        _copy(buffer.views, there)
        buffer.data[self._tail :].view(torch.float64).copy_(outcome)
        events.cloned.record(compute)
        self._stream.wait_event(events.cloned)
        with torch.cuda.stream(self._stream):
            events.copying.record(self._stream)
            slot.data.copy_(buffer.data, non_blocking=True)
            events.copied.record(self._stream)
            buffer.copied.record(self._stream)
        return TakenSnapshot(self, slot, metadata, host)

    def tail(self, slot: _Slot) -> Tensor:
        """What a slot holds after the file: the outcome. Shape: (2,) float64."""
        return slot.data[self._tail :].view(torch.float64)

    def close(self) -> None:
        """Free the pinned memory. Every snapshot must have been released."""
        with self._lock:
            made, self._made = self._made, []
            self._free.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            for slot in made:
                _unpin(slot.memory)

    def _rehearse(self, tensors: Mapping[str, Tensor], metadata: CheckpointMetadata) -> None:
        """Use every slot once: first calls load kernels and create events, which one step would wait for."""
        snapshots = [self.take(tensors, metadata, torch.zeros(2, device=self._device)) for _ in self._made]
        for snapshot in snapshots:
            assert snapshot is not None
            snapshot.wait()
            snapshot.release()

    def _take_slot(self) -> _Slot | None:
        with self._lock:
            return self._free.popleft() if self._free else None

    def _give_back(self, slot: _Slot) -> None:
        with self._lock:
            self._free.append(slot)


class _DeviceBuffer:
    """The clone on the device, until it has been copied to the host."""

    def __init__(self, size: int, layout: Layout, device: torch.device) -> None:
        self.data = torch.empty(size, dtype=torch.uint8, device=device)
        self.views = layout.views(self.data)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


def _copy(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """All at once: a thousand small tensors are a few launches, one for each type and some megabytes."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for name, value in values.items():
        into, of = by_type.setdefault(value.dtype, ([], []))
        into.append(places[name])
        of.append(value)
    for into, of in by_type.values():
        torch._foreach_copy_(into, of)


def _host_memory(size: int, device: torch.device) -> Tensor:
    """Memory that a device copies to beside its work. Shape: -> (size,) uint8.

    `pin_memory=True` takes 0.25 s for 300 MB on the host of an H100; no thread can launch a kernel meanwhile, and the
    size is rounded up to a power of two. To pin huge pages that are there already takes 0.01 s.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    memory[:: mmap.PAGESIZE].fill_(0)
    torch.cuda.check_error(_runtime().cudaHostRegister(memory.data_ptr(), size, 0))
    return memory


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(memory: Tensor) -> None:
    torch.cuda.check_error(_runtime().cudaHostUnregister(memory.data_ptr()))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
