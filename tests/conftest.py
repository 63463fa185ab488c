"""Servers, stores and small configurations that the tests share."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray lets its workers give way to all others, and tests would wait for them the longer, the more tests run beside.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as Ray spells it

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricerConfig, TrainingConfig
from smc.simulation.engine import BlackScholesConfig, SimulationParams
from smc.storage import AsyncBlockchainModelStore, ModelVersion
from smc.storage.chain import Draft, block_key, build_block
from smc.storage.dev_server import DevServer
from smc.storage.objects import MemoryObjectStore

torch.set_num_threads(1)

NO_DELAYS = (0.0, 0.0, 0.0)


_SERVICES = {"seaweed", "moto_url", "ray_cluster"}
_SHARE_A_RAY = {"test_sweep", "test_search", "test_ledger", "test_chaos", "test_trainer"}
# Files that take longest, which are begun first: at the end of a run nobody is to wait for one of them alone.
_LONGEST_FIRST = (
    "test_sweep", "test_search", "test_ledger", "test_chaos", "test_trainer", "test_cluster", "test_submitted",
    "test_own_models", "test_demo", "test_guarded", "test_problems", "test_examples", "test_promises", "test_gc",
    "test_inference", "test_faults", "test_store", "test_evaluate",
)  # fmt: skip


class _ByFile(LoadScopeScheduling):
    """Files go to workers as wholes, and those that share a Ray go to one: the others start none."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if Path(file).stem in _SHARE_A_RAY else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server or Ray, also where a parameter says so, and skip, visibly, what needs a GPU."""
    last = len(_LONGEST_FIRST)
    ranks = {name: rank for rank, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, last))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        needed = set(getattr(item, "fixturenames", ()))
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        on_server = needed & {"on_s3", "make_store"} and not {"memory"} & set(map(str, parameters.values()))
        if needed & _SERVICES or on_server:
            item.add_marker("service")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def own_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test fails to commit reaches the user's spool."""
    directory = tmp_path / "spool"
    monkeypatch.setenv("SMC_SPOOL_DIR", str(directory))
    return directory


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    """A real S3 server."""
    buckets = ("spectralmc", "my-model-bucket", "prod-models", "experiments-2025", "my-models")
    with DevServer(tmp_path_factory.mktemp("seaweed"), buckets=buckets) as server:
        yield server


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """moto's S3 server, with a bucket named spectralmc."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.create_bucket(Bucket="spectralmc")
    yield url
    server.stop()


@pytest.fixture
def on_seaweed(seaweed: DevServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Environment of the real server; -> a ledger of this test's own."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://spectralmc/{uuid.uuid4().hex}"


@pytest.fixture
def on_moto(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Environment of moto's server; -> a ledger of this test's own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"s3://spectralmc/{uuid.uuid4().hex}"


@pytest.fixture(params=["moto", "seaweed"])
def on_s3(request: pytest.FixtureRequest) -> str:
    """A ledger on moto, then one on the real server."""
    ledger: str = request.getfixturevalue(f"on_{request.param}")
    return ledger


@pytest.fixture(params=["memory", "moto", "seaweed"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], AsyncBlockchainModelStore]:
    """Opens the same ledger again and again, on each kind of object store."""
    if request.param == "memory":
        objects = MemoryObjectStore()
        return lambda: AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS)
    ledger = request.getfixturevalue(f"on_{request.param}")
    return lambda: AsyncBlockchainModelStore(ledger, retry_delays=NO_DELAYS)


@pytest.fixture
def memory_store() -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=MemoryObjectStore(), retry_delays=NO_DELAYS)


def tag_draft(commit_id: str, alias: str = "best") -> Draft:
    """An entry that lets an alias name nothing."""
    return Draft("tag", commit_id, {"alias": alias, "counter": None, "content_hash": None, "message": ""})


async def force(store: AsyncBlockchainModelStore, *drafts: Draft) -> None:
    """Write a block that the store itself would refuse to write."""
    tail = await store.ledger.refresh()
    await store.objects.create(block_key(tail.block), build_block(tail, drafts))


def versions_of(ledger: str, *, verified: bool = True) -> list[ModelVersion]:
    """Every version of a ledger, which verifies."""

    async def read() -> list[ModelVersion]:
        async with AsyncBlockchainModelStore(ledger) as store:
            assert not verified or (await store.verify(blobs=True)).ok
            return await store.list_versions()

    return asyncio.run(read())


def wait_for_versions(
    ledger: str, process: subprocess.Popen[str], enough: Callable[[list[ModelVersion]], bool]
) -> list[ModelVersion]:
    """Look at a ledger until its versions are enough; -> them. `process`, which makes them, has to go on running."""

    async def wait() -> list[ModelVersion]:
        async with AsyncBlockchainModelStore(ledger) as store:
            while not enough(versions := await store.list_versions()):
                assert process.poll() is None, process.communicate()[0]
                await asyncio.sleep(0.2)
            return versions

    return asyncio.run(wait())


def small_simulation(**changes: Any) -> SimulationParams:
    settings: dict[str, Any] = {
        "timesteps": 4,
        "network_size": 32,
        "batches_per_mc_run": 8,
        "threads_per_block": 64,
        "mc_seed": 7,
        "buffer_size": 256,
    }
    return SimulationParams(**{**settings, **changes})


def small_config(device: str = "cpu", **changes: Any) -> GbmCVNNPricerConfig:
    params = small_simulation(**changes)
    model = build_cvnn(params, CVNNConfig(hidden=(16, 16))).to(device)
    return GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=model)


def small_training(num_batches: int = 20, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"num_batches": num_batches, "batch_size": 16, "learning_rate": 0.01, **changes})


@pytest.fixture(scope="session")
def ray_cluster(seaweed: DevServer) -> Iterator[None]:
    """One local Ray for all tests that need it; its workers inherit the real S3 server's environment."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.environment.items():
            patch.setenv(name, value)
        # "local": another test may have started a head, which a bare init would join.
        options = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
        ray.init(address="local", num_cpus=2, namespace="tests", **options)
    yield
    ray.shutdown()
