"""One LedgerActor under many trainers: commits a second, acknowledgements, the actor's processor time and memory.

.venv/bin/python -m benchmarks.scale [--json FILE] [--trainers 1 8 64 512] [--seconds 15]

Trainers do not train: each commits a snapshot of 1 MB, waits until it is acknowledged, and commits the next. They live
in as many processes as there are processors, and go the whole way of a real one: the object store, an upload
beside them, the actor's append. SeaweedFS is 50 ms away. A real trainer has a process of its own for uploads, here all
of one process share one; so the appends are measured alone as well, of a checkpoint that is there: that is the one
actor's work.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
import uuid
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.ledger import LedgerHandle, ledger_actor
from benchmarks.reporting import Report, memory_of, run
from benchmarks.slow_link import SlowLink
from smc.errors import Busy
from smc.storage import AsyncBlockchainModelStore
from smc.storage.dev_server import DevServer
from smc.storage.spool import CommitRecord

SNAPSHOT = 1_000_000
LATENCY = 0.05


@ray.remote(num_cpus=1, max_concurrency=4)
class Crowd:
    """Some simulated trainers in one process. They share one process that uploads: 512 would need the memory."""

    async def open(self, handle: LedgerHandle) -> None:
        self._stack = AsyncExitStack()
        self._committer = await self._stack.enter_async_context(handle.committer())

    async def close(self) -> None:
        await self._stack.aclose()

    async def commit(
        self, handle: LedgerHandle, names: list[str], until: float, there: tuple[str, int] | None
    ) -> list[float]:
        """Seconds of every acknowledgement, until a moment (time.time); appends alone, if a checkpoint is `there`."""
        taken: list[float] = []
        committer = self._committer

        async def trainer(name: str) -> None:
            draw = np.random.default_rng(list(name.encode()))
            step = 0
            while time.time() < until:
                step += 1
                snapshot = draw.bytes(SNAPSHOT if there is None else 0)
                started = time.perf_counter()
                if there is None:
                    placed = await committer.put(memoryview(snapshot))
                    content_hash, size = await patiently(committer.upload, placed)
                else:
                    content_hash, size = there
                record = CommitRecord(ledger=handle.uri, message="", step=step, loss=None, experiment=name)
                await patiently(committer.append, record, content_hash, size)
                taken.append(time.perf_counter() - started)

        await asyncio.gather(*(trainer(name) for name in names))
        return taken


async def patiently(call: Any, *arguments: Any) -> Any:
    while True:
        try:
            return await call(*arguments)
        except Busy as busy:
            await asyncio.sleep(busy.retry_after)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def upload_processes() -> list[int]:
    """Their pids: Ray names a process after its actor."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended just now
            if (folder / "cmdline").read_bytes().startswith(b"ray::Upload"):
                found.append(int(folder.name))
    return found


def measure(report: Report, options: argparse.Namespace) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    processes = os.cpu_count() or 2
    with tempfile.TemporaryDirectory() as folder, DevServer(Path(folder), buckets=("scale",)) as server:
        os.environ.update(server.environment)
        with SlowLink(server.endpoint_url, latency=LATENCY, megabytes=1000) as link:
            os.environ["AWS_ENDPOINT_URL"] = link.url
            ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=4 * processes)
            try:
                crowds = [Crowd.remote() for _ in range(processes)]
                for alone in (False, True):
                    for count in options.trainers:
                        one_size(report, crowds, count, options.seconds, alone=alone)
            finally:
                ray.shutdown()


def one_size(report: Report, crowds: list[Any], count: int, seconds: float, *, alone: bool) -> None:
    uri = f"s3://scale/{uuid.uuid4().hex}"
    actor = ledger_actor(uri)
    ray.get(actor.prepare.remote())
    handle = LedgerHandle(uri, actor)

    async def uploaded() -> tuple[str, int]:
        async with AsyncBlockchainModelStore(uri) as store:
            return await store.upload(os.urandom(SNAPSHOT))

    there = asyncio.run(uploaded()) if alone else None
    names = [f"trainer-{i}" for i in range(count)]

    def commits(lasting: float) -> list[float]:
        until = time.time() + lasting
        groups = [names[i :: len(crowds)] for i in range(len(crowds))]
        found = ray.get(
            [crowd.commit.remote(handle, group, until, there) for crowd, group in zip(crowds, groups, strict=True)]
        )
        return [value for part in found for value in part]

    ray.get([crowd.open.remote(handle) for crowd in crowds])
    commits(3.0)
    pid = ray.get(actor.status.remote())["pid"]
    cpu, resident = processor_seconds(pid), memory_of(pid) / 1e6
    started = time.perf_counter()
    taken = commits(seconds)
    lasted = time.perf_counter() - started
    cpu_after, resident_after = processor_seconds(pid), memory_of(pid) / 1e6
    # Not the object store, whose pages count for every process that read them.
    uploaders = [memory_of(pid, "RssAnon") / 1e6 for pid in upload_processes()]
    ray.get([crowd.close.remote() for crowd in crowds])
    name = f"{count} trainers, appends alone" if alone else f"{count} trainers"
    report.add(f"{name}: commits", len(taken) / lasted, "1/s")
    report.add(f"{name}: acknowledgement, median", 1e3 * float(np.median(taken)), "ms")
    report.add(f"{name}: acknowledgement, 99 %", 1e3 * float(np.quantile(taken, 0.99)), "ms")
    report.add(f"{name}: actor's processor time of a commit", 1e3 * (cpu_after - cpu) / len(taken), "ms")
    report.add(f"{name}: of one processor", 100 * (cpu_after - cpu) / lasted, "%")
    report.add(f"{name}: actor's resident memory", resident_after, "MB")
    report.add(f"{name}: its growth", resident_after - resident, "MB")
    if not alone:
        report.add(f"{name}: bytes committed meanwhile", len(taken) * SNAPSHOT / 1e6, "MB")
        report.add(f"{name}: a process that uploads, memory of its own", float(np.mean(uploaders)), "MB")

    async def check() -> None:
        async with AsyncBlockchainModelStore(uri) as store:
            assert (await store.verify()).ok
            assert len(await store.list_versions()) >= len(taken)

    asyncio.run(check())
    ray.kill(actor)


if __name__ == "__main__":
    run(
        "One LedgerActor, many trainers",
        measure,
        ("--trainers", {"type": int, "nargs": "+", "default": [1, 8, 64, 512]}),
        ("--seconds", {"type": float, "default": 15.0, "help": "that each size is measured for"}),
    )
