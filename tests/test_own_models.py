"""A process and a product of one's own, in a script outside the package: sweep, ledger, evaluation, serving."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smc.storage.dev_server import DevServer

pytestmark = pytest.mark.long
EXAMPLES = Path(__file__).parents[1] / "examples"
ENDS = re.compile(
    r"2 of 2 experiments done\n(.*\n)*1 of 1 experiments done\n"
    r"fast: v0000000008, step 120\nslow: v000000000\d, step 60\n"
    r"price 1\d\.\d, CVaR97\.5 \d\d, dP/da -\d\.\d, dP/dv \d\d\n"
    r"RMSE \d+ bp of spot over 32 contracts, simulated, 2\^\d\d paths, standard error [\d.]+ bp of spot\n$"
)


@pytest.fixture(scope="module")
def printed(seaweed: DevServer) -> str:
    """What the example prints, which leaves a ledger behind."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **seaweed.environment}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("RAY_")}  # as other tests' Ray
    command = [sys.executable, str(EXAMPLES / "own_models.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_a_model_of_ones_own_goes_through_everything(printed: str) -> None:
    assert ENDS.search(printed), printed


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("printed")
def test_a_ledger_of_ones_own_models_is_read_by_whoever_names_their_file(seaweed: DevServer) -> None:
    """And verified by everybody: what a checkpoint is about is no matter of its hash."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **seaweed.environment}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "smc.storage", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    assert run("verify", "s3://my-models/own", "--blobs").returncode == 0
    refused = run("inspect", "s3://my-models/own")
    assert refused.returncode == 2
    assert "there is no process of the kind 'mean_reverting'" in refused.stderr
    assert "commands take its file as --models FILE" in refused.stderr
    shown = run("inspect", "s3://my-models/own", "--models", str(EXAMPLES / "mean_reverting.py"))
    assert shown.returncode == 0, shown.stderr
    assert '"product":{"kind":"range_option","dates":4}' in shown.stdout
