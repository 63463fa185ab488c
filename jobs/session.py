"""What every job needs: a Ray cluster, one line for an error, an exit status."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

from smc.command_line import exit_status

__all__ = ["connect", "names_of_actors", "run_job"]


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        # A cluster of this process alone: a bare ray.init() would write a token to the user's home and
        # leave other commands locked out.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    for_programs = os.environ.get("SMC_LOG_JSON") == "1"
    if for_programs:  # one line a message: Ray would write "repeated 2x" behind it
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if ray.is_initialized():
        return
    # Of the driver, and of every actor and task, with job and actor ids.
    as_json = ray.LoggingConfig(encoding="JSON", log_level="WARNING") if for_programs else None
    ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=True, logging_config=as_json)


def names_of_actors(kind: str) -> list[str]:
    """The names of this project's actors that begin with `kind`, from GCS: the dashboard need not be reachable."""
    from ray.util import list_named_actors

    from actors.ledger import NAMESPACE

    found = list_named_actors(all_namespaces=True)
    return [a["name"] for a in found if a["namespace"] == NAMESPACE and a["name"].startswith(kind)]


def run_job(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a job; -> 0 done, 1 corrupt ledger or failed experiment, 2 it could not be carried out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_status(lambda: asyncio.run(main()))
