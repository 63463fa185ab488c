"""Runs a Ray node that may be taken away: what it trains is committed before it goes.

    python -m jobs.node [--spot] [--mps] -- ray start --address=head:6379 --block

On SIGTERM, or with --spot on EC2's notice of two minutes, the node takes no new work, every trainer on it stops with
a final commit, and then Ray is ended. The driver resumes those experiments on other nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from jobs.mps import mps
from jobs.running import plain
from jobs.session import names_of_actors, run_job
from smc.errors import NotFound

__all__ = ["main", "spot_notice"]

logger = logging.getLogger("smc.jobs")

_METADATA: Final = "http://169.254.169.254/latest"
_NOTICE_SECONDS: Final = 5.0
# Of the 30 s that a spot instance or a container has after SIGTERM: for commits, and for Ray to end.
_COMMIT_SECONDS: Final = 15.0
_END_SECONDS: Final = 5.0
# How long trainers wait for the node to be kept from new work before they are stopped anyway.
_DRAIN_SECONDS: Final = 4.0
# A trainer that has not begun does not answer.
_ANSWER_SECONDS: Final = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status, that of Ray where it ended by itself."""
    parser = argparse.ArgumentParser(prog="python -m jobs.node", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spot", action="store_true", help="watch for EC2's notice that the instance is taken away")
    parser.add_argument("--mps", action="store_true", help="let experiments that share a GPU run on it side by side")
    parser.add_argument("--metadata", default=_METADATA, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- ray start ... --block")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or "--block" not in command:
        parser.error("give the command that starts the node: -- ray start --address=HEAD:PORT --block")

    async def run() -> int:
        with ExitStack() as stack:
            environment = stack.enter_context(mps()) if options.mps else {}
            return await _run(command, environment, options.metadata if options.spot else None)

    return run_job(run)


async def _run(command: Sequence[str], environment: Mapping[str, str], metadata: str | None) -> int:
    leaving = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, leaving.set)
    loop.add_signal_handler(signal.SIGINT, leaving.set)
    # A session of its own: whoever ends this process's group must not end Ray before the commits are made.
    node = await asyncio.create_subprocess_exec(*command, env=os.environ | environment, start_new_session=True)
    ended = asyncio.ensure_future(node.wait())
    tasks: set[asyncio.Future[Any]] = {ended, asyncio.ensure_future(leaving.wait())}
    if metadata is not None:
        tasks.add(asyncio.ensure_future(_noticed(metadata)))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        return node.returncode or 0
    try:
        await asyncio.wait_for(_commit_everything(_node_id(node.pid)), _COMMIT_SECONDS + _END_SECONDS)
    except Exception:  # Ray may be half gone: then it has to go as it is
        logger.exception("not every trainer could be stopped")
    with suppress(ProcessLookupError):  # it has ended by itself meanwhile
        node.terminate()
        await asyncio.wait({ended}, timeout=_END_SECONDS)
        if not ended.done():
            os.killpg(node.pid, signal.SIGKILL)
    await ended
    return 0


async def _commit_everything(node_id: str) -> None:
    """Keep new work away from a node, and stop its trainers with a final commit."""
    import ray

    from actors.ledger import NAMESPACE

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="auto", namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    drained = asyncio.ensure_future(asyncio.to_thread(_drain, node_id))
    try:
        # A command of Ray's takes seconds to start where all is busy; commits are what must not wait for it.
        await asyncio.wait({drained}, timeout=_DRAIN_SECONDS)
        # By name and not through the dashboard's state API, which answers on the head's loopback alone.
        asked = (_on_node(name, node_id) for name in names_of_actors("trainer:"))
        trainers = [trainer for trainer in await asyncio.gather(*asked) if trainer is not None]
        logger.warning("this node is about to go: %d trainers stop with a final commit", len(trainers))
        stops = (plain(trainer.stop.remote(_COMMIT_SECONDS)) for trainer in trainers)
        await asyncio.gather(*stops, return_exceptions=True)
        await asyncio.gather(*(_is_done(trainer) for trainer in trainers), return_exceptions=True)
        await drained
    finally:
        ray.shutdown()


async def _on_node(name: str, node_id: str) -> Any:
    """The trainer of this name if it runs on the node; None if it does not, is gone, or has not begun."""
    import ray

    from actors.ledger import NAMESPACE

    try:
        trainer = ray.get_actor(name, NAMESPACE)
        its = await asyncio.wait_for(trainer.node_id.remote(), _ANSWER_SECONDS)
    except (ValueError, TimeoutError, ray.exceptions.RayError):
        return None
    return trainer if its == node_id else None


def _node_id(pid: int) -> str:
    """The id of the node that a `ray start --block` runs: its raylet was given it."""
    waiting = [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        with suppress(OSError):  # it has ended just now
            for argument in (process / "cmdline").read_text().split("\0"):
                if argument.startswith("--node_id="):
                    return argument.removeprefix("--node_id=")
            for children in process.glob("task/*/children"):
                waiting += [int(child) for child in children.read_text().split()]
    raise NotFound(f"process {pid} runs no Ray node")


def _drain(node_id: str) -> None:
    """So that an experiment that is resumed is not resumed here."""
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "it is taken away"]
    until = ["--deadline-remaining-seconds", str(int(_COMMIT_SECONDS + _END_SECONDS))]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node_id, *why, *until]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        logger.warning("the node could not be drained within %g s", _COMMIT_SECONDS)
        return
    if done.returncode:
        logger.warning("the node could not be drained: %s", done.stderr.strip().splitlines()[-1:])


async def _is_done(trainer: Any) -> None:
    """Return when a trainer has ended training, with what it committed, or is gone."""
    while True:
        progress = await trainer.progress.remote()
        if progress is None or not progress.training:
            return
        await asyncio.sleep(0.1)


async def _noticed(metadata: str) -> None:
    """Return when EC2 says that the instance is taken away."""
    while not await asyncio.to_thread(lambda: spot_notice(metadata)):  # noqa: ASYNC110  nobody else tells
        await asyncio.sleep(_NOTICE_SECONDS)


def spot_notice(metadata: str = _METADATA) -> bool:
    """Whether EC2's metadata service (IMDSv2) has a notice for this instance."""
    try:
        request = urllib.request.Request(f"{metadata}/api/token", method="PUT")
        request.add_header("X-aws-ec2-metadata-token-ttl-seconds", "60")
        with urllib.request.urlopen(request, timeout=2) as answer:
            token = answer.read().decode()
        request = urllib.request.Request(f"{metadata}/meta-data/spot/instance-action")
        request.add_header("X-aws-ec2-metadata-token", token)
        with urllib.request.urlopen(request, timeout=2):
            return True
    except OSError:  # 404: no notice; or no EC2
        return False


if __name__ == "__main__":
    sys.exit(main())
