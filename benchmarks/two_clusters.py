"""Two LedgerActors of two clusters append to one ledger by mistake, beside a command line, and all are killed.

.venv/bin/python -m benchmarks.two_clusters [--json FILE] [--seconds 300] [--seed 1]

Everything is real: SeaweedFS, two Rays with an actor each, `python -m smc.storage` in processes of its own. What was
acknowledged is written down by whoever was told; afterwards the ledger has all of it, once, and both verifiers agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reporting import Report, run
from smc.errors import Conflict, NotFound, SpectralMCError
from smc.storage import AsyncBlockchainModelStore
from smc.storage.dev_server import DevServer
from smc.storage.spool import CommitRecord, Spool

LEDGER = "s3://spectralmc/two"
SUBMITTERS = 4
VERIFIER = Path(__file__).parents[1] / "docs" / "verify_ledger.py"


class Notes:
    """Lines of JSON that a process writes when it was told something; complete to the last line, whatever ends it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  open for as long as the process

    def write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def cluster(name: str, folder: Path, seed: int) -> None:
    """One cluster: a Ray, its LedgerActor, some submitters, and somebody who kills the actor."""
    import numpy as np
    import ray

    from actors.ledger import LedgerHandle, ledger_actor

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    actor = ledger_actor(LEDGER)
    notes = Notes(folder / f"{name}.jsonl")
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    counts: Counter[str] = Counter()

    async def submitter(whose: str) -> None:
        draw = random.Random(f"{seed} {whose}")
        mine: list[tuple[CommitRecord, str, int, str]] = []
        # Its own, as each trainer has its own: its death takes no other with it.
        async with LedgerHandle(LEDGER, actor).committer() as committer:
            while not ended.done():
                if mine and draw.random() < 0.1:  # a call that is repeated, of any age
                    record, digest, size, told = draw.choice(mine)
                    counts["repeated"] += 1
                    version = await patiently(lambda: committer.append(record, digest, size))  # noqa: B023
                    notes.write(commit_id=record.commit_id, version=version, content_hash=digest, again=told)
                    continue
                # Some contents are those of other commits, which may just be collected.
                data = f"shared {draw.randrange(40)}".encode() if draw.random() < 0.1 else draw.randbytes(20_000)
                record = CommitRecord(ledger=LEDGER, message=name, step=len(mine), loss=None, experiment=whose)
                placed = await committer.put(memoryview(np.frombuffer(data, np.uint8)))
                for _ in range(4):
                    digest, size = await patiently(lambda: committer.upload(placed))  # noqa: B023
                    try:
                        version = await patiently(lambda: committer.append(record, digest, size))  # noqa: B023
                    except Conflict:
                        counts["uploaded again"] += 1
                        continue
                    notes.write(commit_id=record.commit_id, version=version, content_hash=digest)
                    mine.append((record, digest, size, version))
                    counts["committed"] += 1
                    break

    async def killer() -> None:
        draw = random.Random(f"{seed} {name}")
        while not ended.done():
            await asyncio.wait({ended}, timeout=draw.uniform(4, 16))
            if not ended.done():
                os.kill((await actor.status.remote())["pid"], signal.SIGKILL)
                counts["kills of the LedgerActor"] += 1

    await asyncio.gather(killer(), *(submitter(f"{name}{i}") for i in range(SUBMITTERS)))
    await actor.close.remote()
    ray.kill(actor)
    ray.shutdown()
    print(json.dumps(counts))


async def patiently(call: Any) -> Any:
    while True:
        try:
            return await call()
        except (Conflict, NotFound):
            raise
        except SpectralMCError:
            await asyncio.sleep(0.2)


class CommandLine:
    """Somebody who tags, collects and recovers, and whose commands are killed half way now and then."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._draw, self._spool = folder, random.Random(seed), Spool(folder / "spool")
        self._notes = Notes(folder / "cli.jsonl")
        self.counts: Counter[str] = Counter()

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            what = self._draw.choice(["tag", "tag", "untag", "rollback", "gc-run", "recover", "recover"])
            getattr(self, "_" + what.replace("-", "_"))()
            time.sleep(self._draw.uniform(0, 1))

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str] | None:
        command = [sys.executable, "-m", "smc.storage", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            limit = self._draw.uniform(0.8, 4) if self._draw.random() < 0.25 else 240
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            assert limit < 240, f"{arguments} was not done after {limit} s"
            self.counts[f"{arguments[0]} killed"] += 1
            return None
        self.counts[f"{arguments[0]}, status {process.returncode}"] += 1
        assert process.returncode in (0, 2), (arguments, out, err)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _tag(self) -> None:
        alias = f"alias{self._draw.randrange(5)}"
        done = self._run("tag", LEDGER, alias, self._draw.choice(["head", "0", "1"]), "--json")
        if done is not None and done.returncode == 0:
            self._notes.write(**json.loads(done.stdout))

    def _untag(self) -> None:
        self._run("untag", LEDGER, f"alias{self._draw.randrange(5)}")

    def _rollback(self) -> None:
        self._run("rollback", LEDGER, f"alias{self._draw.randrange(5)}")

    def _gc_run(self) -> None:
        keep = str(self._draw.randrange(5, 200))
        self._run("gc-run", LEDGER, keep, "--min-age", "20s", "--yes", *self._draw.choice([[], ["--no-heads"]]))

    def _recover(self) -> None:
        """What is in the spool is new, or is in the ledger already because an answer came late."""
        records = []
        for _ in range(self._draw.randrange(1, 4)):
            record = CommitRecord(ledger=LEDGER, message="spooled", step=1, loss=None, experiment="spooled")
            data = self._draw.randbytes(20_000)
            if self._draw.random() < 0.3:
                asyncio.run(self._commit(record, data))
            self._spool.save(record, data)
            records.append(record)
        if (done := self._run("recover", LEDGER, "--spool", str(self._folder / "spool"), "--json")) is not None:
            for version in json.loads(done.stdout):
                self._notes.write(**{k: version[k] for k in ("commit_id", "version", "content_hash")})

    @staticmethod
    async def _commit(record: CommitRecord, data: bytes) -> None:
        async with AsyncBlockchainModelStore(LEDGER) as store:
            await store.commit(data, record)


async def judged(notes: list[dict[str, Any]], copy: Path) -> Counter[str]:
    """What is wrong, counted: something lost, doubled, or found by verification; makes a copy of the ledger."""
    wrong: Counter[str] = Counter(dict.fromkeys(("acknowledged and not there", "told two versions", "doubled"), 0))
    async with AsyncBlockchainModelStore(LEDGER) as store:
        await store.ledger.prepare()
    async with AsyncBlockchainModelStore(LEDGER) as store:
        catalog = await store.catalog()
        by_id = {version.commit_id: version for version in catalog.versions}
        entries = {entry.index for entry in await store.list_entries()}
        wrong["doubled"] = len(catalog.versions) - len(by_id)
        for note in notes:
            if "entry" in note:
                wrong["acknowledged and not there"] += note["entry"] not in entries
                continue
            found = by_id.get(note["commit_id"])
            right = found is not None and found.content_hash == note["content_hash"]
            wrong["acknowledged and not there"] += not right
            wrong["told two versions"] += found is not None and found.version_id != note["version"]
            wrong["told two versions"] += note.get("again", note["version"]) != note["version"]
        report = await store.verify(blobs=True)
        wrong["problems of verify"] = len(report.problems)
        print(*report.problems[:5], sep="\n", end="\n" if report.problems else "")
        print(f"{report.collected} collected, {len(catalog.aliases)} aliases, {len(notes)} acknowledgements")
        async for info in store.objects.list(""):
            (copy / info.key).parent.mkdir(parents=True, exist_ok=True)
            (copy / info.key).write_bytes(await store.objects.get(info.key))
    return wrong


def measure(report: Report, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory, DevServer(Path(directory) / "s3") as server:
        os.environ.update(server.environment, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
        folder = Path(directory)
        clusters = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.two_clusters", "--cluster", name, directory, str(options.seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("north", "south")
        ]
        while not all((folder / f"{name}.jsonl").exists() for name in ("north", "south")):
            assert all(process.poll() is None for process in clusters), "a cluster did not start"
            time.sleep(0.5)
        beside = CommandLine(folder, options.seed)
        beside.work(time.monotonic() + options.seconds)
        counts = Counter(beside.counts)
        for process in clusters:
            assert process.poll() is None, "a cluster ended early"
            out, _ = process.communicate("", timeout=300)
            counts += Counter(json.loads(out.splitlines()[-1]))
        for what, count in sorted(counts.items()):
            report.add(what, count, "")
        notes = [note for path in folder.glob("*.jsonl") for note in Notes.read(path)]
        wrong = asyncio.run(judged(notes, folder / "copy"))
        command = [sys.executable, "-I", str(VERIFIER), str(folder / "copy")]
        alone = subprocess.run(command, capture_output=True, text=True)
        print(f"the standalone verifier: {alone.stdout.splitlines()[-1]}")
        wrong["status of the standalone verifier"] = alone.returncode
        for what, count in wrong.items():
            report.add(what, count, "", at_most=0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cluster"]:
        asyncio.run(cluster(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
    else:
        run(
            "Two LedgerActors and a command line on one ledger, with kills",
            measure,
            ("--seconds", {"type": float, "default": 300}),
            ("--seed", {"type": int, "default": 1}),
        )
