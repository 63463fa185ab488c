"""Run a file of experiments, as many at a time as the cluster holds, all into one ledger.

    python -m jobs.sweep sweeps/demo.yaml --ledger my-bucket
    ray job submit --working-dir . -- python -m jobs.sweep sweeps/demo.yaml --ledger my-bucket

Submitted again, it continues from the ledger: finished experiments are skipped, interrupted ones go on
from their last version. Exit status: 0 all done, 1 the ledger is corrupt, 2 something could not be carried out.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.recipes import Sweep, make_trial, read_sweep
from jobs.running import ExperimentOutcome, Runner, RunOptions, check_settings, cluster_places, plain
from jobs.search import PastTrial, Trial, Trials, require_optuna, search_prefix
from jobs.session import connect, run_job, use_models
from smc.errors import ConfigError
from smc.learning.experiment import Experiment
from smc.reporting.command_line import add_models, say
from smc.storage import AsyncBlockchainModelStore

__all__ = ["absolute", "add_options", "main", "options_of", "report", "run_experiments", "run_search"]

# That commits then have to reach the ledger; whoever sends it waits 10 (Docker), 30 (a spot instance, Kubernetes). To
# spool what has not, and to leave the cluster and end, takes the process 3 more, on a busy machine longer.
_SECONDS_AFTER_SIGTERM = 5.0


async def run_experiments(
    experiments: Sequence[Experiment],
    ledger: str,
    options: RunOptions | None = None,
    *,
    concurrency: int | None = None,
) -> list[ExperimentOutcome]:
    """Train every experiment that is not finished, with progress bars; -> outcomes in the same order.

    Raises: ConfigError, Unavailable or Corrupt if the ledger cannot be appended to.
    """
    outcomes: dict[str, ExperimentOutcome] = {}
    waiting = list(experiments)

    async def next_one(runner: Runner) -> bool:
        if not waiting:
            return False
        experiment = waiting.pop(0)
        outcomes[experiment.name] = await runner.run(experiment)
        return True

    places = _Places(concurrency, max(e.num_cpus for e in experiments), max(e.num_gpus for e in experiments))
    await _run(ledger, options or RunOptions(), places, len(experiments), next_one)
    return [outcomes[experiment.name] for experiment in experiments]


async def run_search(
    sweep: Sweep, path: Path, ledger: str, options: RunOptions, *, concurrency: int | None = None
) -> list[ExperimentOutcome]:
    """Run a sweep's search: interrupted trials first, then new ones until there are enough; -> their outcomes."""
    search = sweep.search
    assert search is not None
    options = replace(options, measure=None if search.objective == "loss" else search.objective)
    prefix = search_prefix(path)
    any_trial = make_trial(sweep, f"{prefix}/any", {}, path)
    trials = Trials(prefix, search, await _past(ledger, sweep, path, any_trial))
    outcomes: list[ExperimentOutcome] = []

    async def next_one(runner: Runner) -> bool:
        trial = None if runner.stopping else trials.ask()
        if trial is None:
            return False
        try:
            experiment = make_trial(sweep, trial.name, trial.parameters, path)
        except ConfigError as error:  # parameters that do not go together: the others do
            trials.tell(trial, None)
            outcomes.append(ExperimentOutcome(any_trial.model_copy(update={"name": trial.name}), None, error))
            return True
        outcome = await runner.run(experiment, lambda p: _worse(trial, p.step, p.end, p.loss))
        value = outcome.loss if search.objective == "loss" and outcome.done else outcome.value
        trials.tell(trial, value, pruned=outcome.pruned)
        outcomes.append(replace(outcome, value=value))
        return True

    places = _Places(concurrency, any_trial.num_cpus, any_trial.num_gpus)
    await _run(ledger, options, places, search.trials, next_one)
    if (best := trials.best) is not None:
        told = ", ".join(f"{name}={value}" for name, value in best[0].items())
        print(f"best {search.objective}: {best[1]:.4g} with {told}")
    return outcomes


def _worse(trial: Trial, step: int, end: int, loss: float | None) -> bool:
    return loss is not None and trial.should_stop(step, end, loss)


async def _past(ledger: str, sweep: Sweep, path: Path, any_trial: Experiment) -> dict[str, PastTrial]:
    """The trials of a search that are in the ledger; those that are finished are measured again.

    Raises: ConfigError if one was trained with settings that are not the sweep's.
    """
    from smc.prediction.evaluation import objective_value
    from smc.serving.client import load_predictor

    assert sweep.search is not None
    objective, prefix, past = sweep.search.objective, search_prefix(path), {}
    async with AsyncBlockchainModelStore(ledger) as store:
        catalog = await store.catalog()
        for name, head in catalog.furthest.items():
            if not name.startswith(f"{prefix}/"):
                continue
            if head.parameters.keys() == sweep.search.parameters.keys():
                await check_settings(store, make_trial(sweep, name, head.parameters, path), head)
            value, end = None, head.plan_end if head.plan_end is not None else any_trial.training.num_batches
            if head.step >= end:
                value = head.loss
                if objective != "loss":
                    value = objective_value(await load_predictor(store, head), objective)
            past[name] = PastTrial([v for v in catalog.versions if v.experiment == name], end, value)
    return past


class _Places:
    """How many experiments run at a time: what was asked for, or what the cluster holds."""

    def __init__(self, asked: int | None, num_cpus: float, num_gpus: float) -> None:
        self._asked, self._num_cpus, self._num_gpus = asked, num_cpus, num_gpus

    def count(self) -> int:
        return self._asked or cluster_places(self._num_cpus, self._num_gpus)


async def _run(
    ledger: str,
    options: RunOptions,
    places: _Places,
    most: int,
    next_one: Callable[[Runner], Awaitable[bool]],
) -> None:
    """Call `next_one` in as many lanes as there are places, each until it answers that there is no more."""
    async with AsyncBlockchainModelStore(ledger) as store:
        await store.catalog()  # a ledger that cannot be read is refused before anything is started
        connect()
        from actors.ledger import ledger_actor

        actor = ledger_actor(store.uri)
        await plain(actor.prepare.remote())
        lanes = min(most, places.count())
        runner = Runner(store, actor, options)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, runner.stop, math.inf)
        loop.add_signal_handler(signal.SIGTERM, runner.stop, _SECONDS_AFTER_SIGTERM)

        async def lane() -> None:
            while await next_one(runner):
                pass

        try:
            await asyncio.gather(*(lane() for _ in range(lanes)))
        finally:
            await runner.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `train` and `sweep` share."""
    add_models(parser)
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="experiments at a time (default: what the cluster holds)"
    )
    parser.add_argument("--extend", action="store_true", help="train finished experiments further")
    parser.add_argument("--tensorboard", type=absolute, metavar="DIR", help="live metrics for TensorBoard")
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="how often to resume one whose trainer is lost (default: 3)",
    )


def options_of(arguments: argparse.Namespace) -> RunOptions:
    """What was asked for. Raises: ConfigError."""
    if arguments.restarts < 0:
        raise ConfigError(f"--restarts must be at least 0, got {arguments.restarts}")
    if arguments.concurrency is not None and arguments.concurrency < 1:
        raise ConfigError(f"--concurrency must be at least 1, got {arguments.concurrency}")
    evaluate = getattr(arguments, "evaluate", 0)
    if evaluate and evaluate < 64:
        raise ConfigError(f"--evaluate must be at least 64 contracts, or 0, got {evaluate}")
    return RunOptions(arguments.extend, arguments.tensorboard, arguments.restarts, evaluate=evaluate)


def absolute(path: str) -> Path:
    """For actors, which have a working directory of their own."""
    return Path(path).absolute()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the sweep, a YAML file")
    parser.add_argument("--ledger", help="bucket or s3://bucket/prefix (default: the file's)")
    parser.add_argument(
        "--evaluate", type=int, default=0, metavar="N", help="compare each with its oracle on N contracts, as a table"
    )
    add_options(parser)
    options = parser.parse_args(arguments)

    async def run() -> int:
        use_models(options.models)
        sweep, experiments = read_sweep(options.file)
        ledger = options.ledger or sweep.ledger
        if ledger is None:
            raise ConfigError(f"{options.file}: no ledger given: pass --ledger, or set `ledger:` in the file")
        run_options, concurrency = options_of(options), options.concurrency or sweep.concurrency
        if sweep.search is not None:
            require_optuna()
        outcomes = []
        if experiments:
            outcomes += await run_experiments(experiments, ledger, run_options, concurrency=concurrency)
        if sweep.search is not None and not any(outcome.stopped for outcome in outcomes):
            outcomes += await run_search(sweep, options.file, ledger, run_options, concurrency=concurrency)
        return report(outcomes)

    return run_job(run)


def report(outcomes: Sequence[ExperimentOutcome]) -> int:
    """Print how each experiment ended; -> 0, or 2 if one could not be carried out or was stopped."""
    for outcome in outcomes:
        say(outcome.line)
    for row in errors(outcomes):
        say(row)
    failed = sum(outcome.failed for outcome in outcomes)
    stopped = sum(outcome.stopped and not outcome.failed for outcome in outcomes)
    rest = "".join(f", {count} {what}" for what, count in (("failed", failed), ("stopped", stopped)) if count)
    print(f"{len(outcomes) - failed - stopped} of {len(outcomes)} experiments done{rest}")
    return 2 if failed or stopped else 0


# What is told of each experiment that was evaluated: a measure, and how.
_TOLD = (
    ("price", "rmse"), ("price", "maximum"), ("W2", "rmse"), ("CVaR97.5", "rmse"), ("delta", "relative"),
    ("vega", "relative"), ("gap to the upper bound", "rmse"),
)  # fmt: skip


def errors(outcomes: Sequence[ExperimentOutcome]) -> list[str]:
    """A table of what was evaluated, a line each; empty if nothing was."""
    rows = [("experiment", *(name if how != "maximum" else "at most" for name, how in _TOLD), "within bars", "unit",
             "compared with", "sound")]  # fmt: skip
    for outcome in outcomes:
        if (found := outcome.evaluated) is None:
            continue
        if isinstance(found, str):
            rows.append((outcome.experiment.name, *("" for _ in _TOLD), "", "", f"could not be compared: {found}", ""))
            continue
        cells = []
        for name, how in _TOLD:
            measure = next((m for key, m in found.measures.items() if key.partition(",")[0] == name), None)
            value = None if measure is None else getattr(measure, how)
            percent = how == "relative"
            cells.append("" if value is None else f"{100 * value:.3g} %" if percent else f"{value:.3g}")
        price = found.measures["price"]
        sound = "yes" if found.soundness.holds else f"NO: {found.soundness}"
        within = "" if found.coverage is None else f"{100 * found.coverage.share:.1f} %"
        rows.append((outcome.experiment.name, *cells, within, price.unit, price.compared, sound))
    if len(rows) == 1:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
