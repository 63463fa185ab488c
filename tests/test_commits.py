from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smc.checkpoint.file import Snapshot, encode, metadata_of, tensors_of
from smc.errors import Busy, ConfigError, Corrupt, Unavailable
from smc.storage.commits import (
    BackgroundCommits,
    CommitOutcome,
    CommitRequest,
    check_entry,
    check_template,
    slots_for,
)
from smc.storage.limits import LIMITS
from smc.storage.pace import Pace
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import small_config


class SlowLedger:
    """A target whose commits wait for `gate`, and fail for the steps in `failing`."""

    def __init__(self, *, failing: tuple[int, ...] = (), opens: bool = True, hangs: str = "") -> None:
        self.uri = "s3://slow"
        self.gate = threading.Event()
        self.gate.set()
        self.uploads: list[bytes] = []
        self.appended: list[CommitRecord] = []
        self.settlements: list[CommitOutcome] = []
        self.busy = 0
        self._failing, self._opens, self._hangs = failing, opens, hangs

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.appended]

    @asynccontextmanager
    async def committer(self) -> AsyncIterator[SlowLedger]:
        if not self._opens:
            raise Unavailable("cannot connect")
        if self._hangs == "opening":
            await asyncio.sleep(3600)
        yield self
        if self._hangs == "closing":
            await asyncio.sleep(3600)

    async def put(self, data: memoryview) -> memoryview:
        return data

    async def upload(self, data: memoryview) -> tuple[str, int]:
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        self.uploads.append(bytes(data))
        return "0" * 64, len(data)

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        if self.busy:
            self.busy -= 1
            raise Busy("queue full", retry_after=0.01)
        if record.step in self._failing:
            raise Unavailable("503 slow down")
        await asyncio.sleep(0.001 * (record.step % 3))
        self.appended.append(record)
        return f"v{len(self.appended) - 1:010d}"

    def settled(self, outcome: CommitOutcome, experiment: str) -> None:
        self.settlements.append(outcome)


STATE = small_config()


def commits_to(target: SlowLedger, slots: int = 8, **settings: Any) -> BackgroundCommits:
    return BackgroundCommits(target, tensors_of(STATE), metadata_of(STATE), slots=slots, **settings)


def submit(
    commits: BackgroundCommits, step: int, *, final: bool = False, loss: float = 0.1, finite: bool = True, **more: Any
) -> None:
    outcome = torch.tensor([loss, loss if finite else float("nan")], dtype=torch.float64)
    template = "step {step}: {loss:.1f}"
    request = CommitRequest(step=step, batch=step, template=template, experiment="e", final=final, **more)
    commits.submit(request, tensors_of(STATE), metadata_of(replace(STATE, global_step=step)), outcome)


def test_commits_are_made_in_the_order_they_were_submitted() -> None:
    target = SlowLedger()
    commits = commits_to(target, 40)
    for step in range(30):
        submit(commits, step)
    outcomes = commits.close()
    assert target.steps == list(range(30))
    assert [outcome.version_id for outcome in outcomes] == [f"v{i:010d}" for i in range(30)]
    assert commits.pending == 0
    assert commits.close() == outcomes


def test_an_entry_says_what_was_asked_for_and_the_snapshots_own_loss() -> None:
    target = SlowLedger()
    commits = commits_to(target)
    submit(commits, 3, loss=2.5)
    (outcome,) = commits.close()
    (record,) = target.appended
    assert (record.message, record.loss, record.experiment) == ("step 3: 2.5", 2.5, "e")
    assert target.uploads == [encode(Snapshot.of(replace(STATE, global_step=3)))]
    assert target.settlements == [outcome]


def test_when_the_ledger_is_behind_the_oldest_waiting_snapshot_is_replaced_and_the_final_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = SlowLedger()
    target.gate.clear()
    commits = commits_to(target, 3)
    submit(commits, 0)
    while commits._waiting:
        pass
    submit(commits, 1, final=True)
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4, 5):
            submit(commits, step)
        assert commits.pending == 3
        target.gate.set()
        outcomes = commits.close()
    assert [o.status for o in outcomes] == ["committed", "committed", "replaced", "replaced", "replaced", "committed"]
    assert target.steps == [0, 1, 5]
    assert [o.step for o in target.settlements if o.status == "replaced"] == [2, 3, 4]
    assert "Commit at step 2: replaced by step 3, the ledger is behind; 1 replaced so far" in caplog.text
    assert caplog.text.count("the ledger is behind") == 1, "said now and then, not for each"


def test_a_final_snapshot_waits_for_room() -> None:
    target = SlowLedger()
    target.gate.clear()
    commits = commits_to(target, 1)
    submit(commits, 0)
    while commits._waiting:
        pass
    submit(commits, 1)
    threading.Timer(0.1, target.gate.set).start()
    submit(commits, 2, final=True)
    outcomes = commits.close()
    assert [(o.step, o.status) for o in outcomes] == [(0, "committed"), (1, "replaced"), (2, "committed")]
    assert outcomes[1].reason == "there was no room for it"


def test_memory_is_bounded_by_size_and_number() -> None:
    def slots(size: int) -> int:
        tensors = {"a": torch.empty(size, dtype=torch.uint8, device="meta")}
        return slots_for(tensors)

    assert [slots(size) for size in (1, 2**28, 300 * 2**20, 2**30, 2**40)] == [8, 8, 6, 2, 2]


def test_a_failed_commit_is_logged_and_spooled_and_the_next_one_goes_on(
    caplog: pytest.LogCaptureFixture, own_spool: Path
) -> None:
    target = SlowLedger(failing=(1,))
    commits = commits_to(target)
    for step in range(3):
        submit(commits, step)
    outcomes = commits.close()
    assert [o.status for o in outcomes] == ["committed", "failed", "committed"]
    assert "Failed to commit at step 1: 503 slow down" in caplog.text
    failed = outcomes[1]
    assert failed.reason == "503 slow down"
    assert failed.spooled is not None
    (record,) = Spool().records()
    assert record.step == 1
    assert Spool().load(record) == target.uploads[1]
    assert Path(failed.spooled).parent == own_spool


def test_what_is_not_settled_in_time_is_spooled_under_the_id_it_was_tried_with() -> None:
    target = SlowLedger()
    commits = commits_to(target, 4)
    submit(commits, 0)
    while not target.steps:
        time.sleep(0.001)
    target.gate.clear()
    for step in (1, 2, 3):
        submit(commits, step, final=step == 3)
    started = time.monotonic()
    outcomes = commits.close(0.2)
    assert time.monotonic() - started < 5
    assert [o.status for o in outcomes] == ["committed", "failed", "failed", "failed"]
    assert {o.reason for o in outcomes[1:]} == {"not in the ledger 0.2 s after the last step"}
    assert [r.step for r in Spool().records()] == [1, 2, 3]


def test_in_a_hurry_the_newest_snapshot_has_the_time_and_replaces_the_others() -> None:
    target = SlowLedger()
    commits = commits_to(target, 8)
    target.gate.clear()
    for step in range(8):
        submit(commits, step, final=step == 7)
    while len(commits._running) < 4:
        time.sleep(0.001)
    opened = threading.Timer(0.3, target.gate.set)
    opened.start()
    commits.hurry(5.0)
    outcomes = commits.close()
    assert [o.status for o in outcomes] == ["replaced"] * 7 + ["committed"]
    assert {o.reason for o in outcomes[:7]} == {"replaced by step 7"}
    assert target.steps == [7]
    assert list(Spool().records()) == []


def test_a_hurry_shortens_a_wait_that_has_begun() -> None:
    target = SlowLedger()
    commits = commits_to(target)
    target.gate.clear()
    submit(commits, 1, final=True)
    threading.Timer(0.2, commits.hurry, (0.1,)).start()
    started = time.monotonic()
    (outcome,) = commits.close(60.0)
    assert time.monotonic() - started < 5
    assert outcome.reason == "not in the ledger 0.1 s after the last step"
    assert outcome.spooled is not None
    commits.hurry(1.0)  # too late to matter


class FirstUploads(SlowLedger):
    """The first uploads come to what is given here: seconds that they take, or an error."""

    def __init__(self, *ends: float | Exception) -> None:
        super().__init__()
        self._ends = list(ends)

    async def upload(self, data: memoryview) -> tuple[str, int]:
        end = self._ends.pop(0) if self._ends else 0.0
        if isinstance(end, Exception):
            raise end
        await asyncio.sleep(end)
        return await super().upload(data)


def test_a_commit_that_fails_lets_none_after_it_overtake_those_before() -> None:
    target = FirstUploads(0.3, Unavailable("503 slow down"))
    commits = commits_to(target)
    for step in (1, 2, 3):
        submit(commits, step, final=step == 3)
    outcomes = commits.close()
    assert [outcome.status for outcome in outcomes] == ["committed", "failed", "committed"]
    assert target.steps == [1, 3]


def test_a_hurry_lets_what_is_being_kept_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    save, keeping = Spool.save, threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Path:
        keeping.set()
        time.sleep(0.2)
        return save(*arguments, **options)

    monkeypatch.setattr(Spool, "save", slowly)
    target = FirstUploads(Unavailable("503 slow down"))
    commits = commits_to(target)
    submit(commits, 1)
    assert keeping.wait(5)
    submit(commits, 2, final=True)
    commits.hurry(5.0)
    first, last = commits.close()
    assert (first.status, last.status) == ("failed", "committed")
    assert first.spooled is not None
    assert [outcome.step for outcome in target.settlements] == [1, 2]
    assert commits.pending == 0


def test_in_a_hurry_nothing_is_replaced_by_what_cannot_be_committed() -> None:
    target = SlowLedger()
    target.gate.clear()
    commits = commits_to(target)
    submit(commits, 1)
    submit(commits, 2, finite=False)
    submit(commits, 3, finite=False)
    threading.Timer(0.2, target.gate.set).start()
    commits.hurry(5.0)
    assert [outcome.status for outcome in commits.close()] == ["committed", "failed", "failed"]
    assert target.steps == [1]


def test_tensors_of_another_state_are_refused_and_not_counted() -> None:
    commits = commits_to(SlowLedger())
    with pytest.raises(ConfigError, match="other names, types or shapes"):
        commits.submit(CommitRequest(step=1, batch=1), {"w": torch.zeros(3)}, metadata_of(STATE), torch.zeros(2))
    assert commits.pending == 0
    assert commits.close() == ()


@pytest.mark.parametrize("hangs", ["opening", "closing"])
def test_a_connection_that_hangs_holds_up_nobody_beyond_the_deadline(
    hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMITS, "opening", 0.1)
    commits = commits_to(SlowLedger(hangs=hangs))
    submit(commits, 1, final=True)
    started = time.monotonic()
    (outcome,) = commits.close(0.3)
    assert time.monotonic() - started < 4
    assert outcome.status == ("failed" if hangs == "opening" else "committed")
    assert [record.step for record in Spool().records()] == ([1] if hangs == "opening" else [])


def test_what_cannot_be_encoded_is_an_outcome_and_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    commits = commits_to(SlowLedger(), 2)
    for step in range(4):
        submit(commits, step, parameters={"x": {1, 2}})
        while commits.pending:
            time.sleep(0.001)
    submit(commits, 4, final=True)
    outcomes = commits.close()
    assert [o.status for o in outcomes] == ["failed"] * 4 + ["committed"]
    assert "could not be kept either" in caplog.text


def test_what_is_being_kept_does_not_keep_the_deadline_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, save = threading.Event(), Spool.save

    def slow_save(self: Spool, *arguments: Any, **more: Any) -> Path:
        kept.set()
        time.sleep(0.5)
        return save(self, *arguments, **more)

    monkeypatch.setattr(Spool, "save", slow_save)
    target = SlowLedger(failing=(0,))
    commits = commits_to(target, 8)
    submit(commits, 0)
    assert kept.wait(5)
    target.gate.clear()
    for step in (1, 2, 3):
        submit(commits, step)
    started = time.monotonic()
    outcomes = commits.close(0.1)
    assert time.monotonic() - started < 10
    assert [o.status for o in outcomes] == ["failed"] * 4


def test_a_snapshot_after_a_loss_that_is_not_finite_is_not_committed() -> None:
    target = SlowLedger()
    commits = commits_to(target)
    submit(commits, 0)
    submit(commits, 1, finite=False)
    outcomes = commits.close()
    assert [o.status for o in outcomes] == ["committed", "failed"]
    assert outcomes[1].reason == "not committed: a loss up to step 1 is not finite"
    assert outcomes[1].spooled is None
    assert target.steps == [0]


def test_the_seconds_of_every_stage_are_known() -> None:
    commits = commits_to(SlowLedger())
    submit(commits, 2)
    (outcome,) = commits.close()
    seconds = asdict(outcome.seconds)
    assert seconds.pop("copy") is None, "there is no device to copy from"
    assert all(value is not None and 0 <= value < 5 for value in seconds.values())
    total = seconds.pop("acknowledged")
    assert total >= sum(seconds.values()) - seconds["clone"]


def test_a_target_that_cannot_be_opened_spools_everything() -> None:
    commits = commits_to(SlowLedger(opens=False))
    for step in range(2):
        submit(commits, step)
    assert [o.status for o in commits.close()] == ["failed", "failed"]
    assert [record.step for record in Spool().records()] == [0, 1]


def test_a_spool_that_cannot_be_written_is_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    commits = commits_to(SlowLedger(failing=(0,)), spool=Spool(blocked))
    submit(commits, 0)
    assert commits.close()[0].spooled is None
    assert "could not be kept either" in caplog.text


def test_a_busy_ledger_is_asked_again() -> None:
    target = SlowLedger()
    target.busy = 3
    commits = commits_to(target)
    submit(commits, 1)
    assert commits.close()[0].status == "committed"
    assert target.busy == 0


def test_submitting_after_close_is_a_mistake() -> None:
    commits = commits_to(SlowLedger())
    commits.close()
    with pytest.raises(RuntimeError, match="after close"):
        submit(commits, 1)


def test_commits_that_took_their_share_of_the_processor_pause_without_taking_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Costly(SlowLedger):
        async def upload(self, data: memoryview) -> tuple[str, int]:
            busy_until = time.thread_time() + 0.2
            while time.thread_time() < busy_until:
                pass
            uploads.append(time.monotonic())
            return await super().upload(data)

    def delay(pace: Pace, now: float) -> float:
        looks.append(time.monotonic())
        return measured(pace, now)

    uploads: list[float] = []
    looks: list[float] = []
    measured = Pace.delay
    monkeypatch.setattr(Pace, "delay", delay)
    commits = commits_to(Costly())
    for step in (1, 2):
        submit(commits, step)
        while len(uploads) < step:
            time.sleep(0.01)
    commits.close()
    began = uploads[1] - 0.2
    assert began - uploads[0] > 0.25  # (0.2 - 0.1) / 0.1 seconds, less what the machine was busy with meanwhile
    assert len([look for look in looks if uploads[0] < look < began]) < 10


def test_closing_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    commits = commits_to(SlowLedger())
    submit(commits, 1)
    names = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert "smc-commits" in names
    commits.close()
    # By name: servers that other tests left running start threads of their own at any time.
    left = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert left.isdisjoint({"smc-commits", "smc-encode", "asyncio"})


def test_the_spool_keeps_and_forgets(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "b")
    assert list(spool.records()) == []
    record = CommitRecord(ledger="s3://x", message="m", step=3, loss=None, metrics={"a": 1.0})
    spool.save(record, b"bytes")
    (kept,) = spool.records()
    assert kept.model_dump(exclude={"content_hash"}) == record.model_dump()
    assert spool.load(kept) == b"bytes"
    spool.remove(kept)
    assert list(spool.records()) == []
    assert list(spool.directory.iterdir()) == []


def test_a_spool_on_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls != 2:  # the first file of the first commit; the record of the second
            raise OSError(28, "No space left on device")

    spool = Spool(tmp_path)
    record = CommitRecord(ledger="s3://x", message="m", step=3, loss=None)
    monkeypatch.setattr("os.fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            spool.save(record, b"bytes")
    assert calls == 3
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_a_disk_is_for_final_snapshots(
    monkeypatch: pytest.MonkeyPatch, own_spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = 0

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free)

    monkeypatch.setattr("shutil.disk_usage", usage)
    commits = commits_to(SlowLedger(failing=(0, 1)))
    submit(commits, 0)
    submit(commits, 1, final=True)
    outcomes = commits.close()
    assert [outcome.spooled is not None for outcome in outcomes] == [False, True]
    assert "Snapshot of step 0 could not be kept either: [Errno 28] what is left of the disk is for" in caplog.text
    size = (own_spool / outcomes[1].spooled).stat().st_size  # type: ignore[operator]
    free = 9 * size
    commits = commits_to(SlowLedger(failing=(0,)))
    submit(commits, 0)
    assert commits.close()[0].spooled is not None


def test_a_half_written_spool_entry_is_not_a_commit(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    (tmp_path / "abc.safetensors.part").write_bytes(b"half")
    (tmp_path / "def.safetensors").write_bytes(b"no record yet")
    assert list(spool.records()) == []
    (tmp_path / "ghi.json").write_text("{}")
    with pytest.raises(Corrupt, match="is not a commit record"):
        list(spool.records())


@pytest.mark.parametrize(
    "template", ["step {step}", "{loss:.4f} {batch:>5d}", "v{step}: {loss!r}", "plain", "{{braces}}"]
)
def test_good_templates_are_accepted(template: str) -> None:
    check_template(template)


@pytest.mark.parametrize(
    "template",
    ["{epoch}", "{step", "{loss:.4q}", "{step:.2s}", "{}", "{0}", "{step.real}", "{loss[0]}", "{step!z}", "{step:c}"],
)
def test_bad_templates_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="commit_message_template"):
        check_template(template)


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [("\ud800", {}), ("e", {"seed": 2**64}), ("e", {"\ud800": 1}), ("e", {"name": "\ud800"}), ("e", {"f": len})],
)
def test_what_no_entry_can_hold_is_refused_before_training(experiment: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="an entry holds what JSON does"):
        check_entry(experiment, parameters)
