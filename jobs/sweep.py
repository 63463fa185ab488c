"""Run a file of experiments, as many at a time as the cluster holds, all into one ledger.

    python -m jobs.sweep sweeps/demo.yaml --ledger my-bucket
    ray job submit --working-dir . -- python -m jobs.sweep sweeps/demo.yaml --ledger my-bucket

Submitted again, it continues from the ledger: finished experiments are skipped, interrupted ones go on
from their last version.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jobs.recipes import read_sweep
from jobs.session import connect, run_job
from smc.errors import ConfigError, SpectralMCError
from smc.experiment import Experiment
from smc.gbm_trainer import Progress, TrainingResult
from smc.storage import AsyncBlockchainModelStore, ModelVersion

__all__ = ["ExperimentOutcome", "absolute", "newest_versions", "report", "run_experiments"]

# That commits then have to reach the ledger; whoever sends it waits 10 (Docker), 30 (a spot instance, Kubernetes).
_SECONDS_AFTER_SIGTERM = 8.0


@dataclass(frozen=True)
class ExperimentOutcome:
    """How one experiment ended: with a result, with nothing left to do (None), or with an error."""

    experiment: Experiment
    result: TrainingResult | None
    error: Exception | None = None

    @property
    def line(self) -> str:
        """One line for people."""
        name = f"{self.experiment.name:<16}"
        if self.error is not None:
            return f"{name}failed: {str(self.error).splitlines()[0]}"
        if self.result is None:
            return f"{name}finished before, skipped"
        r = self.result
        counts = ", ".join(f"{len(r.commits_that(s))} {s}" for s in ("committed", "replaced", "failed"))
        verb = "stopped at" if r.stopped else "trained to"
        return f"{name}{verb} step {r.global_step} in {r.seconds:.1f} s, loss {r.loss:.3e}; commits: {counts}"


async def run_experiments(
    experiments: Sequence[Experiment], ledger: str, *, extend: bool = False, tensorboard: Path | None = None
) -> list[ExperimentOutcome]:
    """Train every experiment that is not finished, with progress bars; -> outcomes in the same order.

    `tensorboard`: a folder for TensorBoard, absolute, of which the nodes that train have the same view.
    Raises: ConfigError, Unavailable or Corrupt if the ledger cannot be appended to.
    """
    import ray

    from actors.ledger import LedgerHandle, ledger_actor
    from actors.trainer import RemoteTrainerActor

    async with AsyncBlockchainModelStore(ledger) as store:
        uri = store.uri
        newest = newest_versions(await store.list_versions())
    connect()
    actor = ledger_actor(uri)
    await _plain(actor.prepare.remote())
    handle = LedgerHandle(uri, actor)
    places = asyncio.Semaphore(_places(experiments))
    bars = _Bars(experiments)
    running: set[Any] = set()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    within = math.inf

    def stop(seconds: float) -> None:
        nonlocal within
        within = seconds
        stopping.set()

    loop.add_signal_handler(signal.SIGINT, stop, math.inf)
    loop.add_signal_handler(signal.SIGTERM, stop, _SECONDS_AFTER_SIGTERM)

    async def one(experiment: Experiment) -> ExperimentOutcome:
        not_started = ExperimentOutcome(experiment, None, ConfigError("not started: the sweep was stopped"))
        async with places:
            if stopping.is_set():
                return not_started
            trainer = RemoteTrainerActor.options(
                name=f"trainer:{experiment.name}",
                num_cpus=experiment.num_cpus,
                num_gpus=experiment.num_gpus,
                max_concurrency=16,
            ).remote(experiment, handle, extend=extend, tensorboard=tensorboard)
            try:
                if not await _unless(stopping, trainer.progress.remote()):  # others may hold its place in the cluster
                    return not_started
                running.add(trainer)
                training = asyncio.ensure_future(_plain(trainer.train.remote(newest.get(experiment.name))))
                await bars.follow(experiment.name, trainer, training)
                outcome = ExperimentOutcome(experiment, await training)
            except Exception as error:
                outcome = ExperimentOutcome(experiment, None, error)
            finally:
                running.discard(trainer)
            # An error's traceback would keep the actor, and its place in the cluster, as long as the outcome lives.
            ray.kill(trainer)
            return outcome

    async def stop_all() -> None:
        await stopping.wait()
        await asyncio.gather(*(trainer.stop.remote(within) for trainer in running), return_exceptions=True)

    stopper = asyncio.ensure_future(stop_all())
    try:
        return list(await asyncio.gather(*(one(experiment) for experiment in experiments)))
    finally:
        stopper.cancel()
        bars.close()
        await _plain(actor.flush.remote())


def newest_versions(versions: Sequence[ModelVersion]) -> Mapping[str, ModelVersion]:
    """The last of these versions for each experiment, by its name."""
    return {version.experiment: version for version in versions}


def _places(experiments: Sequence[Experiment]) -> int:
    """How many of the most demanding of these experiments the cluster holds at once.

    Raises: ConfigError if it holds none.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = max(e.num_cpus for e in experiments), max(e.num_gpus for e in experiments)
    places = int(have.get("CPU", 0) / cpus)
    if gpus:
        places = min(places, int(have.get("GPU", 0) / gpus))
    if places < 1:
        raise ConfigError(
            f"an experiment asks for {cpus:g} CPUs and {gpus:g} GPUs, the cluster has "
            f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}"
        )
    return places


async def _plain(ref: Any) -> Any:
    """Await a ref, with errors as the actor raised them."""
    from ray.exceptions import RayTaskError

    try:
        return await ref
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, SpectralMCError) else error from None


async def _unless(stopping: asyncio.Event, ref: Any) -> bool:
    """Whether the ref is there before `stopping` is set."""
    answer, stop = asyncio.ensure_future(_plain(ref)), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({answer, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not answer.done():
        answer.cancel()
        return False
    await answer
    return True


class _Bars:
    """One progress bar an experiment on a terminal; a line now and then in a log."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self._interactive = sys.stderr.isatty()
        width = max(len(e.name) for e in experiments)
        self._bars = {
            e.name: tqdm(
                total=e.training.num_batches,
                desc=f"{e.name:<{width}}",
                position=row,
                unit="batch",
                disable=not self._interactive,
                leave=True,
            )
            for row, e in enumerate(experiments)
        }
        self._said: dict[str, int] = {}

    async def follow(self, name: str, trainer: Any, training: asyncio.Future[Any]) -> None:
        while not training.done():
            await asyncio.wait({training}, timeout=0.5)
            if training.done():
                return
            answer = asyncio.ensure_future(_plain(trainer.progress.remote()))
            await asyncio.wait({answer, training}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and not answer.exception() and answer.result() is not None:
                self._show(name, answer.result())

    def _show(self, name: str, progress: Progress) -> None:
        if progress.loss is None:
            return
        bar = self._bars[name]
        if self._interactive:
            first = progress.end - (bar.total or 0)
            bar.n = max(0, progress.step - first)
            bar.set_postfix_str(f"loss {progress.loss:.2e}")
        else:
            tenth = 10 * progress.step // max(1, progress.end)
            if self._said.get(name) != tenth:
                self._said[name] = tenth
                print(f"{name}: step {progress.step} of {progress.end}, loss {progress.loss:.3e}", flush=True)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the sweep, a YAML file")
    parser.add_argument("--ledger", help="bucket or s3://bucket/prefix (default: the file's)")
    parser.add_argument("--extend", action="store_true", help="train finished experiments further")
    parser.add_argument("--tensorboard", type=absolute, metavar="DIR", help="live metrics for TensorBoard")
    options = parser.parse_args(arguments)

    async def run() -> int:
        sweep, experiments = read_sweep(options.file)
        ledger = options.ledger or sweep.ledger
        if ledger is None:
            raise ConfigError(f"{options.file}: no ledger given: pass --ledger, or set `ledger:` in the file")
        return report(
            await run_experiments(experiments, ledger, extend=options.extend, tensorboard=options.tensorboard)
        )

    return run_job(run)


def absolute(path: str) -> Path:
    """For actors, which have a working directory of their own."""
    return Path(path).absolute()


def report(outcomes: Sequence[ExperimentOutcome]) -> int:
    """Print how each experiment ended; -> 0, or 2 if one could not be carried out."""
    for outcome in outcomes:
        print(outcome.line)
    failed = sum(outcome.error is not None for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} experiments done" + (f", {failed} failed" if failed else ""))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
