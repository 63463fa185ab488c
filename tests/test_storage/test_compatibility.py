"""Ledgers that earlier versions wrote are verified, read, served, resumed and appended to."""

from __future__ import annotations

import json
import runpy
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smc.learning.pricer import GbmCVNNPricer
from smc.serving.client import load_predictor
from smc.storage import AsyncBlockchainModelStore, load_snapshot_from_checkpoint
from smc.storage.chain import Draft
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS, small_training

# Made by commit 5747285 (format 3 of checkpoints): 274 blocks of five commits, aliases and a collection.
LEDGER = Path(__file__).parents[1] / "data" / "ledger-5747285.tar.xz"
VERIFY = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "verify_ledger.py"))["verify"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(LEDGER) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def objects(folder: Path) -> MemoryObjectStore:
    store = MemoryObjectStore()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "expected.json":
            store.objects[str(path.relative_to(folder))] = path.read_bytes(), datetime.now(UTC)
    return store


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return fields


def opened(objects: MemoryObjectStore) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("fixture", objects=objects, retry_delays=NO_DELAYS)


async def test_an_earlier_ledger_verifies_and_is_read(
    objects: MemoryObjectStore, folder: Path, expected: dict[str, Any]
) -> None:
    assert VERIFY(folder) == (expected["entries"], expected["versions"], [])
    async with opened(objects) as store:
        report = await store.verify(blobs=True, full=True)
        assert (report.ok, report.entries, report.collected) == (True, expected["entries"], expected["collected"])
        catalog = await store.catalog()
        assert [v.step for v in catalog.versions] == [10, 20, 30, 40, 40]
        assert catalog.versions[4].parameters == {"training.learning_rate": 0.01}
        assert set(catalog.aliases) == {"production", "staging", *(f"many{i}" for i in range(5))}


async def test_an_earlier_ledger_is_appended_to(objects: MemoryObjectStore, folder: Path) -> None:
    async with opened(objects) as store:
        before = await store.list_versions()
        again = CommitRecord(ledger="x", commit_id=before[1].commit_id, message="m", step=1, loss=None)
        data = objects.objects[f"blobs/{before[3].content_hash}.safetensors"][0]
        assert (await store.ledger.find(again.commit_id)) is not None  # it is older than what a writer reads at opening
        version = await store.commit(data, CommitRecord(ledger="x", message="new", step=41, loss=None))
        assert version.counter == 5
        await store.tag("production", version)
        await store.ledger.append(Draft("collect", "c", {"content_hashes": []}))
        await store.ledger.append(Draft("seal", "later", {"by": "somebody"}))
    async with opened(objects) as store:
        entries = await store.list_entries()
        assert [e.fields.get("last_collect") for e in entries[-4:]] == [8, 8, 8, 276]
        assert (await store.verify(blobs=True)).ok
    for key, (value, _) in objects.objects.items():
        (folder / key).write_bytes(value)
    assert VERIFY(folder)[2] == []


async def test_a_checkpoint_of_an_earlier_version_is_served_and_resumed(
    objects: MemoryObjectStore, expected: dict[str, Any]
) -> None:
    contracts = np.array(expected["contracts"])
    tolerance = 1e-6 * contracts[:, 0]
    async with opened(objects) as store:
        version = (await store.list_versions())[-1]
        predictor = await load_predictor(store, version)
        for kind in ("put", "call"):
            prices = np.asarray(predictor.predict_price(contracts, kind))
            assert (np.abs(prices - expected["prices"][kind]) < tolerance).all()
        levels = predictor.predict_distribution(contracts).host_levels[:, ::8]
        assert (np.abs(levels - np.array(expected["levels_every_8th"])) < tolerance[:, None]).all()
        pricer = GbmCVNNPricer(await load_snapshot_from_checkpoint(store, version))
    pricer.train(small_training(20))
    prices = np.asarray(pricer.predict_price(contracts))
    assert (np.abs(prices - expected["prices_after_20_more"]) < tolerance).all()
