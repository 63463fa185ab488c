"""The TrainerActor: owns one pricer and its simulation, trains on a thread, answers at any time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from actors.metrics import TrainingMetrics
from smc.checkpoint.file import Snapshot, encode
from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.learning.experiment import Experiment
from smc.learning.pricer import GbmCVNNPricer, Progress, StepReport, TrainingResult
from smc.prediction.evaluation import objective_value
from smc.prediction.soundness import Evaluated, evaluated
from smc.problem.problem import register
from smc.reporting.training_tensorboard import TensorBoardLogger, folder_name
from smc.storage.chain import ModelVersion
from smc.storage.commits import CommitTarget
from smc.storage.snapshots import load_snapshot_from_checkpoint
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["RemoteTrainerActor", "TrainerActor"]


class TrainerActor:
    """Runs one experiment. A plain async class: give it any commit target and it works without Ray.

    `tensorboard` is a folder for TensorBoard, in which the experiment gets one of its own.
    """

    def __init__(self, experiment: Experiment, target: CommitTarget, *, tensorboard: Path | None = None) -> None:
        self._experiment, self._target, self._tensorboard = experiment, target, tensorboard
        # What this process did not import came with the experiment: checkpoints that name it are read here too.
        for part in (experiment.simulation.problem.process, experiment.simulation.problem.product):
            register(type(part))
        # The training loop has a thread of its own: on the event loop it would starve every other call.
        self._training = ThreadPoolExecutor(1, thread_name_prefix="smc-train")
        self._pricer: GbmCVNNPricer | None = None
        self._stopping = False

    def __repr__(self) -> str:
        return f"Trainer({self._experiment.name})"

    async def train(self, resume_from: ModelVersion | None = None, *, extend: bool = False) -> TrainingResult | None:
        """Train what remains, from the given version or from the start; -> None if nothing remains.

        `extend` trains a finished experiment for another `num_batches`.
        Raises: ConfigError, NumericsError, and what reading the version may raise.
        """
        experiment = self._experiment
        state = experiment.fresh()
        batches = experiment.training.num_batches
        if resume_from is not None:
            state = await self._load(resume_from, state)
            batches = experiment.remaining(state) or (batches if extend else 0)
        self._pricer = GbmCVNNPricer(state)  # to be measured, if nothing else
        if batches == 0:
            return None
        if self._stopping:
            return TrainingResult(0, state.global_step, math.nan, 0.0, 0.0, 0, stopped=True)
        config = experiment.training.model_copy(update={"num_batches": batches})
        pricer = self._pricer

        def run() -> TrainingResult:
            loggers: list[Callable[[StepReport], None]] = []
            if ray.is_initialized():
                loggers.append(TrainingMetrics(experiment.name))
            with ExitStack() as stack:
                if self._tensorboard is not None:
                    folder = self._tensorboard / folder_name(experiment.name)
                    loggers.append(stack.enter_context(TensorBoardLogger(folder, pricer.model)))
                return pricer.train(
                    config,
                    logger=loggers,
                    blockchain_store=self._target,
                    auto_commit=True,
                    commit_interval=experiment.commit_interval,
                    commit_message_template=experiment.commit_message_template,
                    experiment=experiment.name,
                    parameters=experiment.parameters,
                )

        running = asyncio.get_running_loop().run_in_executor(self._training, run)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # ray.cancel ends the coroutine and no thread: let the loop stop, and make its final commit.
            pricer.stop()
            await asyncio.wait({running})
            raise

    async def node_id(self) -> str:
        """The node that it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def progress(self) -> Progress | None:
        """Where training is, or None before it begins."""
        return self._pricer.progress if self._pricer else None

    async def stop(
        self, within: float = math.inf, metrics: Mapping[str, float] | None = None, *, pruned: bool = False
    ) -> None:
        """End training after the step it is in, with a final commit that has `within` seconds to reach the ledger.

        `metrics` stand in that commit's entry, and that it is given up, if `pruned`.
        """
        self._stopping = True
        if self._pricer is not None:
            self._pricer.stop(within=within, metrics=metrics, pruned=pruned)

    async def measure(self, objective: str) -> float | None:
        """A quantity's RMSE against the closed form, as the pricer is; None before training begins."""
        pricer = self._pricer
        return None if pricer is None else await asyncio.to_thread(lambda: objective_value(pricer, objective))

    async def evaluate(self, contracts: int) -> Evaluated | None:
        """Every quantity against the problem's reference on a fresh sample, and what must hold; None as above."""
        pricer = self._pricer
        return None if pricer is None else await asyncio.to_thread(lambda: evaluated(pricer, contracts))

    async def snapshot(self) -> list[Any] | None:
        """The state between two steps as a checkpoint file: a list holding its object ref.

        None before training begins. The object lives as long as this actor.
        """
        pricer = self._pricer
        if pricer is None:
            return None
        data = await asyncio.to_thread(lambda: encode(Snapshot.of(pricer.snapshot())))
        return [ray.put(data)]

    async def _load(self, version: ModelVersion, template: GbmCVNNPricerConfig) -> GbmCVNNPricerConfig:
        async with AsyncBlockchainModelStore(self._target.uri) as store:
            return await load_snapshot_from_checkpoint(store, version, template.cvnn, template)


RemoteTrainerActor = ray.remote(TrainerActor)
