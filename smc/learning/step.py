"""One training step: contracts, targets, forward, loss, backward, optimiser. On a GPU one CUDA graph, replayed.

Everything that changes from step to step is read from device memory: a window of upcoming contracts, learning
rates and replay slots is prepared at once, and a counter on the device walks through it. So the eager step
and the captured one are the same lines, and nothing is read back but the losses, when they are asked for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from smc.learning.labels import Contracts, Examples, ExamplesAhead, ExampleSource
from smc.learning.optimizer import Optimizer
from smc.learning.replay import ReplayBuffer
from smc.learning.scale import Scaling
from smc.learning.soap import TURN_EVERY, Soap
from smc.simulation.cuda import NotCapturable, capture

__all__ = ["Position", "TrainingStep"]

logger = logging.getLogger("smc.training")

# Contracts prepared at a time: on a GPU enough that preparing them is rare, on a CPU a block of the stream.
_AHEAD = {"cuda": 1 << 15, "cpu": 1 << 10}
# Replay slots drawn at a time: 32 MiB of them.
_MOST_SLOTS = 1 << 22


@dataclass
class Position:
    """Where training stands: steps done, contracts drawn from the Sobol stream, contracts simulated."""

    step: int
    drawn: int
    simulated: int


class TrainingStep:
    """Trains `model` by one batch a call, moving `position` on.

    A batch is `fresh` new contracts and, with a replay buffer, others that it holds. `differential` weighs the
    error of derivatives in the loss. On a CPU `executor` simulates ahead.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        source: ExampleSource,
        scaling: Scaling,
        bin_weights: Tensor,
        learning_rate: Callable[[int], float],
        position: Position,
        *,
        fresh: int,
        batch_size: int,
        replay: ReplayBuffer | None,
        differential: float = 0.0,
        executor: Executor | None = None,
    ) -> None:
        self._model, self._optimizer, self._source, self._replay = model, optimizer, source, replay
        self._learning_rate, self.position = learning_rate, position
        self._fresh, self._old, self._differential = fresh, batch_size - fresh, differential
        device = bin_weights.device
        self._device = device
        # The loss in one difference: outputs and targets on the scale whose squares are to be summed.
        root = bin_weights.sqrt()[:, None]
        self._gain, self._target_mean, self._target_gain = scaling.spread[:, None] * root, scaling.mean, root
        self._steps = max(1, min(_AHEAD[device.type] // fresh, _MOST_SLOTS // max(1, self._old)))
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # step within the window
        self._rows = torch.arange(fresh, device=device)
        self._losses = torch.zeros(self._steps, dtype=bin_weights.dtype, device=device)
        # The newest loss and the sum of all: next = loss + (0, 1) * this, which is one kernel.
        self._outcome = torch.zeros(2, dtype=bin_weights.dtype, device=device)
        self._summed = torch.tensor([0, 1], dtype=bin_weights.dtype, device=device)
        self._base = torch.zeros((), dtype=torch.int64, device=device)
        self._rates = torch.zeros(self._steps, dtype=torch.float64, device=device)
        self._rate = torch.zeros((), device=device)
        self._slots = torch.zeros((self._steps, self._old), dtype=torch.int64, device=device)
        self._window: Contracts | None = None
        self._ahead: ExamplesAhead | None = None
        if device.type == "cpu":
            self._ahead = ExamplesAhead(source, position.drawn, position.simulated, executor)
        self._left, self._sent = 0, self._steps
        self._on_their_way: deque[_Sent] = deque()
        # Not in the order of the steps: the next ones would wait there while a snapshot is copied to the host.
        self._to_host = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._replayed: Callable[[], None] | None = None
        if device.type == "cuda":
            for group in optimizer.param_groups:
                group["lr"] = self._rate
            self._refill()
            self._replayed = self._captured()
        else:
            logger.info("Training steps run eagerly: CUDA graphs need a GPU, the model is on the CPU")

    def __call__(self) -> None:
        """One step. On a GPU it is only launched."""
        if self._left == 0:
            self._refill()
        (self._replayed or self._step)()
        self._left -= 1
        self.position.step += 1
        self.position.drawn += self._fresh
        self.position.simulated += self._fresh
        if isinstance(self._optimizer, Soap) and self.position.step % TURN_EVERY == 0:
            self._optimizer.turn()

    def send_losses(self) -> None:
        """Start the copy of the newest losses to the host; waits for nothing."""
        done = self._steps - self._left
        if done > self._sent:
            new, self._sent = self._losses[self._sent : done], done
            self._on_their_way.append(_Sent(new, self.position.step, self._to_host))

    def losses(self, through: int) -> list[float]:
        """Losses of the steps since the last call, through one whose loss was sent. Waits for that step to be done."""
        arrived: list[float] = []
        while self._on_their_way and self._on_their_way[0].step <= through:
            arrived += self._on_their_way.popleft().arrived()
        return arrived

    def outcome(self) -> Tensor:
        """The newest loss, and the sum of every loss so far: finite only if each of them is.

        The next step changes it. Shape: (2,), on the device.
        """
        return self._outcome

    # --- the step -------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._next_batch())
        loss.backward()  # type: ignore[no-untyped-call]
        self._set_rate()
        self._optimizer.step()
        self._losses.index_copy_(0, self._at, loss.detach().view(1))
        torch.addcmul(loss.detach(), self._outcome, self._summed, out=self._outcome)
        self._at += 1

    def _next_batch(self) -> Examples:
        first = torch.add(self._base, self._at[0], alpha=self._fresh)
        if self._ahead is not None:
            new = self._ahead.take(self._fresh)
        else:
            assert self._window is not None
            new = self._source.simulate(self._window.select(torch.add(self._rows, self._at, alpha=self._fresh)), first)
        if self._replay is None:
            return new
        self._replay.insert(new, first)
        old = self._replay.take(self._slots.index_select(0, self._at)[0])
        return Examples(*(torch.cat(pair) for pair in zip(new, old, strict=True)))

    def _loss(self, batch: Examples) -> Tensor:
        values = batch.inputs[:, 0]
        if not self._differential:
            error = self._gain * self._output(values) - self._target_gain * (batch.targets[:, 0] - self._target_mean)
            return self._mean_square(error, batch.weights)
        output, slope = torch.func.jvp(self._output, (values,), (batch.inputs[:, 1],))  # type: ignore[misc]
        error = self._gain * output - self._target_gain * (batch.targets[:, 0] - self._target_mean)
        of = self._source.bins_with_slopes
        d_error = (self._gain * slope - self._target_gain * batch.targets[:, 1])[:, :of]
        d_weights = self._differential * batch.weights
        return self._mean_square(error, batch.weights) + self._mean_square(d_error, d_weights)

    def _output(self, inputs: Tensor) -> Tensor:
        return torch.stack(self._model(inputs, torch.zeros_like(inputs)), dim=-1)

    def _mean_square(self, error: Tensor, weights: Tensor) -> Tensor:
        return (error.square().flatten(1).sum(dim=1) * weights).mean()

    def _set_rate(self) -> None:
        rate = self._rates.index_select(0, self._at)[0]
        if self._device.type == "cuda":
            self._rate.copy_(rate)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = float(rate)

    # --- what changes from step to step ---------------------------------------------------------------

    def _refill(self) -> None:
        """Prepare the next window. Copies into the tensors that a graph reads, in order with its replays."""
        at = self.position
        self.send_losses()
        rates = torch.tensor([self._learning_rate(at.step + i) for i in range(self._steps)], dtype=torch.float64)
        _replace(self._rates, rates)
        if self._replay is not None:
            steps = np.arange(self._steps)
            stops = at.simulated + self._fresh * (steps + 1)
            _replace(self._slots, torch.from_numpy(self._replay.draw(self._old, at.step + steps, stops)))
        if self._ahead is None:
            contracts = self._source.contracts(at.drawn, self._steps * self._fresh)
            if self._window is None:
                self._window = contracts
            else:
                for held, new in zip(self._window, contracts, strict=True):
                    held.copy_(new)
        self._base.fill_(at.simulated)
        self._at.zero_()
        self._left, self._sent = self._steps, 0

    # --- capture --------------------------------------------------------------------------------------

    def _captured(self) -> Callable[[], None] | None:
        try:
            return capture(self._step, self._device, rehearsal=self._undone())
        except NotCapturable as error:
            logger.warning("Training steps run eagerly: %s", error)
            return None

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """What a step changes is afterwards as it was before, in the same memory."""
        tensors = [*self._model.state_dict().values(), self._losses, self._outcome]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        saved = [tensor.clone() for tensor in tensors]
        random = torch.cuda.get_rng_state(self._device)
        try:
            yield
        finally:
            torch.cuda.synchronize(self._device)
            with torch.no_grad():
                for tensor, was in zip(tensors, saved, strict=True):
                    tensor.copy_(was)
            self._at.zero_()
            torch.cuda.set_rng_state(random, self._device)


class _Sent:
    """Losses up to a step, being copied to the host. They are kept on the device, which uses their place again."""

    def __init__(self, losses: Tensor, step: int, stream: torch.cuda.Stream | None) -> None:
        self.losses, self.step = losses.clone(), step
        self._host, self._there = self.losses, None
        if stream is not None:
            self._host = torch.empty_like(losses, device="cpu", pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(losses.device))
            with torch.cuda.stream(stream):
                self._host.copy_(self.losses, non_blocking=True)
            self._there = stream.record_event()

    def arrived(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        values: list[float] = self._host.tolist()
        return values


def _replace(held: Tensor, new: Tensor) -> None:
    # Pinned, so that the copy is only queued behind the steps that still read the old values.
    held.copy_(new.pin_memory() if held.device.type == "cuda" else new, non_blocking=True)
