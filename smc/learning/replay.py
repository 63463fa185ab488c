"""The replay buffer: the most recent simulated contracts, kept where the model trains."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smc.learning.labels import Examples
from smc.simulation.normals import philox4x32

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """A ring over the training stream: slot i % capacity holds contract i, from contract `start` on.

    Which slots a step draws is a function of seed and step, and which contracts are held is a function of
    how many were inserted, so a resumed run that inserts the last `capacity` again is where it was.
    Shapes: like `examples`, but for the number of rows.
    """

    def __init__(self, capacity: int, seed: int, start: int, examples: Examples) -> None:
        self.capacity = capacity
        self._seed, self._start = seed, start
        self._rows = Examples(*(t.new_empty((capacity, *t.shape[1:])) for t in examples))

    def insert(self, examples: Examples, first: Tensor) -> None:
        """Insert contracts first, first + 1, ... Shapes: first () int64 on the buffer's device."""
        count = len(examples.weights)
        keep = min(count, self.capacity)
        slots = (torch.arange(count - keep, count, device=first.device) + first) % self.capacity
        for rows, new in zip(self._rows, examples, strict=True):
            rows.index_copy_(0, slots, new[count - keep :])

    def draw(self, count: int, steps: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots of `count` held contracts for each step, with replacement, when contracts below its stop are in.

        Shapes: steps and stops (m,) -> (m, count).
        """
        step = steps.astype(np.uint64)[:, None]
        counter = (np.arange(count, dtype=np.uint64), step & np.uint64(0xFFFFFFFF), step >> np.uint64(32), 0)
        held = np.minimum(self.capacity, stops - self._start).astype(np.uint64)[:, None]
        newest_first = (philox4x32(self._seed, counter)[0] * held) >> np.uint64(32)
        return np.asarray((stops[:, None] - 1 - newest_first.astype(np.int64)) % self.capacity)

    def take(self, slots: Tensor) -> Examples:
        """The contracts in these slots. Shapes: slots (n,) int64 on the buffer's device."""
        return Examples(*(rows.index_select(0, slots) for rows in self._rows))
