"""The real parts under faults: SeaweedFS behind a proxy that fails, trainers, a LedgerActor killed again and again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
import torch

from actors.ledger import LedgerHandle, ledger_actor
from smc.checkpoint.file import metadata_of, tensors_of
from smc.storage import AsyncBlockchainModelStore, recover
from smc.storage.commits import BackgroundCommits, CommitRequest
from smc.storage.dev_server import DevServer
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import small_config
from tests.fault_proxy import FaultProxy

VERIFIER = Path(__file__).parents[2] / "docs" / "verify_ledger.py"


async def download(ledger: str, directory: Path) -> None:
    """A copy of the ledger's part of the bucket."""
    async with AsyncBlockchainModelStore(ledger) as store:
        infos = [info async for info in store.objects.list("")]
        for info in infos:
            path = directory / info.key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(await store.objects.get(info.key))


def verified_independently(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", str(VERIFIER), str(directory)], capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(240)
def test_three_trainers_through_faults_and_ten_kills_commit_everything_once(
    on_seaweed: str, seaweed: DevServer, tmp_path: Path
) -> None:
    import ray

    with FaultProxy(seaweed.endpoint_url, rate=0.04, latency=0.05, hang=1.0, seed=3) as proxy:
        actor = ledger_actor(on_seaweed, endpoint_url=proxy.url)
        handle = LedgerHandle(on_seaweed, actor, endpoint_url=proxy.url)
        spool = Spool(tmp_path / "spool")
        state, loss = small_config(), torch.tensor([0.5, 1.0], dtype=torch.float64)
        tensors, metadata = tensors_of(state), metadata_of(state)
        trainers = [BackgroundCommits(handle, tensors, metadata, spool=spool, slots=40) for _ in range(3)]
        for step in range(40):
            for trainer, commits in enumerate(trainers):
                request = CommitRequest(step=step, batch=step, experiment=f"trainer-{trainer}")
                commits.submit(request, tensors, metadata, loss)
        kills = 0
        started = time.monotonic()
        while kills < 10:
            done = 120 - sum(commits.pending for commits in trainers)
            if done >= (kills + 1) * 120 // 12:
                os.kill(ray.get(actor.status.remote())["pid"], signal.SIGKILL)
                kills += 1
            assert time.monotonic() - started < 200
            time.sleep(0.05)
        outcomes = Counter(outcome.status for commits in trainers for outcome in commits.close())
    assert outcomes["replaced"] == 0

    async def check() -> None:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            recovered = await recover(store, spool)
            await store.ledger.prepare()
            versions = await store.list_versions()
            assert len(versions) == len({v.commit_id for v in versions}) == 120
            for trainer in range(3):
                steps = [v.step for v in versions if v.experiment == f"trainer-{trainer}"]
                assert sorted(steps) == list(range(40))
                kept = [
                    s for s in steps if s not in {r.step for r in recovered if r.experiment == f"trainer-{trainer}"}
                ]
                assert kept == sorted(kept)
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            report = await store.verify(blobs=True)
            assert report.ok, report.problems
        await download(on_seaweed, tmp_path / "copy")

    asyncio.run(check())
    verified = verified_independently(tmp_path / "copy")
    assert verified.returncode == 0, verified.stdout
    assert "120 versions, 0 problems" in verified.stdout
    print(f"\n{dict(outcomes)}, {kills} kills, {proxy.requests} requests of which failed: {dict(proxy.faults)}")


async def test_the_independent_verifier_agrees_and_names_what_was_changed(on_seaweed: str, tmp_path: Path) -> None:
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        for step in range(300):  # long enough for an index
            record = CommitRecord(
                ledger=on_seaweed, message=f"héllo {step}", step=step, loss=0.5, commit_id=uuid.uuid4().hex
            )
            await store.commit(b"checkpoint %d" % (step % 5), record)
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert (await store.verify(blobs=True)).ok
        assert (await store.verify(full=True)).read == 300
        assert (await store.verify()).read == 300 - 256
    await download(on_seaweed, tmp_path)
    verified = verified_independently(tmp_path)
    assert verified.returncode == 0, verified.stdout
    assert "300 entries, 300 versions, 0 problems" in verified.stdout
    blob = next((tmp_path / "blobs").iterdir())
    for path in (tmp_path / "log/0000000007.jsonl", tmp_path / "index/0000000000.json", tmp_path / "head.json", blob):
        good = path.read_bytes()
        path.write_bytes(good.replace(b"1", b"2", 1) if b"1" in good else good[:-1])
        wrong = verified_independently(tmp_path)
        assert wrong.returncode == 1
        assert str(path.relative_to(tmp_path)) in wrong.stdout or "0000000008" in wrong.stdout
        path.write_bytes(good)
    assert len(VERIFIER.read_text().splitlines()) <= 240
    text = VERIFIER.read_text()
    assert "smc" not in text
