"""Six experiments; a node, the LedgerActor and the driver are killed, and the sweep is submitted again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from actors.ledger import address
from jobs import node
from jobs.node import spot_notice
from jobs.recipes import make_experiment, read_sweep
from smc.learning.plan import StepReport
from smc.learning.pricer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore
from smc.storage.dev_server import DevServer
from smc.storage.objects import MemoryObjectStore
from tests.conftest import versions_of, wait_for_versions

ROOT = Path(__file__).parents[2]
# Steps of the experiments that make the number up, and how long the one trains that is interrupted: it begins, loses
# its node, begins again and loses its driver, which is some seconds of a processor's work, on whatever machine.
SHORT, LONG_SECONDS = 50, 6.0

HELPER = """
import os, signal, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
for line in sys.stdin:
    actor = ray.get_actor(line.strip(), "spectralmc")
    if line.startswith("trainer:"):
        print("answer:", ray.get(actor.node_id.remote()), flush=True)
    else:
        os.kill(ray.get(actor.status.remote())["pid"], signal.SIGKILL)
        print("answer: killed", flush=True)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    experiment = make_experiment("speed", {"training": {"num_batches": 300}}, recipe="tiny")
    speed = 300 / GbmCVNNPricer(experiment.fresh()).train(experiment.training).seconds
    path = tmp_path / "six.yaml"
    path.write_text(
        f"recipe: tiny\ndefaults: {{training: {{num_batches: {SHORT}}}, commit_interval: 25}}\n"
        f"experiments:\n  long: {{training: {{num_batches: {int(speed * LONG_SECONDS)}}}, commit_interval: 100}}\n"
        + "  short: \n"
        + "grid: {training.learning_rate: [0.003, 0.01], network.seed: [0, 1]}\n"
    )
    return path


@pytest.fixture(scope="module")
def cluster(seaweed: DevServer) -> Iterator[Any]:
    """A head that holds the ledger, and three nodes that may be killed. This process does not join it."""
    from ray.cluster_utils import Cluster

    with patch.dict(os.environ, seaweed.environment):
        head = {"num_cpus": 0, "resources": {"ledger": 1}, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(3):
            cluster.add_node(num_cpus=1)
    yield cluster
    for worker in list(cluster.worker_nodes):
        cluster.remove_node(worker)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=True)


def started(cluster: Any, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that finds the cluster; its standard error goes where its output goes."""
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    variables = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def undisturbed(path: Path, *, last: int | None = None) -> dict[str, str]:
    """Content hashes of each experiment's last step, or of this one, when nothing disturbs it."""
    assert torch.get_num_threads() == 1  # as in an actor with one CPU
    found = {}
    for experiment in read_sweep(path)[1]:
        pricer = GbmCVNNPricer(experiment.fresh())

        def stop_at_last(report: StepReport, pricer: GbmCVNNPricer = pricer) -> None:
            if report.step == last:
                pricer.stop()

        store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
        result = pricer.train(experiment.training, logger=stop_at_last, blockchain_store=store, auto_commit=True)
        (commit,) = result.commits
        assert commit.content_hash is not None
        found[experiment.name] = commit.content_hash
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_experiment_ends_as_if_nothing_had_happened(cluster: Any, file: Path, on_seaweed: str) -> None:
    def ask(actor: str) -> str:
        assert helper.stdin is not None
        assert helper.stdout is not None
        helper.stdin.write(f"{actor}\n")
        helper.stdin.flush()
        answer = next(line for line in helper.stdout if line.startswith("answer:"))  # Ray prints there too
        return answer.split()[1]

    def wait_until_it_says(words: str) -> None:
        """Until a line of the driver's output, which this reads, has these words."""
        assert driver.stdout is not None
        for line in driver.stdout:
            said.append(line)
            if words in line:
                return
        raise AssertionError("".join(said))

    sweep = ["-m", "jobs.sweep", str(file), "--ledger", on_seaweed]
    said: list[str] = []
    helper = started(cluster, "-c", HELPER)  # joins in good time: seconds later there would be other things to kill
    driver = started(cluster, *sweep)
    wait_for_versions(on_seaweed, driver, lambda versions: any(v.experiment == "long" for v in versions))
    its_node = ask(f"trainer:{address(on_seaweed)}:long")
    (node,) = (node for node in cluster.worker_nodes if node.node_id == its_node)
    cluster.remove_node(node, allow_graceful=False)
    assert ask(f"ledger:{address(on_seaweed)}") == "killed"
    wait_until_it_says("long: its trainer was lost")
    wait_until_it_says("long: step=")
    driver.kill()
    driver.communicate()
    helper.communicate()
    before = versions_of(on_seaweed, verified=False)
    again = started(cluster, *sweep)
    expected = undisturbed(file)
    out, _ = again.communicate(timeout=400)
    assert again.returncode == 0, out
    assert "6 of 6 experiments done" in out

    async def verified() -> bool:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            return (await store.verify(blobs=True)).ok

    assert asyncio.run(verified())
    after = versions_of(on_seaweed, verified=False)
    assert after[: len(before)] == before
    assert {v.experiment: v.content_hash for v in after} == expected  # of the last version of each
    steps = Counter((v.experiment, v.step) for v in after)
    assert set(steps.values()) == {1}, "something was committed twice"
    resumed = {v.experiment for v in after if v.resumed_from is not None}
    assert "long" in resumed
    print(f"\n6 experiments, {len(after)} versions, {len(resumed)} experiments resumed")


UPLOADERS = """
import asyncio, contextlib, os, sys, ray
from actors.ledger import LedgerHandle, ledger_actor

async def main(ledger):
    uri, actor = ledger, ledger_actor(ledger)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            committer = await stack.enter_async_context(LedgerHandle(uri, actor).committer())
            await committer.upload(await committer.put(memoryview(b"checkpoint")))
        actors = ray._private.state.actors(actor_state_name="ALIVE").values()
        nodes = [actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "UploadActor"]
        assert nodes == [ray.get_runtime_context().get_node_id()] * 4, nodes
        ray.shutdown()
    assert not ray.is_initialized()

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
asyncio.run(main(sys.argv[1]))
"""


def test_a_checkpoint_is_uploaded_on_the_node_that_has_it(cluster: Any, on_seaweed: str) -> None:
    process = started(cluster, "-c", UPLOADERS, on_seaweed)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_node_that_is_taken_away_commits_first_and_its_experiment_goes_on_elsewhere(
    on_seaweed: str, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    file = tmp_path / "spot.yaml"
    file.write_text(
        "recipe: tiny\ndefaults: {training: {num_batches: 100000000}, commit_interval: 500}\nexperiments: {a: }\n"
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
    spot = started(cluster, "-m", "jobs.node", "--", *start, SMC_LOG_JSON="1")
    sweep = ["-m", "jobs.sweep", str(file), "--ledger", on_seaweed, "--concurrency", "1"]
    driver = started(cluster, *sweep, SMC_LOG_JSON="1")
    try:
        wait_for_versions(on_seaweed, driver, bool)
        spot.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        out = spot.communicate(timeout=120)[0]
        assert time.monotonic() - asked < 30, out
        assert spot.returncode == 0, out
        assert "1 trainers stop with a final commit" in out, out
        stopped = versions_of(on_seaweed, verified=False)[-1]
        assert stopped.step % 500, "it committed between two intervals"
        cluster.add_node(num_cpus=1)
        wait_for_versions(on_seaweed, driver, lambda versions: versions[-1].step > stopped.step)
        driver.send_signal(signal.SIGTERM)
        out = driver.communicate(timeout=120)[0]
    finally:
        for process in (driver, spot):
            process.kill()
            process.wait()
        for worker in list(cluster.worker_nodes):
            cluster.remove_node(worker)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=True)
    assert driver.returncode == 2, out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    said = {line["message"]: line for line in lines}[
        f"a: stopped by its node at step {stopped.step}; goes on elsewhere"
    ]
    assert said["levelname"] == "WARNING"
    assert said["job_id"]
    found = versions_of(on_seaweed, verified=False)
    assert {v.resumed_from for v in found if v.step > stopped.step} == {stopped.version_id}
    assert found[-1].content_hash == undisturbed(file, last=found[-1].step)["a"]


async def test_a_node_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node, "_END_SECONDS", 0.2)
    asyncio.get_running_loop().call_later(1.0, os.kill, os.getpid(), signal.SIGTERM)
    started = time.monotonic()
    deaf = "trap '' TERM; sleep 1000"
    assert await node._run(["sh", "-c", deaf, "--block"], {}, None) == 0
    assert 1.2 <= time.monotonic() - started < 10
    assert "runs no Ray node" in caplog.text  # nothing to commit there, and that does not keep it


def test_a_notice_of_ec2_is_seen() -> None:
    answers = {"PUT": (200, b"token"), "GET": (404, b"")}

    class Metadata(BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, body = answers[self.command]
            if self.command == "GET" and self.headers["X-aws-ec2-metadata-token"] != "token":
                status = 401
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/latest"
        assert not spot_notice(url)
        answers["GET"] = (200, b'{"action": "terminate"}')
        assert spot_notice(url)
        answers["PUT"] = (403, b"")
        assert not spot_notice(url)
        server.shutdown()
    assert not spot_notice("http://127.0.0.1:9/latest")
