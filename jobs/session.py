"""What every job needs: a Ray cluster, one line for an error, an exit status."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from smc.errors import ConfigError
from smc.problem.models import load_models
from smc.reporting.command_line import exit_status

__all__ = ["connect", "names_of_actors", "run_job", "use_models"]


def connect(*, start: bool = True) -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one on this machine.

    Without `start`, join the one that `ray start` started on this machine.
    Raises: ConfigError if there is none to join.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or ("local" if start else _running_here())
    if address == "local":
        # A cluster of this process alone: a bare ray.init() would write a token to the user's home and
        # leave other commands locked out.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    elif address != "auto" and "://" not in address:
        _check_answers(address)
    elif address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard's, which `ray job submit` talks to; a job that is run by itself "
            "joins a cluster by its head's HOST:PORT, 6379 by default"
        )
    for_programs = os.environ.get("SMC_LOG_JSON") == "1"
    if for_programs:  # one line a message: Ray would write "repeated 2x" behind it
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if ray.is_initialized():
        return
    # Of the driver, and of every actor and task, with job and actor ids.
    as_json = ray.LoggingConfig(encoding="JSON", log_level="WARNING") if for_programs else None
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, logging_config=as_json)


def _running_here() -> str:
    """The address of the head that `ray start` last started on this machine, from where Ray keeps it."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  as Ray does
    path = Path(folder, "ray", "ray_current_cluster")
    try:
        return path.read_text().strip()
    except OSError:
        raise ConfigError(
            "no Ray cluster runs on this machine; RAY_ADDRESS is another's, its head's HOST:PORT"
        ) from None


def _check_answers(address: str) -> None:
    """Raises: ConfigError if nothing listens there: Ray would try for minutes before it said so."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"RAY_ADDRESS={address} is not HOST:PORT of a head, like 127.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"no Ray cluster at {address}: {reason}; set RAY_ADDRESS to one's") from None


def names_of_actors(kind: str) -> list[str]:
    """The names of this project's actors that begin with `kind`, from GCS: the dashboard need not be reachable."""
    from ray.util import list_named_actors

    from actors.ledger import NAMESPACE

    found = list_named_actors(all_namespaces=True)
    return [a["name"] for a in found if a["namespace"] == NAMESPACE and a["name"].startswith(kind)]


def use_models(paths: Sequence[Path]) -> None:
    """Register what the files hold, here and in every actor that is sent some of it. Raises: ConfigError."""
    for path in paths:
        module = load_models(path)
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(module)  # an actor's process cannot import it


def run_job(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a job; -> 0 done, 1 corrupt ledger or failed experiment, 2 it could not be carried out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_status(lambda: asyncio.run(main()))
