"""The examples run as scripts, against a real S3 server, and end with what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from smc.storage.dev_server import DevServer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> DevServer:  # type: ignore[misc]
    buckets = ("my-model-bucket", "prod-models", "experiments-2025", "my-models")
    with DevServer(tmp_path_factory.mktemp("examples"), buckets=buckets) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        (
            "training_with_blockchain_storage",
            [
                r"✓ Committed version 0: [0-9a-f]{8}\n  Message: Training complete: step=200, loss=0\.\d{4}\n"
                r"Global step: 200\nOptimizer state preserved: True\n$"
            ],
        ),
        (
            "production_pipeline",
            [r"Starting training...\n✓ Training complete\n  Final version: 3\n  Total checkpoints: 4\n$"],
        ),
        (
            "experiment_tracking",
            [
                r"All experiments:\n  v0: \[baseline\] lr=0.001, batch=32, loss=0\.\d{4}\n"
                r"  v1: \[high_lr\] lr=0.01, batch=32, loss=0\.\d{4}\n"
                r"  v2: \[large_batch\] lr=0.001, batch=128, loss=0\.\d{4}\n$"
            ],
        ),
        pytest.param(
            "training_resume",
            [
                r"No previous checkpoint, starting fresh\n✓ Training resumed, now at v1\n$",
                r"Resuming from checkpoint v1\n✓ Training resumed, now at v3\n$",
            ],
            marks=pytest.mark.long,
        ),
    ],
)
@pytest.mark.service
def test_an_example_ends_with_what_it_promises(name: str, endings: list[str], server: DevServer) -> None:
    for ending in endings:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py")],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **server.environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert re.search(ending, done.stdout), done.stdout
