"""NumPy on the CPU, CuPy on the GPU, and torch on both, over the same memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from smc.errors import ConfigError

__all__ = ["array_module", "as_tensor", "on_torch_stream", "require_device"]


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


def array_module(device: torch.device) -> ModuleType:
    """numpy for the CPU, cupy for a CUDA device."""
    return np if device.type == "cpu" else _cupy()


def as_tensor(array: Any) -> torch.Tensor:
    """The array as a torch tensor over the same memory; no copy on either device."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else from_dlpack(array)


def on_torch_stream(device: torch.device) -> Any:
    """A context in which CuPy works on torch's current stream of this device, in order with it."""
    cupy = _cupy()
    return cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(
            "CuPy is not installed, and the simulation runs on it when the model is on a GPU: "
            f"pip install 'spectralmc[cuda13]' or 'spectralmc[cuda12]' ({error})"
        ) from None
    return cupy
