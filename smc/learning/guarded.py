"""Loggers and signals beside training: neither holds it up or ends it without its newest state."""

from __future__ import annotations

import functools
import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Final

import torch

from smc.errors import ConfigError
from smc.learning.plan import StepReport

__all__ = ["GuardedLogger", "Logger", "finished_within", "only_training", "stopped_by_signals"]

logger = logging.getLogger("smc.training")

Logger = Callable[[StepReport], None]

# Seconds that a logger may take over one report before training goes on without it.
_LOGGER_SECONDS: Final = 30.0
# Seconds between two looks, while a logger works, whether another thread asks for a snapshot.
_LOOK_SECONDS: Final = 0.005
# Seconds that the newest commit has to reach the ledger, after the first signal, the second, and so on; then the
# process is interrupted where it is.
_WITHIN: Final = {signal.SIGINT: (math.inf, 5.0, 0.0), signal.SIGTERM: (5.0, 0.0)}


class GuardedLogger:
    """Calls a logger in a thread of its own and waits for it, but not for ever; one that fails or hangs is dropped.

    `meanwhile` is called now and then while the logger works. Random numbers that it draws from torch are not missing
    from training's.
    """

    def __init__(self, inner: Logger, meanwhile: Callable[[], None], device: torch.device) -> None:
        self._inner, self._meanwhile, self._device = inner, meanwhile, device
        self._reports: queue.SimpleQueue[StepReport | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._dropped = False
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._threads = torch.get_num_threads()
        self._thread: threading.Thread | None = None

    def __call__(self, report: StepReport) -> None:
        if self._dropped:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="smc-logger", daemon=True)
            self._thread.start()
        self._done.clear()
        self._reports.put(report)
        deadline = time.monotonic() + _LOGGER_SECONDS
        while not self._done.wait(_LOOK_SECONDS):
            self._meanwhile()
            if time.monotonic() > deadline:
                self._drop(f"has not returned after {_LOGGER_SECONDS:g} s")
                return
        if self._error is not None:
            error, self._error = self._error, None
            if not isinstance(error, Exception):  # somebody wants to leave
                raise error
            self._drop(f"failed: {error!r}")

    def close(self) -> None:
        """End the thread, unless the logger hangs in it."""
        self._reports.put(None)

    def _drop(self, why: str) -> None:
        self._dropped = True
        name = getattr(self._inner, "__qualname__", type(self._inner).__qualname__)
        logger.warning("The logger %s %s; training goes on without it", name, why)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            while (report := self._reports.get()) is not None:
                states = self._random_states()
                try:
                    self._inner(report)
                except BaseException as error:
                    self._error = error
                if self._dropped:  # training has gone on, with random numbers of its own
                    return
                self._restore(states)
                self._done.set()

    def _random_states(self) -> list[torch.Tensor]:
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _restore(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)


def finished_within(seconds: float, work: Callable[[], object], name: str) -> bool:
    """Do something that may hang in a thread; -> whether it was done in time. Its errors are logged."""

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            logger.warning("%s failed: %r", name, error)

    thread = threading.Thread(target=guarded, name="smc-closing", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        logger.warning("%s has not ended after %g s and is left alone", name, seconds)
    return not thread.is_alive()


@contextmanager
def stopped_by_signals(stop: Callable[[float], None]) -> Iterator[None]:
    """In the main thread: SIGINT and SIGTERM ask training to stop, and are delivered again when it has.

    `stop` is given the seconds that the newest commit then has. Only what the interpreter or asyncio does by itself is
    replaced: whoever handles a signal has said what it means.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous: dict[int, Any] = {}

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        within = _WITHIN[signal.Signals(signum)]
        if len(received) > len(within):
            raise KeyboardInterrupt
        logger.warning("%s: training stops after this step", signal.Signals(signum).name)
        stop(within[len(received) - 1])

    for each in _WITHIN:
        if _is_default(signal.getsignal(each)):
            previous[each] = signal.signal(each, on_signal)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
    if received:
        handler = previous[received[0]]
        if callable(handler):
            handler(received[0], None)
        else:
            os.kill(os.getpid(), received[0])


def _is_default(handler: Any) -> bool:
    of_asyncio = isinstance(handler, functools.partial) and getattr(handler.func, "__name__", "") == "_on_sigint"
    return handler in (signal.SIG_DFL, signal.default_int_handler) or of_asyncio


_one_at_a_time = threading.Lock()


@contextmanager
def only_training() -> Iterator[None]:
    """Raises: ConfigError if something else trains in this process, whose threads and random numbers would mix."""
    if not _one_at_a_time.acquire(blocking=False):
        raise ConfigError(
            "another pricer is training in this process: torch's threads and random numbers are the process's, so that "
            "neither would be what it is alone; train in processes, as jobs.sweep does"
        )
    try:
        yield
    finally:
        _one_at_a_time.release()
