from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray
import torch
from ray.exceptions import TaskCancelledError

from actors.code import sources
from actors.ledger import (
    LedgerActor,
    LedgerHandle,
    _ActorCommitter,
    address,
    ledger_actor,
)
from actors.upload import UploadActor
from smc.checkpoint.file import metadata_of, tensors_of
from smc.errors import AccessDenied, Busy, ConfigError, Unavailable
from smc.storage import AsyncBlockchainModelStore
from smc.storage.commits import BackgroundCommits, CommitRequest
from smc.storage.dev_server import DevServer
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import small_config
from tests.fault_proxy import FaultProxy


async def uploaded(ledger: str, checkpoint: bytes = b"checkpoint") -> tuple[str, int]:
    async with AsyncBlockchainModelStore(ledger) as store:
        return await store.upload(checkpoint)


def record(step: int, **changes: Any) -> CommitRecord:
    return CommitRecord(**{"ledger": "x", "message": f"m{step}", "step": step, "loss": None, **changes})


async def test_the_plain_class_uploads_and_appends(on_seaweed: str) -> None:
    actor = LedgerActor(on_seaweed)
    assert await actor.prepare() is None
    content_hash, size = await uploaded(on_seaweed)
    versions = await asyncio.gather(*(actor.append(record(i), content_hash, size) for i in range(5)))
    assert versions == [f"v{i:010d}" for i in range(5)]
    status = await actor.status()
    assert (status["committed"], status["failed"], status["queue_depth"], status["uploading"]) == (5, 0, 0, 0)
    assert status["head"] == "v0000000004"
    assert await actor.prepare() == "v0000000004"
    assert repr(actor) == f"Ledger({on_seaweed})"
    await actor.close()


async def test_a_ledger_that_cannot_be_opened_is_a_config_error(on_seaweed: str) -> None:
    actor = LedgerActor("s3://no-such-bucket-here")
    with pytest.raises(ConfigError, match="does not exist"):
        await actor.prepare()
    with pytest.raises(ConfigError):
        await actor.append(record(0), "0" * 64, 1)
    assert (await actor.status())["failed"] == 1


class DoesNotStart(LedgerActor):
    def __init__(self, uri: str, *, endpoint_url: str | None = None) -> None:
        super().__init__(uri, endpoint_url=endpoint_url)
        raise ValueError("no room here")


class OtherCode(LedgerActor):
    async def version(self) -> str:
        return "another"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (DoesNotStart, Unavailable, "does not start: ValueError: no room here"),
        (OtherCode, ConfigError, "runs code another, this job .* give every node the same code"),
    ],
)
def test_an_actor_that_cannot_be_had_is_an_error_and_no_endless_loop(
    kind: type[LedgerActor], error: type[Exception], message: str, on_seaweed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.ledger.RemoteLedgerActor", ray.remote(kind))
    with pytest.raises(error, match=message):
        ledger_actor(on_seaweed)


@pytest.mark.usefixtures("ray_cluster")
async def test_errors_cross_ray_as_they_were_raised(on_seaweed: str) -> None:
    nowhere = "s3://no-such-bucket-here"
    async with LedgerHandle(nowhere, ledger_actor(nowhere)).committer() as committer:
        with pytest.raises(ConfigError, match=r"^bucket 'no-such-bucket-here' does not exist at http\S+$"):
            await committer.append(record(0), "0" * 64, 1)
        with pytest.raises(ConfigError, match="no-such-bucket-here"):
            await committer.upload(await committer.put(memoryview(b"x")))


@pytest.mark.usefixtures("ray_cluster")
async def test_there_is_one_actor_for_a_ledger(on_seaweed: str) -> None:
    one, two = ledger_actor(on_seaweed), ledger_actor(on_seaweed)
    assert one._actor_id == two._actor_id


@pytest.mark.usefixtures("ray_cluster")
async def test_a_killed_ledger_actor_comes_back_and_nothing_is_lost_or_twice(on_seaweed: str) -> None:
    actor = ledger_actor(on_seaweed)
    committer = _ActorCommitter(on_seaweed, actor)
    await actor.prepare.remote()

    async def one(step: int) -> str:
        content_hash, size = await committer.upload(await committer.put(memoryview(f"checkpoint {step}".encode())))
        return await committer.append(record(step), content_hash, size)

    running = [asyncio.ensure_future(one(step)) for step in range(30)]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    pid = (await actor.status.remote())["pid"]
    os.kill(pid, signal.SIGKILL)
    versions = await asyncio.wait_for(asyncio.gather(*running), timeout=120)
    assert len(set(versions)) == 30
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert sorted(v.step for v in await store.list_versions()) == list(range(30))
        # The hint may be late where the machine is busy: the new actor writes it beside its work.
        deadline = time.monotonic() + 30
        while not (report := await store.verify(blobs=True)).ok and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        assert report.ok, report.problems
    assert (await actor.status.remote())["pid"] != pid


async def test_a_drained_actor_refuses_new_work_and_settles_the_old(on_seaweed: str) -> None:
    actor = LedgerActor(on_seaweed)
    content_hash, size = await uploaded(on_seaweed)
    running = [asyncio.ensure_future(actor.append(record(i), content_hash, size)) for i in range(5)]
    await asyncio.sleep(0)
    await actor.drain()
    assert [task.result() for task in running] == [f"v{i:010d}" for i in range(5)]
    with pytest.raises(Busy, match="is being replaced") as caught:
        await actor.append(record(9), content_hash, size)
    assert caught.value.retry_after > 0
    await actor.close()


async def test_whoever_drained_an_actor_may_die_before_ending_it(
    on_seaweed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.ledger._DRAIN_SECONDS", 0.05)
    actor = LedgerActor(on_seaweed)
    await actor.drain()
    await asyncio.sleep(0.1)
    assert await actor.append(record(1), *(await uploaded(on_seaweed))) == "v0000000000"
    await actor.close()


async def test_flush_waits_for_what_was_submitted_and_not_for_what_goes_on_coming(
    on_seaweed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.ledger._HINT_SECONDS", 0.2)
    actor = LedgerActor(on_seaweed)
    content_hash, size = await uploaded(on_seaweed)
    ended = False

    async def one_after_the_other(first: int) -> None:
        step = first
        while not ended:
            await actor.append(record(step), content_hash, size)
            step += 1

    submitters = [asyncio.ensure_future(one_after_the_other(1000 * i)) for i in range(8)]
    await asyncio.sleep(0.3)
    before = (await actor.status())["committed"]
    await asyncio.wait_for(actor.flush(), 10)
    assert (await actor.status())["committed"] > before
    ended = True
    await asyncio.gather(*submitters)
    status = await actor.status()
    assert status["commits_per_s"] > 0
    await actor.flush()
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert (await store.verify()).ok
    await actor.close()


async def test_credentials_that_were_renewed_are_taken(on_seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = LedgerActor(on_seaweed)
    there = await uploaded(on_seaweed)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an old one")
    with pytest.raises(AccessDenied):
        await actor.append(record(1), *there)
    assert (await actor.status())["failed"] == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert await actor.append(record(1), *there) == "v0000000000"
    await actor.close()


async def test_uploads_take_credentials_that_were_renewed(on_seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = UploadActor(on_seaweed, None, "a test")
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an old one")
    with pytest.raises(AccessDenied):
        await actor.upload([asyncio.sleep(0, b"checkpoint")])
    actor._connection.store = await AsyncBlockchainModelStore(on_seaweed).__aenter__()  # one whose credentials expire
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    checkpoints = [bytes([i]) * 3_000_000 * i for i in range(1, 5)]  # some are denied while others are under way
    found = await asyncio.gather(*(actor.upload([asyncio.sleep(0.002, data)]) for data in checkpoints))
    assert found == [(hashlib.sha256(data).hexdigest(), len(data)) for data in checkpoints]
    await actor.close()


def uploading_processes() -> set[int]:
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    return {actor["Pid"] for actor in actors if actor["ActorClassName"] == "UploadActor"}


@pytest.mark.usefixtures("ray_cluster")
async def test_a_trainer_has_one_process_that_uploads_which_is_started_again_and_ends_with_it(on_seaweed: str) -> None:
    others = uploading_processes()
    ledger = LedgerActor(on_seaweed)
    async with LedgerHandle(on_seaweed, ledger_actor(on_seaweed)).committer() as committer:

        async def upload(*checkpoints: bytes) -> None:
            refs = [await committer.put(memoryview(data)) for data in checkpoints]
            found = await asyncio.gather(*(ledger.upload(ref, committer._uploader, size) for ref, size in refs))
            assert found == [(hashlib.sha256(data).hexdigest(), len(data)) for data in checkpoints]

        await upload(*(b"checkpoint %d" % i for i in range(20)))
        (first,) = uploading_processes() - others
        os.kill(first, signal.SIGSTOP)
        running = asyncio.ensure_future(upload(*(b"another %d" % i for i in range(20))))
        while (await ledger.status())["uploading"] < 20:
            await asyncio.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        await running
        (second,) = uploading_processes() - others
        assert second != first
        placed, size = await committer.put(memoryview(b"too late"))
    async with asyncio.timeout(60):
        while uploading_processes() - others:  # nothing tells that a process has ended
            await asyncio.sleep(0.1)
    with pytest.raises(Unavailable, match=r"the process that uploads to s3://\S+ is gone: .*ray\.kill"):
        await ledger.upload(placed, committer._uploader, size)
    status = await ledger.status()
    assert (status["failed"], status["uploading"], status["bytes_in_flight"]) == (1, 0, 0)
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert len([info async for info in store.objects.list("blobs/")]) == 40


@pytest.mark.usefixtures("ray_cluster")
async def test_an_upload_that_nobody_wants_any_more_leaves_nothing_on_s3(seaweed: DevServer, on_seaweed: str) -> None:
    s3 = botocore.session.get_session().create_client("s3", region_name="us-east-1")

    async def until_there_are(count: int) -> None:
        async with asyncio.timeout(60):
            while unfinished() != count:
                await asyncio.sleep(0.05)

    def unfinished() -> int:
        bucket, _, prefix = on_seaweed.removeprefix("s3://").partition("/")
        return len(s3.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", []))

    actor, ledger = ledger_actor(on_seaweed), LedgerActor(on_seaweed)
    with FaultProxy(seaweed.endpoint_url, latency=1.0) as proxy:  # between an upload's begin and its end
        async with LedgerHandle(on_seaweed, actor, endpoint_url=proxy.url).committer() as committer:
            placed, size = await committer.put(memoryview(os.urandom(40_000_000)))
            overtaken = asyncio.ensure_future(committer.upload((placed, size)))
            await until_there_are(1)
            proxy.latency = 0.0
            overtaken.cancel()
            await until_there_are(0)
            status = await actor.status.remote()
            assert (status["uploading"], status["bytes_in_flight"], status["failed"]) == (0, 0, 0)
            proxy.latency = 1.0
            last = asyncio.ensure_future(ledger.upload(placed, committer._uploader, size))
            await until_there_are(1)
            proxy.latency = 0.0
        assert unfinished() == 0
        with pytest.raises(TaskCancelledError):
            await last


async def test_two_actors_on_one_ledger_stay_correct(on_seaweed: str) -> None:
    actors = [LedgerActor(on_seaweed) for _ in range(2)]
    content_hash, size = await uploaded(on_seaweed)
    await asyncio.gather(*(actors[i % 2].append(record(i), content_hash, size) for i in range(24)))
    async with AsyncBlockchainModelStore(on_seaweed) as store:
        assert sorted(v.step for v in await store.list_versions()) == list(range(24))
    for actor in actors:
        await actor.close()


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_with_older_code_is_drained_and_replaced(on_seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ledger_actor(on_seaweed)
    pid = ray.get(old.status.remote())["pid"]
    committer_version = ray.get(old.version.remote())
    calls = iter(["another version"])
    monkeypatch.setattr("actors.ledger.code_version", lambda: next(calls, committer_version))
    new = ledger_actor(on_seaweed)
    assert ray.get(new.status.remote())["pid"] != pid

    async def through_the_old_handle() -> str:
        committer = _ActorCommitter(on_seaweed, old)
        content_hash, size = await committer.upload(await committer.put(memoryview(b"checkpoint")))
        return await committer.append(record(1), content_hash, size)

    assert asyncio.run(through_the_old_handle()) == "v0000000000"


@pytest.mark.usefixtures("ray_cluster")
def test_one_address_on_two_servers_is_two_ledgers(on_seaweed: str, seaweed: DevServer, moto_url: str) -> None:
    endpoints = (seaweed.endpoint_url, moto_url)
    actors = [ledger_actor(on_seaweed, endpoint_url=url) for url in endpoints]
    assert len({ray.get(actor.status.remote())["pid"] for actor in actors}) == 2

    async def commit(url: str, actor: Any) -> str:
        async with LedgerHandle(on_seaweed, actor, endpoint_url=url).committer() as committer:
            uploaded = await committer.upload(await committer.put(memoryview(url.encode())))
            return await committer.append(record(1, message=url), *uploaded)

    async def messages(url: str) -> list[str]:
        async with AsyncBlockchainModelStore(on_seaweed, endpoint_url=url) as store:
            return [version.commit_message for version in await store.list_versions()]

    for url, actor in zip(endpoints, actors, strict=True):
        assert asyncio.run(commit(url, actor)) == "v0000000000"
    assert [asyncio.run(messages(url)) for url in endpoints] == [[url] for url in endpoints]
    assert address(on_seaweed) == address(on_seaweed, seaweed.endpoint_url)  # what the environment names
    assert address(on_seaweed) != address(on_seaweed, moto_url)
    for actor in actors:
        ray.kill(actor)


def test_the_version_of_an_actor_is_of_all_code_that_it_runs() -> None:
    script = (
        "import sys, actors.ledger, pathlib; print(*(name for name, module in sys.modules.items() "
        "if name.split('.')[0] in ('smc', 'actors', 'jobs')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(sources())
    # Code of the trainer is no reason to replace the actor that other jobs use.
    assert not {"smc.simulation.engine", "smc.learning.network", "smc.checkpoint.file", "smc.learning.pricer"} & set(
        sources()
    )


@pytest.mark.usefixtures("ray_cluster")
def test_commits_through_ray_leave_no_object_behind(on_seaweed: str, tmp_path: Path) -> None:
    from ray._private.worker import global_worker

    def references() -> int:
        gc.collect()
        return len(global_worker.core_worker.get_all_reference_counts())

    actor = ledger_actor(on_seaweed)
    state = small_config()
    tensors, metadata = tensors_of(state), metadata_of(state)
    outcome = torch.tensor([0.5, 1.0], dtype=torch.float64)
    counts = []
    for _ in range(3):
        handle = LedgerHandle(on_seaweed, actor)
        commits = BackgroundCommits(handle, tensors, metadata, spool=Spool(tmp_path), slots=8)
        for step in range(12):
            while commits.pending > 6:
                time.sleep(0.005)
            commits.submit(CommitRequest(step=step, batch=step), tensors, metadata, outcome)
        assert {o.status for o in commits.close()} == {"committed"}
        del commits, handle
        deadline = time.monotonic() + 20
        while counts and references() > counts[0] and time.monotonic() < deadline:
            time.sleep(0.2)
        counts.append(references())
    print(f"\nreferences that this process holds after 12, 24 and 36 commits: {counts}")
    assert counts[2] <= counts[0]
