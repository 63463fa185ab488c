"""A ledger's history as TensorBoard runs: one for each experiment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX.summary import hparams

from smc.errors import ConfigError, Corrupt, NotFound, NumericsError
from smc.reporting.history import settings_of
from smc.reporting.pictures import draw_errors, draw_quantiles
from smc.reporting.report import Measured, measured
from smc.reporting.training_tensorboard import EventWriter, folder_name
from smc.storage.chain import ModelVersion
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["write_history"]

logger = logging.getLogger("smc.storage")

# Ends the name of every file that is written here, so that it can be written anew.
_SUFFIX = ".ledger"
_CONTRACTS = 1024
# Settings in the table, in this order, by what they are called there.
_SETTINGS = {"plan.config.": "training.", "network.": "network.", "simulation.": "simulation."}


async def write_history(store: AsyncBlockchainModelStore, log_dir: Path) -> dict[str, int]:
    """Write loss, metrics and commit seconds of every version, settings and a picture of each experiment's newest one.

    Written again, it replaces what it wrote. -> versions by experiment.
    """
    catalog = await store.catalog()
    if catalog.head is None:
        raise NotFound(f"{store.uri} has no versions")
    counts: dict[str, int] = {}
    for experiment, head in catalog.heads.items():
        directory = log_dir / folder_name(experiment)
        for old in directory.glob(f"*{_SUFFIX}"):
            old.unlink()
        versions = [v for v in catalog.versions if v.experiment == experiment]
        counts[experiment] = len(versions)
        with EventWriter(directory, _SUFFIX) as writer:
            for version in versions:
                _add(writer, version)
            await _add_newest(writer, store, head)
    return counts


def _add(writer: EventWriter, version: ModelVersion) -> None:
    at = version.timestamp.timestamp()
    if version.loss is not None:
        writer.add_scalar("loss/by_step", version.loss, version.step, walltime=at)
        writer.add_scalar("loss/by_version", version.loss, version.counter, walltime=at)
    for name, value in version.metrics.items():
        tag = "commit/seconds" if name == "commit_seconds" else f"metrics/{name}"
        writer.add_scalar(tag, value, version.step, walltime=at)


async def _add_newest(writer: EventWriter, store: AsyncBlockchainModelStore, head: ModelVersion) -> None:
    outcome: dict[str, float] = {} if head.loss is None else {"outcome/loss": head.loss}
    try:
        header, _ = await store.load_model(head)
        known = settings_of(header)
        settings = {
            name.replace(prefix, shown, 1): value
            for prefix, shown in _SETTINGS.items()
            for name, value in known.items()
            if name.startswith(prefix)
        }
        found = await measured(store, head, _CONTRACTS)
    except (NotFound, ConfigError, Corrupt, NumericsError) as error:
        logger.warning("%s: no settings and no picture: %s", head.version_id, error)
        return
    outcome |= {f"outcome/{m.name}, RMSE": m.rmse for m in found.measures.values()}
    plain = {
        name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in settings.items()
    }
    for summary in hparams(plain, outcome):
        writer.file_writer.add_summary(summary)
    for name, value in outcome.items():
        writer.add_scalar(name, value, head.step, walltime=head.timestamp.timestamp())
    writer.add_image("learnt and exact", _picture(found), head.step, dataformats="HWC")


def _picture(found: Measured) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Shapes: -> (height, width, 3)."""
    drawn = Figure(figsize=(12.5, 4.5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    error = found.measures["price"]
    problem = found.predictor.problem
    label = f"learnt minus {error.known} price, {error.unit}"
    draw_errors(left, found.contracts, error.errors, label, problem)
    left.set_title(f"{found.version.version_id}, step {found.version.step}: RMSE {error.rmse:.2f} bp", fontsize=9)
    _, chosen = found.chosen()
    draw_quantiles(right, chosen[0], found.predictor.predict_distribution(chosen[:1]).host_levels[0], problem)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]
