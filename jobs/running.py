"""Runs experiments on a Ray cluster: a TrainerActor each, resumed elsewhere when lost; all state is the ledger's."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from tqdm import tqdm

from actors.ledger import address
from jobs.outcome import ExperimentOutcome, NotStarted
from smc.checkpoint.file import read_metadata
from smc.errors import ConfigError, NotFound, SpectralMCError, Unavailable
from smc.learning.experiment import Experiment
from smc.learning.pricer import Progress
from smc.storage import AsyncBlockchainModelStore, ModelVersion

__all__ = ["ExperimentOutcome", "RunOptions", "Runner", "check_settings", "cluster_places"]

logger = logging.getLogger("smc.jobs")

# Seconds that the trainer of a job that is gone may take to be gone as well.
_NAME_TAKEN_LIMIT: Final = 30.0
_POLL_SECONDS: Final = 0.5
# Seconds that the ledger then has, where experiments were told to stop in some seconds: their commits are settled.
_FLUSH_SECONDS: Final = 1.0
# Seconds that an experiment waits for a ledger that cannot be reached before its turn, and between two looks.
_UNAVAILABLE_LIMIT: Final = 3600.0
_UNAVAILABLE_PAUSE: Final = 5.0

T = TypeVar("T")
Watch = Callable[[Progress], bool]


@dataclass(frozen=True)
class RunOptions:
    """How experiments are run.

    `extend` trains finished ones further; `tensorboard` is an absolute folder that the training nodes share; `restarts`
    is how often an experiment is resumed when its trainer is lost; `measure` names a quantity of
    `smc.prediction.evaluation`; `evaluate` compares every quantity on so many contracts, if any.
    """

    extend: bool = False
    tensorboard: Path | None = None
    restarts: int = 3
    measure: str | None = None
    evaluate: int = 0

    @property
    def asks(self) -> bool:
        """Whether what was trained is asked for something."""
        return self.measure is not None or self.evaluate > 0


class Runner:
    """Runs one experiment after the other, or several at a time, through one LedgerActor into one ledger."""

    def __init__(self, store: AsyncBlockchainModelStore, ledger_actor: Any, options: RunOptions) -> None:
        from actors.ledger import LedgerHandle

        self._store, self._actor, self._options = store, ledger_actor, options
        self._handle = LedgerHandle(store.uri, ledger_actor)
        self._stopping = asyncio.Event()
        self._within = math.inf
        self._trainers: set[Any] = set()
        self._bars = _Bars()

    def stop(self, within: float = math.inf) -> None:
        """Let every experiment end with a final commit, which has `within` seconds; start no other."""
        self._within = within
        self._stopping.set()
        for trainer in self._trainers:
            trainer.stop.remote(within)

    @property
    def stopping(self) -> bool:
        """Whether no other experiment is started."""
        return self._stopping.is_set()

    async def run(self, experiment: Experiment, watch: Watch | None = None) -> ExperimentOutcome:
        """Train what remains of an experiment, from its last version, as often as its trainer is lost.

        `watch` is shown the progress and says when to give the experiment up.
        """
        lost = 0
        try:
            found = await self._when_available(experiment, lambda: self._newest(experiment))
            while True:
                try:
                    outcome = await self._when_available(experiment, lambda: self._turn(experiment, found, watch))
                except _lost_errors() as error:
                    if lost == self._options.restarts:
                        raise
                    lost += 1
                    logger.warning(
                        "%s: its trainer was lost (%s); goes on from its last version, restart %d of %d",
                        experiment.name,
                        str(error).strip().splitlines()[0],
                        lost,
                        self._options.restarts,
                    )
                    continue
                if outcome is not None:
                    return replace(outcome, restarts=lost)
        except Exception as error:
            return ExperimentOutcome(experiment, None, error, restarts=lost)

    async def close(self) -> None:
        """Settle what the ledger still has to do, unless whoever had us stop waits no longer."""
        self._bars.close()
        try:
            await asyncio.wait_for(self._flush(), _FLUSH_SECONDS if self._within < math.inf else None)
        except Exception as error:  # what the experiments came to is to be told all the same
            logger.warning("the ledger may have something left to do: %s", str(error) or "it does not answer in time")

    async def _flush(self) -> None:
        """Return when what lost trainers handed to the ledger is settled."""
        from ray.exceptions import ActorDiedError

        from actors.ledger import LedgerHandle, ledger_actor

        try:
            await plain(self._actor.flush.remote())
        except ActorDiedError:  # replaced by newer code, which let it settle everything
            self._actor = await asyncio.to_thread(ledger_actor, self._store.uri)
            self._handle = LedgerHandle(self._store.uri, self._actor)

    async def _when_available(self, experiment: Experiment, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, again while the ledger cannot be reached: others go on training, and so will this one."""
        limit = math.inf
        while True:
            begun = time.monotonic()
            try:
                return await work()
            except Unavailable as error:
                if self.stopping:
                    raise NotStarted from error
                failed = time.monotonic()
                if failed - begun > _UNAVAILABLE_LIMIT:  # it was there in the meantime
                    limit = math.inf
                limit = min(limit, failed + _UNAVAILABLE_LIMIT)
                if failed > limit:
                    raise
                logger.warning("%s: waits for the ledger: %s", experiment.name, error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _UNAVAILABLE_PAUSE)

    async def _newest(self, experiment: Experiment) -> ModelVersion | None:
        return (await self._store.catalog()).furthest.get(experiment.name)

    async def _check_settings(self, experiment: Experiment, version: ModelVersion) -> None:
        await check_settings(self._store, experiment, version)

    async def _turn(
        self, experiment: Experiment, found: ModelVersion | None, watch: Watch | None
    ) -> ExperimentOutcome | None:
        """What one trainer comes to; None if its node stopped it, and it is to go on elsewhere."""
        newest = await self._newest(experiment)
        ours = newest if newest != found else None  # trained by this job, and lost before it could tell
        told = ExperimentOutcome(experiment, None, version=ours)
        if ours is not None and ours.pruned:
            return replace(told, pruned=True)
        extends = self._extends(found, newest)
        if newest is not None and newest.is_finished and not extends and not self._options.asks:
            if ours is None:
                await self._check_settings(experiment, newest)
            return told
        if self.stopping:
            if ours is None:
                raise NotStarted
            return told
        outcome = await self._attempt(experiment, found, watch)
        result = outcome.result
        if result is None:
            return replace(outcome, version=ours)
        if not result.stopped or outcome.pruned:
            return outcome
        if not self.stopping:
            # Its node is about to go and had it stopped: that is nobody's fault.
            logger.warning("%s: stopped by its node at step %d; goes on elsewhere", experiment.name, result.global_step)
            return None
        if result.batches == 0:
            raise NotStarted
        return outcome

    def _extends(self, found: ModelVersion | None, newest: ModelVersion | None) -> bool:
        """Whether a finished experiment is to be trained further: not what this job itself has trained since."""
        return self._options.extend and newest == found

    async def _attempt(
        self, experiment: Experiment, found: ModelVersion | None, watch: Watch | None
    ) -> ExperimentOutcome:
        import ray

        trainer = await self._started(experiment)
        pruned = False
        try:
            if not await _unless(self._stopping, trainer.progress.remote()):  # others may hold its place in the cluster
                raise NotStarted
            self._trainers.add(trainer)
            if self.stopping:
                trainer.stop.remote(self._within)
            # What an earlier trainer handed over is in the ledger before anybody looks where to go on.
            if not await _unless(self._stopping, self._flush()):
                raise NotStarted
            newest = await self._newest(experiment)
            if newest is not None and not (self._extends(found, newest) and newest.is_finished):
                await self._check_settings(experiment, newest)
            training = asyncio.ensure_future(plain(trainer.train.remote(newest, extend=self._extends(found, newest))))
            async for progress in _progress(trainer, training):
                self._bars.show(experiment, progress)
                if watch is not None and not pruned and progress.loss is not None and watch(progress):
                    pruned = True
                    await plain(trainer.stop.remote(math.inf, pruned=True))
            result = await training
            value, found_ = None, None
            whole = not (result and result.stopped)
            if self._options.measure is not None and whole:
                value = await plain(trainer.measure.remote(self._options.measure))
            if self._options.evaluate and whole:
                try:
                    found_ = await plain(trainer.evaluate.remote(self._options.evaluate))
                except SpectralMCError as error:  # what was trained is trained
                    found_ = str(error).splitlines()[0]
            given_up = pruned and not whole
            return ExperimentOutcome(experiment, result, pruned=given_up, value=value, evaluated=found_)
        finally:
            self._trainers.discard(trainer)
            # An error's traceback would keep the actor, and its place in the cluster, as long as the outcome lives.
            ray.kill(trainer)

    async def _started(self, experiment: Experiment) -> Any:
        """Its trainer, under a name that one trainer at a time can have.

        Raises: ConfigError if another job trains it.
        """
        from actors.ledger import NAMESPACE
        from actors.trainer import RemoteTrainerActor

        deadline = time.monotonic() + _NAME_TAKEN_LIMIT
        while True:
            try:
                return RemoteTrainerActor.options(
                    name=f"trainer:{address(self._store.uri)}:{experiment.name}",
                    namespace=NAMESPACE,
                    num_cpus=experiment.num_cpus,
                    num_gpus=experiment.num_gpus,
                    max_concurrency=16,
                ).remote(experiment, self._handle, tensorboard=self._options.tensorboard)
            except ValueError as error:  # the name is taken, perhaps by what a job left that is gone
                if "already" not in str(error):
                    raise ConfigError(f"{experiment.name}: Ray refuses its trainer: {error}") from None
                if time.monotonic() > deadline:
                    raise ConfigError(f"{experiment.name} is being trained by another job") from None
            await asyncio.sleep(0.5)


async def _progress(trainer: Any, training: asyncio.Future[Any]) -> Any:
    """Where training is, now and then, until it ends."""
    while not training.done():
        await asyncio.wait({training}, timeout=_POLL_SECONDS)
        if training.done():
            return
        answer = asyncio.ensure_future(plain(trainer.progress.remote()))
        await asyncio.wait({answer, training}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
        elif not answer.exception() and answer.result() is not None:
            yield answer.result()


async def check_settings(store: AsyncBlockchainModelStore, experiment: Experiment, version: ModelVersion) -> None:
    """Raises: ConfigError if the version was trained with other settings: it is another experiment's."""
    try:
        trained = read_metadata(await store.load_header(version))
    except NotFound:  # it was collected: what is finished stays so, and what is not cannot go on anyway
        return
    if (difference := experiment.difference(trained)) is not None:
        raise ConfigError(
            f"{experiment.name} stands in the ledger with other settings ({version.version_id}): {difference}; "
            "an experiment with new settings needs a new name"
        )


def cluster_places(num_cpus: float, num_gpus: float) -> int:
    """How many experiments of this size the cluster holds at once, as it is now.

    Raises: ConfigError if it holds none.
    """
    import ray

    have = ray.cluster_resources()
    places = 0
    for node in ray.nodes():  # an experiment has its place on one of them
        room = node["Resources"] if node["Alive"] else {}
        on_it = int(room.get("CPU", 0) / num_cpus)
        places += min(on_it, int(room.get("GPU", 0) / num_gpus)) if num_gpus else on_it
    if places < 1:
        raise ConfigError(
            f"an experiment asks for {num_cpus:g} CPUs and {num_gpus:g} GPUs, the cluster has "
            f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}, and no node so many; on a cluster that grows, say "
            "how many at a time: --concurrency"
        )
    return places


async def plain(ref: Awaitable[Any]) -> Any:
    """Await a ref, with errors as the actor raised them."""
    from ray.exceptions import RayTaskError

    try:
        return await ref
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, SpectralMCError) else error from None


def _lost_errors() -> tuple[type[Exception], ...]:
    """What is raised when an actor, its worker or its node is gone."""
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

    return RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError


async def _unless(stopping: asyncio.Event, ref: Awaitable[Any]) -> bool:
    """Whether the ref, or what is awaited, is there before `stopping` is set."""
    answer, stop = asyncio.ensure_future(plain(ref)), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({answer, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not answer.done():
        answer.cancel()
        return False
    await answer
    return True


class _Bars:
    """One progress bar an experiment on a terminal; a line now and then in a log."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._said: dict[str, int] = {}

    def show(self, experiment: Experiment, progress: Progress) -> None:
        if progress.loss is None:
            return
        name = experiment.name
        if self._interactive:
            if name not in self._bars:
                total = experiment.training.num_batches
                self._bars[name] = tqdm(total=total, desc=name, position=len(self._bars), unit="batch", leave=True)
            bar = self._bars[name]
            bar.n = max(0, progress.step - (progress.end - (bar.total or 0)))
            bar.set_postfix_str(f"loss {progress.loss:.2e}")
            return
        tenth = 10 * progress.step // max(1, progress.end)
        if self._said.get(name) != tenth:
            self._said[name] = tenth
            print(
                f"{name}: step={progress.step} of={progress.end} loss={progress.loss:.3e} "
                f"contracts_per_s={progress.contracts_per_second:.0f} commits_pending={progress.commits_pending}",
                flush=True,
            )

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
