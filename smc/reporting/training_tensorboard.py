"""Training as TensorBoard sees it: a logger for `GbmCVNNPricer.train`."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tensorboardX import FileWriter, SummaryWriter
from tensorboardX.event_file_writer import EventsWriter
from torch import Tensor, nn

from smc.errors import ConfigError
from smc.learning.guarded import finished_within
from smc.learning.plan import StepReport

__all__ = ["EventWriter", "TensorBoardLogger", "folder_name"]

_CLOSING_SECONDS = 10.0
_FLUSH_SECONDS = 5.0
# A file system takes 255 bytes, of which a part of a hash may be behind these.
_LONGEST_NAME = 120


class TensorBoardLogger:
    """Writes loss, learning rate, gradient norm and speed every so many steps, and now and then histograms.

    ::

        with TensorBoardLogger("runs/baseline", pricer.model) as logger:
            pricer.train(config, logger=logger)

    Without a model there are neither gradients nor histograms. On a GPU, where losses arrive late, a gradient norm is
    that of the newest step launched; histograms, of parameters and their gradients, wait for the device.
    Raises: ConfigError for an interval below 1.
    """

    def __init__(
        self, log_dir: Path | str, model: nn.Module | None = None, *, every: int = 10, histograms_every: int = 1000
    ) -> None:
        if every < 1 or histograms_every < 1:
            raise ConfigError(f"every and histograms_every must be at least 1, got {every} and {histograms_every}")
        self._model, self._every, self._histograms_every = model, every, histograms_every
        self._writer = EventWriter(log_dir)
        self._last: StepReport | None = None
        self._histograms_at = 0
        # Not read at once: on a GPU that would be to wait for its step.
        self._norm: tuple[int, Tensor] | None = None

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, report: StepReport) -> None:
        """Take in what training reports."""
        last = self._last
        if last is not None and report.batch > last.batch and report.step - last.step < self._every:
            return
        self._last = report
        step, add = report.step, self._writer.add_scalar
        add("train/loss", report.loss, step)
        add("train/learning_rate", report.learning_rate, step)
        if last is not None and report.batch > last.batch:
            seconds = report.seconds - last.seconds
            add("train/batch_seconds", seconds / (report.batch - last.batch), step)
            add("train/contracts_per_second", (report.contracts - last.contracts) / max(seconds, 1e-9), step)
        self._write_norm()
        if self._model is None:
            return
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        if gradients:
            self._norm = step, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if step - self._histograms_at >= self._histograms_every:
            self._histograms_at = step
            for name, parameter in self._model.named_parameters():
                self._writer.add_histogram(f"parameters/{name}", parameter.detach().cpu().numpy(), step)
                if parameter.grad is not None:
                    self._writer.add_histogram(f"gradients/{name}", parameter.grad.cpu().numpy(), step)

    def close(self) -> None:
        """Write what is left. A writer that hangs, because its disk does, is left alone after some seconds."""

        def work() -> None:
            self._write_norm()
            self._writer.close()

        finished_within(_CLOSING_SECONDS, work, "TensorBoard's writer")

    def _write_norm(self) -> None:
        if self._norm is not None:
            step, norm = self._norm
            self._writer.add_scalar("train/gradient_norm", float(norm), step)
            self._norm = None


class EventWriter(SummaryWriter):  # type: ignore[misc]
    """tensorboardX's writer, which writes in the thread that calls it: a full disk is an OSError for the caller.

    The original hands events to a thread of its own through a queue. When its disk is full that thread dies, and from
    the tenth event on every caller waits for good, the interpreter's exit included.
    """

    def __init__(self, log_dir: Path | str, suffix: str = "") -> None:
        super().__init__(str(log_dir), filename_suffix=suffix)

    def _get_file_writer(self) -> FileWriter:
        if getattr(self, "file_writer", None) is None:
            self.file_writer: FileWriter = _FileWriter(self.logdir, self._filename_suffix)
            self.all_writers = {self.logdir: self.file_writer}
        return self.file_writer


class _FileWriter(FileWriter):  # type: ignore[misc]
    def __init__(self, log_dir: str, suffix: str) -> None:  # that of the original starts the thread
        self.event_writer = _EventFile(log_dir, suffix)
        self._default_metadata: dict[str, float] = {}


class _EventFile:
    """What tensorboardX asks of the end that writes events."""

    def __init__(self, log_dir: str, suffix: str) -> None:
        self._log_dir = log_dir
        os.makedirs(log_dir, exist_ok=True)
        self._events = EventsWriter(os.path.join(log_dir, "events"), suffix)
        self._flushed_at = 0.0
        self._closed = False

    def get_logdir(self) -> str:
        return self._log_dir

    def add_event(self, event: Any) -> None:
        self._events.write_event(event)
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()
            self._flushed_at = time.monotonic()

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._events.close()


def folder_name(experiment: str) -> str:
    """A folder's name for an experiment, whatever the experiment is called; no other has the same."""
    name = re.sub(r"[^A-Za-z0-9._=-]", "_", experiment).strip(".")[:_LONGEST_NAME]
    if name != experiment:  # told apart from the one that is called so
        name = f"{name or 'no experiment'}.{hashlib.sha256(experiment.encode(errors='replace')).hexdigest()[:6]}"
    return name if experiment else "no experiment"
