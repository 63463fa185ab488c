"""What runs on a cluster: its ledgers and experiments, in a table.

python -m jobs.status                            # of the cluster on this machine
RAY_ADDRESS=head:6379 python -m jobs.status
ray job submit -- python -m jobs.status
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.session import connect, names_of_actors, run_job

__all__ = ["main"]

_SECONDS = 5.0
_EXPERIMENT = ("experiment", "ledger", "step", "of", "loss", "contracts/s", "commits pending")
_LEDGER = ("ledger", "head", "queue", "uploading", "commits/s", "committed", "replaced", "failed")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.status", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)

    async def run() -> int:
        connect(start=False)
        found = await running()
        if options.json:
            print(json.dumps(found, indent=1))
            return 0
        _print(_LEDGER, [_of_ledger(name, status) for name, status in sorted(found["ledgers"].items())])
        print()
        _print(_EXPERIMENT, [_of_experiment(name, p) for name, p in sorted(found["experiments"].items())])
        return 0

    return run_job(run)


async def running() -> dict[str, dict[str, Any]]:
    """What every LedgerActor and every TrainerActor says of itself, by name; None for one that does not answer."""
    import ray

    from actors.ledger import NAMESPACE

    async def asked(name: str, method: str) -> Any:
        try:
            actor = ray.get_actor(name, NAMESPACE)
            return await asyncio.wait_for(getattr(actor, method).remote(), _SECONDS)
        except (ray.exceptions.RayError, ValueError, TimeoutError):  # it is starting, busy, or just gone
            return None

    ledgers = [name.removeprefix("ledger:") for name in names_of_actors("ledger:")]
    trainers = [name.removeprefix("trainer:") for name in names_of_actors("trainer:")]
    statuses = await asyncio.gather(*(asked(f"ledger:{name}", "status") for name in ledgers))
    progress = await asyncio.gather(*(asked(f"trainer:{name}", "progress") for name in trainers))
    said = [asdict(p) if p is not None else None for p in progress]
    return {
        "ledgers": dict(zip(_shortened(ledgers), statuses, strict=True)),
        "experiments": dict(zip(_shortened(trainers), said, strict=True)),
    }


def _shortened(names: Sequence[str]) -> list[str]:
    """Names without the address of their server, unless two differ in that alone."""
    short = [re.sub(r"@https?%3A%2F%2F[^:/@]*", "", name) for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def _of_ledger(name: str, status: Mapping[str, Any] | None) -> tuple[str, ...]:
    if status is None:
        return (name, "no answer", *[""] * (len(_LEDGER) - 2))
    counts = [str(status[key]) for key in ("committed", "replaced", "failed")]
    rate = f"{status['commits_per_s']:.1f}"
    return name, status["head"] or "empty", str(status["queue_depth"]), str(status["uploading"]), rate, *counts


def _of_experiment(name: str, progress: Mapping[str, Any] | None) -> tuple[str, ...]:
    ledger, _, experiment = name.rpartition(":")
    if progress is None or progress["loss"] is None:
        return (experiment, ledger, "starting", *[""] * (len(_EXPERIMENT) - 3))
    rate, pending = f"{progress['contracts_per_second']:.0f}", str(progress["commits_pending"])
    return experiment, ledger, str(progress["step"]), str(progress["end"]), f"{progress['loss']:.3e}", rate, pending


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in _or_none(columns, rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _or_none(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    yield columns
    yield from rows or [("none", *[""] * (len(columns) - 1))]


if __name__ == "__main__":
    sys.exit(main())
