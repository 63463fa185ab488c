"""The logger writes what training reports, while it trains."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.learning.pricer import GbmCVNNPricer, StepReport
from smc.reporting.training_tensorboard import TensorBoardLogger, folder_name
from tests.conftest import small_config, small_training
from tests.event_files import events


def test_loss_rate_gradient_norm_and_speed_are_those_of_training(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    norms: dict[int, float] = {}
    pricer = GbmCVNNPricer(small_config())
    with TensorBoardLogger(tmp_path, pricer.model, every=3, histograms_every=10) as logger:

        def both(report: StepReport) -> None:
            reports.append(report)
            gradients = torch.cat([p.grad.flatten() for p in pricer.model.parameters() if p.grad is not None])
            norms[report.step] = float(gradients.norm())
            logger(report)

        pricer.train(small_training(31), logger=both)
    found = events(tmp_path)
    steps = list(range(1, 32, 3))
    by_step = {report.step: report for report in reports}
    assert list(found["train/loss"]) == steps
    for step in steps:
        assert found["train/loss"][step] == np.float32(by_step[step].loss)
        assert found["train/learning_rate"][step] == np.float32(by_step[step].learning_rate)
        assert found["train/gradient_norm"][step] == pytest.approx(norms[step], rel=1e-5)
    assert list(found["train/batch_seconds"]) == steps[1:]
    for before, step in pairwise(steps):
        one, other = by_step[before], by_step[step]
        seconds = other.seconds - one.seconds
        assert found["train/batch_seconds"][step] == pytest.approx(seconds / 3, rel=1e-5)
        rate = (other.contracts - one.contracts) / seconds
        assert found["train/contracts_per_second"][step] == pytest.approx(rate, rel=1e-5)
    histogram = found["parameters/layers.0.weight"]
    assert list(histogram) == [10, 22]
    assert histogram[10].num == pricer.model.get_parameter("layers.0.weight").numel()
    assert "gradients/layers.0.weight" in found


def test_values_are_there_before_training_ends(tmp_path: Path) -> None:
    pricer = GbmCVNNPricer(small_config())
    seen: list[int] = []
    logger = TensorBoardLogger(tmp_path, every=1)

    def watched(report: StepReport) -> None:
        logger(report)
        if report.step == 20:
            logger._writer.flush()
            seen.extend(events(tmp_path)["train/loss"])

    pricer.train(small_training(21), logger=watched)
    logger.close()
    assert seen[:15] == list(range(1, 16))  # the newest may still be on its way to the disk
    assert "train/gradient_norm" not in events(tmp_path)  # it was given no model


def test_a_second_run_of_training_is_not_taken_for_a_step(tmp_path: Path) -> None:
    pricer = GbmCVNNPricer(small_config())
    with TensorBoardLogger(tmp_path, every=1) as logger:
        pricer.train(small_training(3), logger=logger)
        pricer.train(small_training(3), logger=logger)
    found = events(tmp_path)
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(found["train/batch_seconds"]) == [2, 3, 5, 6]


@pytest.mark.parametrize(("every", "histograms"), [(0, 1), (1, 0)])
def test_an_interval_below_one_is_refused(tmp_path: Path, every: int, histograms: int) -> None:
    with pytest.raises(ConfigError, match="every and histograms_every must be at least 1"):
        TensorBoardLogger(tmp_path, every=every, histograms_every=histograms)


def test_an_experiments_folder_is_inside_and_its_own() -> None:
    names = ["baseline", "sweep/lr=0.1", "sweep_lr=0.1", "../../etc", "..", "", "a b", "a_b", "ä", "no experiment"]
    folders = [folder_name(name) for name in names]
    assert folders[0] == "baseline"
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and folder.strip(".") for folder in folders)
