"""The GPU: whether there is one to work on, and CUDA kernels over torch's memory.

CuPy compiles and launches; torch owns every byte and the stream, so a kernel can be part of a CUDA graph.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError

__all__ = ["Kernel", "NotCapturable", "capture", "require_device", "synchronize"]

# A block may have this much dynamic shared memory without the kernel being told to allow more.
_SHARED_DEFAULT = 48 * 1024


def require_device(device: torch.device | str) -> torch.device:
    """The device, checked: the CPU, or a CUDA device that torch sees and CuPy can use.

    Raises: ConfigError saying what is missing. There is no silent fallback from one to the other.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"device {device}: only 'cpu' and 'cuda' are supported")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch {torch.__version__} sees no CUDA device here")
    _cupy()
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


class Kernel:
    """One CUDA kernel, compiled when it is first launched; `defines` become preprocessor macros."""

    def __init__(self, source: str, name: str, **defines: float) -> None:
        self.source, self.name, self.defines = source, name, defines

    def __call__(
        self, grid: Sequence[int], block: int, arguments: Sequence[Tensor | np.generic], *, shared: int = 0
    ) -> None:
        """Launch on torch's current stream, `shared` bytes of dynamic shared memory to a block."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device(device):
            stream = _cupy().cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)
            raw = self.raw
            if shared > max(_SHARED_DEFAULT, raw.max_dynamic_shared_size_bytes):
                raw.max_dynamic_shared_size_bytes = shared
            pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            with stream:
                raw(tuple(grid), (block,), tuple(pointers), shared_mem=shared)

    @cached_property
    def raw(self) -> Any:
        """CuPy's RawKernel."""
        options = ("--std=c++17", *(f"-D{name}={value}" for name, value in self.defines.items()))
        return _cupy().RawKernel(self.source, self.name, options=options)


class NotCapturable(Exception):
    """Some work cannot be a CUDA graph; the message says why."""


def capture(
    work: Callable[[], None], device: torch.device, *, rehearsal: AbstractContextManager[None] | None = None
) -> Callable[[], None]:
    """`work` as a CUDA graph; -> what replays it, on the current stream.

    It runs once before, within `rehearsal`, because what a first call sets up must not be part of the graph. Any
    thread may call this, one at a time. Raises: NotCapturable.
    """
    with _one_capture:
        captured = _Captured(torch.device(device).index or 0)
        captured.capture(work, rehearsal or nullcontext())
    return captured


_one_capture = threading.Lock()  # torch can have but one under way in a process


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched on a device. Not during a capture, which that would break, on any thread."""
    with _one_capture:
        torch.cuda.synchronize(device)


class _Captured:
    """A CUDA graph, and the stream that it was captured on, which is its alone while it lives.

    torch hands its streams out in turns, 32 of them: another thread soon has the same one, and its work would get into
    the graph. And the memory that cuBLAS works in belongs to a stream (and a thread), captured graphs included: two
    that were captured on one stream would overwrite it when they run side by side.
    """

    _free: ClassVar[dict[int, deque[Any]]] = defaultdict(deque)

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._graph = torch.cuda.CUDAGraph()
        free = self._free[index]
        with torch.cuda.device(index):
            own = free.popleft() if free else _cupy().cuda.Stream(non_blocking=True)
        weakref.finalize(self, free.append, own)
        self._stream = torch.cuda.ExternalStream(own.ptr, device=index)  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        self._graph.replay()

    def capture(self, work: Callable[[], None], rehearsal: AbstractContextManager[None]) -> None:
        before = torch.cuda.current_stream(self._device)
        generator = torch.cuda.default_generators[self._device.index]
        random = generator.clone_state()
        torch.cuda.synchronize(self._device)  # for a last replay of whatever had this stream before
        try:
            with rehearsal:
                self._stream.wait_stream(before)  # for what the rehearsal puts aside
                with torch.cuda.stream(self._stream):
                    work()
                before.wait_stream(self._stream)
            # Other threads go on meanwhile: a commit may copy a snapshot to the host.
            with (
                _no_collection(),
                torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
        except Exception as error:
            # A capture that fails leaves its stream the current one, and the generator expecting a capture.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize(self._device)
            generator.graphsafe_set_state(random)
            cause: BaseException = error
            while cause.__context__ is not None:  # the failed end of the capture hides what made it fail
                cause = cause.__context__
            reason = (str(cause) or repr(cause)).splitlines()[0]
            raise NotCapturable(f"it cannot be captured as a CUDA graph ({reason})") from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector may take down another graph, which must not happen on a thread that captures one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(
            "CuPy is not installed, and the simulation runs on it when the model is on a GPU: "
            f"pip install 'spectralmc[cuda13]' or 'spectralmc[cuda12]' ({error})"
        ) from None
    return cupy
