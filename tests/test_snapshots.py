"""A taken snapshot is what a synchronous save would have written then, and its memory is bounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from smc.checkpoint.file import Snapshot, encode, metadata_of, tensors_of
from smc.checkpoint.ring import SnapshotRing, TakenSnapshot
from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.learning.pricer import GbmCVNNPricer
from smc.learning.state import TrainingState
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


def snapshots_that_differ(device: str, trials: int) -> list[int]:
    """Trials in which a snapshot, read while training goes on, is not what a synchronous save at its step wrote."""
    state, rng = TrainingState(small_config(device)), np.random.default_rng(0)
    training = small_training(10 * trials)
    different = []
    with ExitStack() as stack:
        stack.enter_context(state.own_random_numbers())
        step = stack.enter_context(state.training_step(training, state.enter_plan(training)))
        readers = stack.enter_context(ThreadPoolExecutor(2))
        step()
        ring = ring_of(state.by_reference(), 4)

        def read(snapshot: TakenSnapshot) -> bytes:
            data = bytes(snapshot.file())
            assert snapshot.finite
            snapshot.release()
            return data

        for trial in range(trials):
            for _ in range(rng.integers(0, 4)):
                step()
            now = state.by_reference()
            saved = encode(Snapshot.of(now)) if trial % 2 else None
            snapshot = ring.take(tensors_of(now), metadata_of(now), step.outcome())
            assert snapshot is not None
            saved = saved or encode(Snapshot.of(now))
            reading = readers.submit(read, snapshot)
            for _ in range(rng.integers(1, 4)):
                step()
            if reading.result() != saved:
                different.append(trial)
        ring.close()
    return different


@pytest.mark.long
def test_a_thousand_snapshots_equal_synchronous_saves_while_training_goes_on() -> None:
    assert snapshots_that_differ("cpu", 1000) == []


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
