"""The ledger against what its server allows: group commit, overhead, long ledgers, large checkpoints, other writers.

.venv/bin/python -m benchmarks.ledger [--json FILE] [--only abcdef] [--mebibytes 1024]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiobotocore.session import get_session

from benchmarks.reporting import Report, memory_of, run
from smc.storage import AsyncBlockchainModelStore
from smc.storage.chain import Draft, Tail, block_key, build_block, parse_block
from smc.storage.dev_server import DevServer
from smc.storage.objects import MemoryObjectStore, ObjectInfo, ObjectStore
from smc.storage.s3 import S3ObjectStore
from smc.storage.spool import CommitRecord

SUBMITTERS = 64
FILLING = os.urandom(64 * 1024 - 16)  # of a 64 KiB snapshot, beside 16 bytes of its own


class Latency:
    """Adds a round trip's time to every request of a real store."""

    def __init__(self, inner: ObjectStore, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes | bytearray:
        await asyncio.sleep(self._seconds)
        return await self._inner.get(key, size, on_bytes)

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        await asyncio.sleep(self._seconds)
        return await self._inner.get_if_changed(key, etag)

    async def put(self, key: str, data: bytes | bytearray) -> None:
        await asyncio.sleep(self._seconds)
        await self._inner.put(key, data)

    async def create(self, key: str, data: bytes) -> None:
        await asyncio.sleep(self._seconds)
        await self._inner.create(key, data)

    async def stat(self, key: str) -> ObjectInfo:
        await asyncio.sleep(self._seconds)
        return await self._inner.stat(key)

    async def delete(self, key: str) -> None:
        await asyncio.sleep(self._seconds)
        await self._inner.delete(key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        count = 0
        async for info in self._inner.list(prefix):
            if count % 1000 == 0:  # a page
                await asyncio.sleep(self._seconds)
            count += 1
            yield info


def store_on(objects: ObjectStore, ledger: str) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore(ledger, objects=objects)


def record(step: int) -> CommitRecord:
    return CommitRecord(ledger="x", message=f"step {step}", step=step, loss=0.5)


async def commits(store: AsyncBlockchainModelStore, each: int, submitters: int) -> tuple[float, list[float]]:
    """Commits/s and the seconds of every acknowledgement, with so many submitters at a time."""
    seconds: list[float] = []

    async def submitter() -> None:
        for step in range(each):
            data = uuid.uuid4().bytes + FILLING
            started = time.perf_counter()
            await store.commit(data, record(step))
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(submitter() for _ in range(submitters)))
    return submitters * each / (time.perf_counter() - started), seconds


async def group_commit(report: Report) -> None:
    """The protocol under latency alone, then with a real server and its client on the same cores."""
    latency = 0.05
    async with S3ObjectStore("spectralmc", f"{uuid.uuid4().hex}/") as objects:
        for where, inner in (("memory", MemoryObjectStore()), ("SeaweedFS", objects)):
            ratios, p99s, raw_p99s = [], [], []
            for _ in range(3):
                slow = Latency(inner, latency)
                async with store_on(slow, "s3://spectralmc/a") as store:
                    await store.ledger.prepare()
                    await commits(store, 2, SUBMITTERS)
                    alone, _ = await commits(store, 12, 1)
                    rate, seconds = await commits(store, 12, SUBMITTERS)
                    ratios.append(rate / alone)
                    p99s.append(_p99(seconds) / latency)
                raw_p99s.append(_p99(await _raw_puts(slow, 12)) / latency)
            # A real server's p99 is that of its client's processor time: 64 raw PUTs at a time show how much.
            report.add(
                f"(a) 64 submitters, 50 ms, {where}: against one at a time", statistics.median(ratios), "x", at_least=15
            )
            report.add(
                f"(a) p99 acknowledgement, {where}", statistics.median(p99s), "round trips",
                at_most=4 if where == "memory" else None,
            )  # fmt: skip
            report.add(f"(a) p99 of one raw PUT, 64 at a time, {where}", statistics.median(raw_p99s), "round trips")


async def _raw_puts(objects: ObjectStore, each: int) -> list[float]:
    seconds = []

    async def raw() -> None:
        for _ in range(each):
            started = time.perf_counter()
            await objects.create(f"raw/{uuid.uuid4().hex}", uuid.uuid4().bytes + FILLING)
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(raw() for _ in range(SUBMITTERS)))
    return seconds


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))]


async def overhead(report: Report) -> None:
    each = 12
    ratios = []
    async with S3ObjectStore("spectralmc", f"{uuid.uuid4().hex}/") as objects:
        for _ in range(5):
            started = time.perf_counter()
            await _raw_puts(objects, each)
            raw_rate = SUBMITTERS * each / (time.perf_counter() - started)
            async with store_on(objects, "s3://spectralmc/b") as store:
                await store.ledger.prepare()
                rate, _ = await commits(store, each, SUBMITTERS)
            ratios.append(rate / raw_rate)
    report.add(
        "(b) commits against raw conditional PUTs of the bytes", 100 * statistics.median(ratios), "%", at_least=70
    )


async def long_ledger(report: Report) -> None:
    versions, latency = 10_000, 0.02
    for width, name in ((1, "one entry a block"), (32, "32 entries a block")):
        async with S3ObjectStore("spectralmc", f"{uuid.uuid4().hex}/") as objects:
            tail, number = Tail(), 0
            writes = []
            while tail.counter < versions:
                drafts = []
                for _ in range(min(width, versions - tail.counter)):
                    payload = {
                        "content_hash": f"{0:064x}", "size": 3, "experiment": f"e{number % 5}", "step": number,
                        "loss": 0.1, "metrics": {}, "message": f"step={number}", "resumed_from": None,
                    }  # fmt: skip
                    drafts.append(Draft("commit", uuid.uuid4().hex, payload))
                    number += 1
                data = build_block(tail, drafts)
                writes.append((block_key(tail.block), data))
                tail = tail.after(parse_block(tail.block, data))
            for start in range(0, len(writes), 64):
                await asyncio.gather(*(objects.put(key, data) for key, data in writes[start : start + 64]))
            await objects.put(f"blobs/{0:064x}.safetensors", b"abc")
            async with store_on(objects, "s3://spectralmc/c") as store:  # a writer leaves head and indexes
                await store.ledger.prepare()
            times: dict[str, list[float]] = {"open": [], "list": [], "verify entries": []}
            for _ in range(3):
                calls: dict[str, Callable[[AsyncBlockchainModelStore], Awaitable[Any]]] = {
                    "open": lambda s: s.get_head(),
                    "list": lambda s: s.list_versions(),
                    "verify entries": lambda s: s.verify(),
                }
                for what, call in calls.items():
                    async with store_on(Latency(objects, latency), "s3://spectralmc/c") as store:
                        started = time.perf_counter()
                        result = await call(store)
                        times[what].append(time.perf_counter() - started)
                        if what == "list":
                            assert len(result) == versions
                        if what == "verify entries":
                            assert result.ok, result.problems[:3]
            for what, bar in (("open", 1.0), ("list", 2.0), ("verify entries", 3.0)):
                median = statistics.median(times[what])
                report.add(f"(c) 10,000 versions, {name}, 20 ms: {what}", median, "s", at_most=bar)


async def catching_up(report: Report) -> None:
    """A writer that was open while another one wrote: from its call to its acknowledgement."""
    blocks, latency = 10_000, 0.02
    seconds = []
    for turn in range(3):
        async with (
            S3ObjectStore("spectralmc", f"{uuid.uuid4().hex}/") as objects,
            store_on(Latency(objects, latency), "s3://spectralmc/e") as behind,
        ):
            # It only read so far: one that has written looks by itself whether its hint is still the newest.
            tail = await behind.ledger.refresh()
            writes = []
            for number in range(blocks):
                data = build_block(tail, [tag("theirs", f"theirs {turn} {number}")])
                writes.append((block_key(tail.block), data))
                tail = tail.after(parse_block(tail.block, data))
            for start in range(0, len(writes), 64):
                await asyncio.gather(*(objects.put(key, data) for key, data in writes[start : start + 64]))
            async with store_on(objects, "s3://spectralmc/e") as ahead:  # it leaves head and indexes
                await ahead.ledger.prepare()
            started = time.perf_counter()
            await behind.ledger.append(tag("mine", f"mine too {turn}"))
            seconds.append(time.perf_counter() - started)
    report.add("(e) append behind 10,000 foreign blocks, 20 ms", statistics.median(seconds), "s", at_most=3.0)


def tag(alias: str, commit_id: str) -> Draft:
    return Draft("tag", commit_id, {"alias": alias, "counter": None, "content_hash": None, "message": ""}, fresh=True)


async def busy_child() -> None:
    """A writer that appends without a pause, until it is told to end."""
    async with AsyncBlockchainModelStore("s3://spectralmc/busy") as store:
        await store.ledger.prepare()
        print("ready", flush=True)
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        count = 0
        while not ended.done():
            await store.ledger.append(tag("busy", uuid.uuid4().hex))
            count += 1
    print(count)


async def beside_a_busy_writer(report: Report) -> None:
    """`tag` in this process while another one appends without a pause."""
    command = [sys.executable, "-m", "benchmarks.ledger", "--child", "busy", "", "0"]
    pipe = asyncio.subprocess.PIPE
    busy = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert busy.stdout is not None
    await busy.stdout.readline()
    seconds = []
    async with AsyncBlockchainModelStore("s3://spectralmc/busy") as store:
        version = await store.commit(b"tagged", record(0))
        began = time.perf_counter()
        for number in range(100):
            await asyncio.sleep(0.2)
            started = time.perf_counter()
            await store.tag(f"alias{number}", version)
            seconds.append(time.perf_counter() - started)
        took = time.perf_counter() - began
        out, _ = await busy.communicate(b"")
        verification = await store.verify()
        assert verification.ok, verification.problems
    report.add("(f) tag beside a writer without a pause: median", statistics.median(seconds), "s")
    report.add("(f) tag beside a writer without a pause: p99", _p99(seconds), "s", at_most=2.0)
    report.add("(f) entries of that writer meanwhile", int(out.split()[-1]) / took, "a second")


async def child(direction: str, key: str, size: int) -> None:
    """One transfer in a process of its own: seconds ours, seconds raw, peak memory over the checkpoint's size."""
    async with AsyncBlockchainModelStore("s3://spectralmc/large") as store:
        await store.get_head()
        async with get_session().create_client("s3") as client:
            base = memory_of()
            if direction == "up":
                data = bytearray(size)
                for start in range(0, size, 2**26):
                    part = os.urandom(min(2**26, size - start))
                    data[start : start + len(part)] = part
                del part
                started = time.perf_counter()
                digest, _ = await store.upload(data)
                ours, peak = time.perf_counter() - started, memory_of(field="VmHWM")
                started = time.perf_counter()
                await client.put_object(Bucket="spectralmc", Key=f"large/raw/{key}", Body=data)
                raw = time.perf_counter() - started
                print(digest, file=sys.stderr)
            else:
                version = (await store.list_versions())[-1]
                started = time.perf_counter()
                data = await store.load_checkpoint(version)
                ours, peak = time.perf_counter() - started, memory_of(field="VmHWM")
                del data
                started = time.perf_counter()
                answer = await client.get_object(
                    Bucket="spectralmc", Key=f"large/blobs/{version.content_hash}.safetensors"
                )
                await answer["Body"].read()
                raw = time.perf_counter() - started
    print(ours, raw, (peak - base) / size)


async def large(report: Report, mebibytes: int) -> None:
    results: dict[str, list[list[float]]] = {"up": [], "down": []}
    size = mebibytes * 2**20
    for turn in range(3):
        for direction in ("up", "down"):
            key = f"{turn}"
            command = [sys.executable, "-m", "benchmarks.ledger", "--child", direction, key, str(size)]
            out = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
            results[direction].append([float(x) for x in out.stdout.split()])
            if direction == "up":
                async with AsyncBlockchainModelStore("s3://spectralmc/large") as store:
                    await store.append_commit(record(turn), out.stderr.split()[-1], size)
    for direction, rows in results.items():
        speed = statistics.median(raw / ours for ours, raw, _ in rows)
        report.add(f"(d) {mebibytes} MiB {direction} against one raw request", speed, "x", at_least=1.0)
        report.add(f"(d) peak memory {direction}", max(peak for *_, peak in rows), "x checkpoint", at_most=1.3)


def measure(report: Report, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory, DevServer(Path(directory)) as server:
        os.environ.update(server.environment)
        if "a" in options.only:
            asyncio.run(group_commit(report))
        if "b" in options.only:
            asyncio.run(overhead(report))
        if "c" in options.only:
            asyncio.run(long_ledger(report))
        if "e" in options.only:
            asyncio.run(catching_up(report))
        if "f" in options.only:
            asyncio.run(beside_a_busy_writer(report))
        if "d" in options.only:
            asyncio.run(large(report, options.mebibytes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        of_child = busy_child() if sys.argv[2] == "busy" else child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        asyncio.run(of_child)
    else:
        run(
            "The ledger on SeaweedFS on this machine",
            measure,
            ("--only", {"default": "abcdef", "help": "which parts"}),
            ("--mebibytes", {"type": int, "default": 1024}),
        )
