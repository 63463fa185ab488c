"""Jobs submitted with Ray's command line to a head of its own, with token authentication; and what can be watched."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.ledger import address
from smc.storage.dev_server import DevServer
from tests.conftest import free_port, versions_of

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "spectralmc.json"
TIMES = 150


@dataclass
class Head:
    """A cluster of one node, and a clean folder with what a job needs."""

    address: str
    dashboard: str
    metrics_port: int
    folder: Path
    environment: dict[str, str]

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = ["ray", "job", "submit", "--address", self.dashboard, *options, "--working-dir", "."]
        return self.run(*command, "--", "python", "-m", *arguments)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=TIMES,
        )

    def get(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(self.dashboard + path, json.dumps(body).encode() if body else None)
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def head(seaweed: DevServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("job")
    for name in ("smc", "actors", "jobs", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", folder)
    # Sockets lie in there, and a socket's path is short.
    session = tempfile.mkdtemp(prefix="smc", dir="/tmp")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))},
        **seaweed.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SMC_SPOOL_DIR": str(folder / "spool"),
        "RAY_metrics_report_interval_ms": "500",
        # A machine that is busy starts the agent late, and the node would give itself up.
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_worker_niceness": "0",  # as other tests' Ray, which would hold this one up for minutes
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
        "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120",
    }
    log = open(folder / "head.log", "w")  # noqa: SIM115  the head's own

    def launch() -> tuple[subprocess.Popen[bytes], Head]:
        names = ("port", "dashboard-port", "metrics-export-port", "dashboard-agent-listen-port")
        ports = {name: free_port() for name in names}
        command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
        command += [f"--temp-dir={session}", *(f"--{name}={port}" for name, port in ports.items())]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        gcs, dashboard = f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}"
        return process, Head(gcs, dashboard, ports["metrics-export-port"], folder, environment)

    process, made = launch()
    try:
        launches, deadline = 1, time.monotonic() + 190
        while True:
            try:
                made.get("/api/jobs/", {"entrypoint": "true"})  # some time after the dashboard answers
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    # Ray gives a node 30 s to start, whatever the machine does, and others may take one of its ports:
                    # its agent then ends, and the head answers for ever that it has none.
                    assert launches < 3, (folder / "head.log").read_text()
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    launches, deadline = launches + 1, time.monotonic() + 190
                    process, made = launch()
                time.sleep(0.5)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_sweep_and_an_evaluation_are_submitted_with_a_token(head: Head, on_seaweed: str) -> None:
    (head.folder / "pair.yaml").write_text(
        "recipe: tiny\ndefaults: {training: {num_batches: 20}}\ngrid: {training.learning_rate: [0.003, 0.01]}\n"
    )
    swept = head.submit("jobs.sweep", "pair.yaml", "--ledger", on_seaweed)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert "2 of 2 experiments done" in swept.stdout
    progress = r"learning_rate=0.01: step=\d+ of=20 loss=\S+ contracts_per_s=\d+ commits_pending=\d+"
    assert re.search(progress, swept.stdout), swept.stdout
    names = ["pair/learning_rate=0.003", "pair/learning_rate=0.01"]
    assert sorted(v.experiment for v in versions_of(on_seaweed) if v.step == 20) == sorted(names)

    evaluated = head.submit(
        "jobs.evaluate", "--ledger", on_seaweed, "--version", f"head:{names[0]}", "--contracts", "256"
    )
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "against QuantLib" in evaluated.stdout

    missing = head.submit("jobs.sweep", "missing.yaml", "--ledger", on_seaweed)
    assert missing.returncode == 1
    assert "error: there is no sweep file missing.yaml" in missing.stdout

    without = head.run(
        "ray", "job", "submit", "--address", head.dashboard, "--", "true", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=""
    )
    assert without.returncode != 0
    assert re.search("401|[Uu]nauthorized|[Aa]uthentication", without.stdout + without.stderr)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_running_job_is_watched_stopped_and_keeps_no_secret(head: Head, on_seaweed: str, tmp_path: Path) -> None:
    settings = ["--recipe", "tiny", "--set", "training.num_batches=100000000", "--set", "commit_interval=200"]
    waits = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    started = head.submit(
        "jobs.train", "--ledger", on_seaweed, "--experiment", "long", *settings,
        options=("--no-wait", "--submission-id", "long", "--runtime-env-json", waits),
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    while not versions_of(on_seaweed):
        time.sleep(1)

    status = head.run("python", "-m", "jobs.status", "--json", RAY_ADDRESS=head.address)
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert found["ledgers"][on_seaweed]["failed"] == 0
    assert found["experiments"][f"{on_seaweed}:long"]["step"] > 0
    table = head.run("python", "-m", "jobs.status", RAY_ADDRESS=head.address).stdout
    assert re.search(rf"^{on_seaweed} +v0\d+ ", table, re.MULTILINE)
    assert re.search(rf"^long +{on_seaweed} +\d+ +100000000 ", table, re.MULTILINE)

    actors = head.get("/logical/actors")["data"]["actors"].values()
    alive = {actor["reprName"]: actor["name"] for actor in actors if actor["state"] == "ALIVE"}
    assert alive.get("Trainer(long)") == f"trainer:{address(on_seaweed)}:long"
    assert alive.get(f"Ledger({on_seaweed})") == f"ledger:{address(on_seaweed)}"

    check_panels(head, tmp_path)

    secret = head.environment["AWS_SECRET_ACCESS_KEY"]
    told = json.dumps([head.get("/api/jobs/"), head.get("/logical/actors")])
    assert secret not in told
    assert head.environment["RAY_AUTH_TOKEN"] not in told

    stopped = head.run("ray", "job", "stop", "long", "--address", head.dashboard)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    logs = head.run("ray", "job", "logs", "long", "--address", head.dashboard).stdout
    step = int(re.search(r"long            stopped at step (\d+) in", logs).group(1))  # type: ignore[union-attr]
    assert "0 of 1 experiments done, 1 stopped" in logs
    assert versions_of(on_seaweed)[-1].step == step
    assert secret not in logs


def check_panels(head: Head, folder: Path) -> None:
    """Every query of the dashboard has an answer: by Prometheus where it is installed, else by the names alone."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    assert len(queries) >= 12
    deadline = time.monotonic() + 150
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        scraped = set(re.findall(r"^(ray_smc_\w+)\{", text, re.MULTILINE))
        wanted = {name for _, query in queries for name in re.findall(r"ray_smc_\w+", query)}
        if wanted <= scraped or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert wanted <= scraped
    assert {"long"} <= set(re.findall(r'experiment="([^"]+)"', text))
    assert {"clone", "encode", "put", "upload", "sequence", "acknowledged"} <= set(re.findall(r'stage="(\w+)"', text))
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        return
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{head.metrics_port}"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for title, query in queries:
            expression = query.replace("$experiment", ".*").replace("$ledger", ".*").replace("[5m]", "[1m]")
            url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
            while True:
                try:
                    with urllib.request.urlopen(url, timeout=20) as answer:
                        result = json.loads(answer.read())["data"]["result"]
                    if result:
                        break
                except urllib.error.HTTPError as refused:
                    raise AssertionError(f"{title}: {expression}: {refused.read().decode()}") from None
                except OSError:
                    pass
                assert time.monotonic() < deadline + 30, f"{title}: nothing for {expression}"
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()
