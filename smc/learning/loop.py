"""The training loop: batches, reports and commits, until the plan is done or somebody stops it."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from smc.errors import NumericsError
from smc.learning.commits import CommitOrders, TrainingCommits
from smc.learning.control import TrainingControl
from smc.learning.guarded import GuardedLogger, Logger
from smc.learning.modules import check_trainable, training
from smc.learning.plan import Progress, StepReport, TrainingConfig, TrainingPlan
from smc.learning.result import TrainingResult
from smc.learning.state import TrainingState
from smc.learning.step import TrainingStep

__all__ = ["run"]

# Losses are read back, checked and reported once in this many steps.
_REPORT_EVERY = {"cpu": 1, "cuda": 50}
# Seconds that another thread may keep Python's lock from the one that launches a GPU's work; Python's own are 0.005.
_SWITCH_INTERVAL = 1e-4


def run(
    state: TrainingState,
    control: TrainingControl,
    config: TrainingConfig,
    orders: CommitOrders,
    loggers: Sequence[Logger],
    report_every: int | None = None,
) -> TrainingResult:
    """Train for `config.num_batches` more batches and settle what was committed.

    The thread is `control`'s, and torch's generators are the state's. Raises: ConfigError before the first step;
    NumericsError when the loss is no longer finite, after the commits before it are settled.
    """
    at, whole = state.position, True  # the state is that of a step, and not of the middle of one
    with contextlib.ExitStack() as stack:
        stack.enter_context(_short_pauses(state.device))
        stack.enter_context(training(state.model))
        check_trainable(state.model, state.probe, config.differential > 0)
        plan = state.enter_plan(config)
        first, end, simulated = at.step, at.step + config.num_batches, at.simulated
        train_one_batch = stack.enter_context(state.training_step(config, plan))
        commits = None if orders.target is None else TrainingCommits(state, plan, orders)
        guarded = [GuardedLogger(each, control.serve_requests, state.device) for each in loggers]
        for each in guarded:
            stack.callback(each.close)
        every = report_every or _REPORT_EVERY[state.device.type]
        reports = _Reports(control, train_one_batch, plan, end, guarded, every)
        started = time.perf_counter()
        try:
            last = control.stopping
            while not last:
                control.serve_requests()
                whole = False
                train_one_batch()
                whole = True
                reports.step_done(commits.pending if commits else 0)
                last = at.step == end or control.stopping
                if commits and orders.interval and (at.step - first) % orders.interval == 0 and not last:
                    commits.submit(train_one_batch, at.step - first)
            loss = reports.finish(commits.pending if commits else 0)
            if config.held_back and at.step == plan.end:
                state.measure_error_bars(config.held_back)
            trained, batch = time.perf_counter(), at.step - first
            if commits and batch:
                commits.submit(train_one_batch, batch, control.ending)
        except BaseException as error:  # whatever ends training, its newest state is kept
            if commits and whole and at.step > first and not isinstance(error, NumericsError):
                commits.submit(train_one_batch, at.step - first, control.ending)
            raise
        finally:
            outcomes = control.settle(commits, orders.flush_seconds) if commits else ()
        return TrainingResult(
            batches=at.step - first,
            global_step=at.step,
            loss=loss,
            seconds=trained - started,
            flush_seconds=time.perf_counter() - trained,
            contracts=at.simulated - simulated,
            stopped=at.step < end,
            commits=outcomes,
        )


class _Reports:
    """Losses read, checked and told to the loggers: of every step on a CPU; on a GPU now and then, one report late.

    Late, because to read a loss is to wait for its step: the device would have nothing to do until more is launched.
    """

    def __init__(
        self,
        control: TrainingControl,
        step: TrainingStep,
        plan: TrainingPlan,
        end: int,
        loggers: Sequence[Callable[[StepReport], None]],
        every: int,
    ) -> None:
        self._control, self._step, self._plan, self._loggers = control, step, plan, loggers
        self._every, self._late = every, 0 if every == 1 else 1
        at = step.position
        self._first, self._end, self._asked = at.step, end, at.step
        self._contracts = at.simulated
        self._due: deque[tuple[int, int]] = deque()  # steps, and the contracts simulated until then
        self._loss, self._started = math.nan, time.perf_counter()

    def step_done(self, commits_pending: int) -> None:
        """Take note of a step."""
        if (self._step.position.step - self._first) % self._every == 0:
            self._ask()
            self._report(self._late, commits_pending)

    def finish(self, commits_pending: int) -> float:
        """Report what is left; -> the last step's loss."""
        if self._asked < self._step.position.step:
            self._ask()
        self._report(0, commits_pending)
        return self._loss

    def _ask(self) -> None:
        self._step.send_losses()
        self._asked = self._step.position.step
        self._due.append((self._asked, self._step.position.simulated))

    def _report(self, late: int, commits_pending: int) -> None:
        while len(self._due) > late:
            step, contracts = self._due.popleft()
            losses = self._step.losses(step)
            _check_finite(losses, step)
            self._loss = losses[-1]
            seconds = time.perf_counter() - self._started
            per_second = (contracts - self._contracts) / max(seconds, 1e-9)
            self._control.progress = Progress(step, self._end, self._loss, True, commits_pending, per_second)
            rate = self._plan.learning_rate(step - 1)
            for logger in self._loggers:
                logger(StepReport(step, step - self._first, self._loss, rate, contracts, seconds))


def _check_finite(losses: list[float], last_step: int) -> None:
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss is {loss} at step {step}: nothing from here on is committed; "
                "lower learning_rate, or resume from the last version"
            )


@contextlib.contextmanager
def _short_pauses(device: torch.device) -> Iterator[None]:
    """On a GPU: nothing in this process keeps the thread that launches from it for longer than a step or so."""
    if device.type == "cpu":
        yield
        return
    # A full collection of what torch and Ray brought along takes a quarter of a second: do it now, and leave that out.
    gc.collect()
    gc.freeze()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
