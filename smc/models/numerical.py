"""Precision: the one switch between single and double arithmetic."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch

__all__ = ["Precision"]


class Precision(StrEnum):
    """Floating-point width of simulation, targets and network alike."""

    float32 = "float32"
    float64 = "float64"

    @property
    def numpy(self) -> np.dtype[np.floating]:
        """The NumPy (and CuPy) dtype."""
        return np.dtype(self.value)

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of real tensors."""
        return torch.float32 if self is Precision.float32 else torch.float64
