"""A taken snapshot is what a synchronous save would have written then, and its memory is bounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from smc.checkpoint import Snapshot, encode, metadata_of, tensors_of
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.snapshots import SnapshotRing, TakenSnapshot
from tests.conftest import small_config, small_training

OUTCOME = torch.tensor([0.25, 1.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def state() -> GbmCVNNPricerConfig:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(3))
    return pricer.snapshot()


def ring_of(state: GbmCVNNPricerConfig, slots: int) -> SnapshotRing:
    return SnapshotRing(tensors_of(state), metadata_of(state), slots=slots)


def taken(ring: SnapshotRing, state: GbmCVNNPricerConfig) -> TakenSnapshot | None:
    return ring.take(tensors_of(state), metadata_of(state), OUTCOME)


def test_a_thousand_snapshots_equal_synchronous_saves_while_the_state_changes(state: GbmCVNNPricerConfig) -> None:
    ring, rng = ring_of(state, 4), np.random.default_rng(0)
    tensors = [t for t in tensors_of(state).values() if t.is_floating_point()]
    with ThreadPoolExecutor(2) as encoders:

        def written(snapshot: TakenSnapshot) -> bytes:
            data = bytes(snapshot.file())
            snapshot.release()
            return data

        waiting: list[tuple[bytes, object]] = []
        for trial in range(1000):
            now = replace(state, global_step=int(rng.integers(10 ** rng.integers(1, 12))))
            saved = encode(Snapshot.of(now))
            snapshot = taken(ring, now)
            assert snapshot is not None
            future = encoders.submit(written, snapshot)
            for tensor in rng.permutation(len(tensors))[:3]:  # the next step, at any time
                tensors[tensor].add_(float(rng.normal()))
            waiting.append((saved, future))
            if len(waiting) == 3:
                for expected, result in waiting:
                    assert result.result() == expected, trial  # type: ignore[attr-defined]
                waiting.clear()


def test_there_is_room_for_so_many_and_memory_is_used_again(state: GbmCVNNPricerConfig) -> None:
    ring = ring_of(state, 2)
    first, second = taken(ring, state), taken(ring, state)
    assert first is not None
    assert second is not None
    assert taken(ring, state) is None
    address = torch.frombuffer(first.file(), dtype=torch.uint8).data_ptr()
    first.release()
    first.release()  # no harm
    third = taken(ring, state)
    assert third is not None
    assert taken(ring, state) is None
    assert torch.frombuffer(third.file(), dtype=torch.uint8).data_ptr() == address


def test_it_knows_the_loss_and_whether_all_were_finite(state: GbmCVNNPricerConfig) -> None:
    ring = ring_of(state, 1)
    for loss, finite in ((0.25, True), (float("nan"), False)):
        outcome = torch.tensor([loss, loss if finite else float("nan")], dtype=torch.float64)
        snapshot = ring.take(tensors_of(state), metadata_of(state), outcome)
        assert snapshot is not None
        assert snapshot.loss == pytest.approx(loss, nan_ok=True)
        assert snapshot.finite is finite
        snapshot.release()


def test_a_header_that_outgrew_its_room_is_written_all_the_same(state: GbmCVNNPricerConfig) -> None:
    ring = ring_of(state, 1)
    long = metadata_of(state).model_copy(update={"model_class": "x" * 10_000})
    snapshot = ring.take(tensors_of(state), long, OUTCOME)
    assert snapshot is not None
    assert bytes(snapshot.file()) == encode(Snapshot(tensors_of(state), long))
