"""Twelve experiments; a node, the LedgerActor and the driver are killed, and the sweep is submitted again."""

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

import pytest
import torch

from jobs import node
from jobs.node import spot_notice
from jobs.recipes import read_sweep
from smc.gbm_trainer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.objects import MemoryObjectStore
from smc.training import StepReport
from tests.conftest import versions_of, wait_for_versions

ROOT = Path(__file__).parents[2]
# Steps: of experiments that make the number up, of those under a node's death, and of one under the driver's, which
# comes while a new LedgerActor may still be starting.
SHORT, LONG, LONGEST = 50, 600, 3000


KILL_THE_LEDGER_ACTOR = """
import os, signal, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
sys.stdin.readline()
actor = ray.get_actor("ledger:" + sys.argv[1], "spectralmc")
os.kill(ray.get(actor.status.remote())["pid"], signal.SIGKILL)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "twelve.yaml"
    steps = [LONG, LONG, LONG, LONGEST]
    long = "".join(
        f"  long-{i}: {{training: {{num_batches: {end}}}, network: {{seed: {i}}}}}\n" for i, end in enumerate(steps)
    )
    path.write_text(
        f"recipe: tiny\ndefaults: {{training: {{num_batches: {SHORT}}}, commit_interval: 25}}\nexperiments:\n{long}"
        "grid: {training.learning_rate: [0.003, 0.01], network.seed: [0, 1], training.batch_size: [8, 16]}\n"
    )
    return path


@pytest.fixture
def cluster(on_seaweed: str) -> Iterator[Any]:
    """A head that holds the ledger, and three nodes that may be killed. This process does not join it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"ledger": 1}})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    yield cluster
    for worker in list(cluster.worker_nodes):
        cluster.remove_node(worker)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=True)


def end_of(experiment: str) -> int:
    return {"long-3": LONGEST}.get(experiment, LONG if experiment.startswith("long") else SHORT)


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


@pytest.mark.timeout(420)
def test_every_experiment_ends_as_if_nothing_had_happened(cluster: Any, file: Path, on_seaweed: str) -> None:
    command = [sys.executable, "-m", "jobs.sweep", str(file), "--ledger", on_seaweed]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(driver: subprocess.Popen[str], *names: str) -> None:
        """Until one of these experiments has a version, and not yet its last."""

        def enough(versions: list[ModelVersion]) -> bool:
            newest = {v.experiment: v.step for v in versions}
            return any(0 < newest.get(name, 0) < end_of(name) for name in names)

        wait_for_versions(on_seaweed, driver, enough)

    # It joins the cluster in good time: seconds later there would be other things to kill.
    killer = subprocess.Popen(
        [sys.executable, "-c", KILL_THE_LEDGER_ACTOR, on_seaweed],
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    driver = submit()
    wait_for(driver, "long-0", "long-1", "long-2")  # one on each node
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    _, errors = killer.communicate("now\n", timeout=60)
    assert killer.returncode == 0, errors
    wait_for(driver, "long-3")
    driver.kill()
    assert "its trainer was lost" in driver.communicate()[0]
    before = versions_of(on_seaweed, verified=False)
    again = submit()
    expected = undisturbed(file)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert "12 of 12 experiments done" in out

    async def verified() -> bool:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            return (await store.verify(blobs=True)).ok

    assert asyncio.run(verified())
    after = versions_of(on_seaweed, verified=False)
    assert after[: len(before)] == before
    assert {v.experiment: v.content_hash for v in after if v.step == end_of(v.experiment)} == expected
    steps = Counter((v.experiment, v.step) for v in after)
    assert set(steps.values()) == {1}, "something was committed twice"
    resumed = {v.experiment for v in after if v.resumed_from is not None}
    assert resumed, "nothing was interrupted"
    print(f"\n12 experiments, {len(after)} versions, {len(resumed)} experiments resumed")


@pytest.mark.timeout(300)
def test_a_node_that_is_taken_away_commits_first_and_its_experiment_goes_on_elsewhere(
    on_seaweed: str, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    file = tmp_path / "spot.yaml"
    file.write_text(
        "recipe: tiny\ndefaults: {training: {num_batches: 100000000}, commit_interval: 500}\nexperiments: {a: }\n"
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1", "SMC_LOG_JSON": "1"}

    def started(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    ray = str(Path(sys.executable).parent / "ray")
    spot = started("jobs.node", "--", ray, "start", f"--address={cluster.address}", "--num-cpus=1", "--block")
    driver = started("jobs.sweep", str(file), "--ledger", on_seaweed, "--concurrency", "1")
    try:
        wait_for_versions(on_seaweed, driver, bool)
        spot.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        out = spot.communicate(timeout=60)[0]
        assert time.monotonic() - asked < 30, out
        assert spot.returncode == 0, out
        assert "1 trainers stop with a final commit" in out, out
        stopped = versions_of(on_seaweed, verified=False)[-1]
        assert stopped.step % 500, "it committed between two intervals"
        cluster.add_node(num_cpus=1)
        wait_for_versions(on_seaweed, driver, lambda versions: versions[-1].step > stopped.step)
        driver.send_signal(signal.SIGTERM)
        out = driver.communicate(timeout=60)[0]
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
    deaf = "trap '' TERM; while :; do sleep 0.1; done"
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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/latest"
        assert not spot_notice(url)
        answers["GET"] = (200, b'{"action": "terminate"}')
        assert spot_notice(url)
        answers["PUT"] = (403, b"")
        assert not spot_notice(url)
        server.shutdown()
    assert not spot_notice("http://127.0.0.1:9/latest")
