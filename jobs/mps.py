"""NVIDIA's Multi-Process Service: processes that share a GPU run on it side by side instead of in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from smc.errors import ConfigError

__all__ = ["CONTROL", "mps"]

CONTROL: Final = "nvidia-cuda-mps-control"
_SECONDS: Final = 20.0


@contextmanager
def mps() -> Iterator[dict[str, str]]:
    """Run the service; -> the environment of the processes that are to use it.

    Raises: ConfigError if it is not installed or does not start.
    """
    if shutil.which(CONTROL) is None:
        raise ConfigError(f"NVIDIA's MPS is not installed here: there is no {CONTROL}, which comes with the driver")
    with tempfile.TemporaryDirectory(prefix="smc-mps-", ignore_cleanup_errors=True) as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in own.values():
            Path(path).mkdir()
        environment = os.environ | own
        # Its output goes nowhere: the daemon keeps what it was given open.
        started = subprocess.run(
            [CONTROL, "-d"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
        if started.returncode:
            log = Path(folder, "log", "control.log")
            said = log.read_text().strip().splitlines()[-1:] if log.exists() else []
            raise ConfigError(f"NVIDIA's MPS did not start (status {started.returncode}): {' '.join(said)}")
        try:
            yield own
        finally:
            with suppress(subprocess.SubprocessError, OSError):  # it waits for its clients, and ends with the node
                subprocess.run([CONTROL], env=environment, input=b"quit\n", timeout=_SECONDS, check=False)
