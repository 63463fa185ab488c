"""Runs, lineage and differences, and what is made of them: pictures, a page, TensorBoard's files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.errors import ConfigError, NotFound
from smc.learning.pricer import GbmCVNNPricer
from smc.reporting.history import Run, difference, lineage_lines, runs_of
from smc.reporting.ledger_tensorboard import write_history
from smc.reporting.pictures import save_lineage
from smc.reporting.report import report_page
from smc.reporting.training_tensorboard import folder_name
from smc.storage import AsyncBlockchainModelStore, ModelVersion, commit_snapshot
from smc.storage.chain import Draft, blob_key
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord
from tests.conftest import NO_DELAYS, small_config, small_training
from tests.event_files import events


async def committed(store: AsyncBlockchainModelStore, plan: list[tuple[str, int, str | None]]) -> list[ModelVersion]:
    return [
        await store.commit(
            f"{name} {step} {origin}".encode(),
            CommitRecord(ledger="x", message="m", step=step, loss=1 / step, experiment=name, resumed_from=origin),
        )
        for name, step, origin in plan
    ]


def opened() -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=MemoryObjectStore(), retry_delays=NO_DELAYS)


def shown(runs: list[Run]) -> list[tuple[str, list[int], int | None]]:
    return [(r.experiment, [v.counter for v in r.versions], r.origin.counter if r.origin else None) for r in runs]


async def test_runs_end_where_training_began_elsewhere() -> None:
    async with opened() as store:
        versions = await committed(
            store,
            [
                ("a", 10, None),
                ("b", 10, None),
                ("a", 20, None),
                ("b", 20, None),
                ("a", 30, "v0000000002"),  # resumed
                ("a", 40, "v0000000002"),
                ("c", 5, "v0000000001"),  # another experiment from b's first version
                ("b", 10, None),  # begun again
                ("a", 40, "v0000000004"),  # and from the middle of its second run
            ],
        )
    runs = runs_of(versions)
    assert shown(runs) == [
        ("a", [0, 2], None),
        ("b", [1, 3], None),
        ("a", [4, 5], 2),
        ("c", [6], 1),
        ("b", [7], None),
        ("a", [8], 4),
    ]
    lines = list(lineage_lines(runs))
    assert [re.sub(r", (steps?|loss).*", "", line) for line in lines] == [
        "a  v0000000000 to v0000000002, 2 versions",
        "└─ a  v0000000004 to v0000000005, 2 versions",
        "   └─ a  v0000000008, 1 version",
        "b  v0000000001 to v0000000003, 2 versions",
        "└─ c  v0000000006, 1 version",
        "b  v0000000007, 1 version",
    ]
    assert lines[1].endswith("steps 30 to 40, loss 2.500e-02, resumed from v0000000002")


async def test_an_experiment_resumed_a_thousand_times_is_shown() -> None:
    async with opened() as store:
        first = await committed(store, [("a", 1, None)])
        versions = [
            first[0].model_copy(update={"counter": i, "step": i + 1, "resumed_from": f"v{i - 1:010d}" if i else None})
            for i in range(1500)
        ]
    assert len(list(lineage_lines(runs_of(versions)))) == 1500


async def test_an_origin_of_another_ledger_is_none_here() -> None:
    async with opened() as store:
        versions = await committed(store, [("a", step, "v0000000002") for step in range(1, 6)])
    runs = runs_of(versions)
    assert shown(runs) == [("a", [0, 1, 2, 3, 4], None)]
    assert len(list(lineage_lines(runs))) == 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
async def test_a_lineage_is_drawn(kind: str, tmp_path: Path) -> None:
    async with opened() as store:
        versions = await committed(store, [("lr$_{0.1$", 1, None), ("lr$_{0.1$", 2, None), ("", 3, "v0000000001")])
    save_lineage(tmp_path / f"lineage.{kind}", runs_of(versions), {"best": versions[1]})
    assert (tmp_path / f"lineage.{kind}").stat().st_size > 3000
    with pytest.raises(ConfigError, match=r"a picture is a .png, .svg or .pdf"):
        save_lineage(tmp_path / "lineage.exe", runs_of(versions), {})


@pytest.fixture
def states() -> list[GbmCVNNPricerConfig]:
    one, two = GbmCVNNPricer(small_config()), GbmCVNNPricer(small_config(mc_seed=9))
    one.train(small_training(2))
    two.train(small_training(4, learning_rate=0.02))
    return [one.snapshot(), two.snapshot()]


async def test_a_difference_is_that_of_entries_settings_and_parameters(states: list[GbmCVNNPricerConfig]) -> None:
    async with opened() as store:
        a, b = [
            await commit_snapshot(store, state, f"m{i}", experiment="e", loss=float(i), metrics={"x": i})
            for i, state in enumerate(states)
        ]
        found = await difference(store, a, b)
        assert set(found.fields) == {"content_hash", "step", "loss", "metrics.x", "commit_message"}
        assert found.fields["step"] == (2, 4)
        assert found.settings["simulation.sim_params.mc_seed"] == (7, 9)
        assert found.settings["plan.config.learning_rate"] == (0.01, 0.02)
        assert not any(name.startswith("libraries") for name in found.settings)
        for tensor in found.tensors:
            one, two = (s.cvnn.state_dict()[tensor.name].double().numpy() for s in states)
            assert tensor.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(two)))
            assert tensor.distance == pytest.approx(np.linalg.norm(one - two))
        assert {t.name for t in found.tensors} == set(states[0].cvnn.state_dict())
        same = await difference(store, a, a)
        assert (same.fields, same.settings) == ({}, {})
        assert {t.distance for t in same.tensors} == {0.0}
        raw = await committed(store, [("raw", 1, None)])
        await store.objects.delete(blob_key(raw[0].content_hash))
        with pytest.raises(NotFound, match="the checkpoint of v0000000002 is not there"):
            await difference(store, a, raw[0])


@pytest.mark.slow
async def test_the_report_shows_what_there_is_and_needs_nothing_else(states: list[GbmCVNNPricerConfig]) -> None:
    async with opened() as store:
        empty = await report_page(store)
        assert empty.ok
        assert "It has no versions" in empty.html
        versions = [
            await commit_snapshot(store, state, "m", experiment=name, loss=0.5)
            for state, name in zip(states * 2, ("<one>", "two", "<one>", ""), strict=True)
        ]
        untagged = await report_page(store, contracts=64)
        assert "the newest version" in untagged.html
        await store.tag("best", versions[1], "it's <b>good</b>")
        found = await report_page(store, contracts=64, blobs=True)
        assert (found.versions, found.experiments, found.ok) == (4, 3, True)
        assert not re.search(r'(src|href)="(?!data:)', found.html)
        assert not re.search(r"url\(|@import|<script|<link rel=\"style", found.html)
        assert "&lt;one&gt;" in found.html
        assert "<one>" not in found.html
        assert "it&#x27;s &lt;b&gt;good&lt;/b&gt;" in found.html
        for text in (
            "Verified: 5 entries in 5 blocks, 2 checkpoints (the bytes",
            "v0000000001",
            "no experiment",
            "best",
        ):
            assert text in found.html
        assert found.html.count("<img") == 5
        with pytest.raises(ConfigError, match="contracts must be at least 8"):
            await report_page(store, contracts=7)

        await store.ledger.append(Draft("collect", "c", {"content_hashes": [versions[1].content_hash]}))
        await store.objects.delete(blob_key(versions[1].content_hash))
        collected = await report_page(store, contracts=64)
        assert not collected.ok  # no collector may delete what an alias names
        assert "best: s3://memory: the checkpoint of v0000000001 was collected, says entry 5" in collected.html
        await store.tag("other", versions[2])
        key = blob_key(versions[2].content_hash)
        data = await store.objects.get(key)
        await store.objects.put(key, bytes(data).replace(b"scaling.spread", b"scaling.bread_"))
        damaged = await report_page(store, contracts=64, blobs=True)
        assert not damaged.ok
        assert "other: blobs/" in damaged.html
        await store.objects.delete(key)
        lost = await report_page(store, contracts=64)
        assert not lost.ok
        assert "problems in" in lost.html
        assert "<h2>Experiments</h2>" in lost.html


async def test_tensorboards_files_hold_the_history(states: list[GbmCVNNPricerConfig], tmp_path: Path) -> None:
    async with opened() as store:
        with pytest.raises(NotFound, match="has no versions"):
            await write_history(store, tmp_path)
        for i in range(6):
            metrics = {"commit_seconds": 0.1 * i, "learning_rate": 0.01}
            state, name = states[i % 2], ("one", "../two")[i % 2]
            await commit_snapshot(store, state, "m", experiment=name, loss=1.0 / (i + 1), metrics=metrics)
        await committed(store, [("raw", 1, None)])  # whose newest version is no checkpoint
        for _ in range(2):  # written again it is the same, not twice
            assert await write_history(store, tmp_path) == {"one": 3, "../two": 3, "raw": 1}
            assert set(os.listdir(tmp_path)) == {folder_name("../two"), "one", "raw"}
            assert len(os.listdir(tmp_path / "one")) == 1
    found = events(tmp_path / "one")
    assert found["loss/by_version"] == pytest.approx({0: 1, 2: 1 / 3, 4: 1 / 5})
    assert list(found["loss/by_step"]) == [2]
    assert found["commit/seconds"][2] == pytest.approx(0.4)
    assert found["metrics/learning_rate"][2] == pytest.approx(0.01)
    assert found["learnt_and_exact"][2].encoded_image_string.startswith(b"\x89PNG")
    assert found["outcome/loss"][2] == pytest.approx(0.2)
    table = found["_hparams_/session_start_info"][0]
    assert b"training.learning_rate" in table
    assert b"simulation.sim_params.mc_seed" in table
    assert list(events(tmp_path / "raw")) == ["loss/by_step", "loss/by_version"]


async def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "lineage.png"
    path.write_bytes(b"the old one")
    async with opened() as store:
        runs = runs_of(await committed(store, [("a", 10, None)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            save_lineage(path, runs, {})
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["lineage.png"]


async def test_what_was_chosen_for_a_version_is_in_its_entry_and_in_a_difference() -> None:
    async with opened() as store:
        pricer = GbmCVNNPricer(small_config())
        pricer.train(small_training(2))
        a, b = [
            await commit_snapshot(store, pricer.snapshot(), "m", parameters={"width": {"hidden": n}, "same": "x"})
            for n in (16, 32)
        ]
        assert a.parameters == {"width": {"hidden": 16}, "same": "x"}
        found = await difference(store, a, b)
        assert found.fields == {"parameters.width.hidden": (16, 32)}
        with pytest.raises(ConfigError, match=r"parameters\.a"):
            await commit_snapshot(store, pricer.snapshot(), "m", parameters={"a": float("nan")})
