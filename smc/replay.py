"""The replay buffer: the most recent simulated contracts, kept where the model trains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smc.normals import philox4x32

__all__ = ["Examples", "ReplayBuffer"]


class Examples(NamedTuple):
    """Training examples. Shapes: inputs (n, features), real and imag (n, bins)."""

    inputs: Tensor
    real: Tensor
    imag: Tensor


class ReplayBuffer:
    """A ring over the training stream: slot i % capacity holds contract i.

    Which rows a step draws is a function of seed and step, and which contracts are held is a function of
    how many were inserted, so a resumed run that inserts the last `capacity` again is where it was.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.stop = 0  # contracts inserted so far, counted from the start of the stream
        self._start = 0
        self._seed = seed
        self._rows: Examples | None = None

    def __len__(self) -> int:
        return min(self.capacity, self.stop - self._start)

    def insert(self, examples: Examples, first: int) -> None:
        """Insert contracts first, first + 1, ...; the first call may begin anywhere."""
        count = len(examples.inputs)
        if self._rows is None:
            self._rows = Examples(*(t.new_empty((self.capacity, *t.shape[1:])) for t in examples))
            self._start = self.stop = first
        if first != self.stop:
            raise ValueError(f"the buffer ends at contract {self.stop}, cannot go on at {first}")
        keep = min(count, self.capacity)
        slots = torch.arange(first + count - keep, first + count) % self.capacity
        for rows, new in zip(self._rows, examples, strict=True):
            rows[slots.to(rows.device)] = new[count - keep :]
        self.stop += count

    def draw(self, count: int, step: int) -> Examples:
        """`count` held contracts, with replacement, as determined by seed and step."""
        assert self._rows is not None, "draw from an empty buffer"
        words = philox4x32(self._seed, (np.arange(count, dtype=np.uint64), step & 0xFFFFFFFF, step >> 32, 0))
        held = len(self)
        newest_first = (words[0] * np.uint64(held)) >> np.uint64(32)
        slots = (self.stop - 1 - newest_first.astype(np.int64)) % self.capacity
        index = torch.from_numpy(slots)
        return Examples(*(rows[index.to(rows.device)] for rows in self._rows))
