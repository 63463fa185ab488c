from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from smc.checkpoint import Snapshot, decode
from smc.commits import BackgroundCommits, CommitOutcome, CommitRequest, check_template
from smc.errors import Busy, ConfigError, Corrupt, Unavailable
from smc.spool import CommitRecord, Spool
from tests.conftest import small_config


class SlowLedger:
    """A target whose commits wait for `gate`, and fail for the steps in `failing`."""

    def __init__(self, *, failing: tuple[int, ...] = (), opens: bool = True) -> None:
        self.uri = "s3://slow"
        self.gate = threading.Event()
        self.gate.set()
        self.appended: list[int] = []
        self.replaced = 0
        self.busy = 0
        self._failing, self._opens = failing, opens

    @asynccontextmanager
    async def committer(self) -> AsyncIterator[SlowLedger]:
        if not self._opens:
            raise Unavailable("cannot connect")
        yield self

    async def upload(self, data: bytes) -> tuple[str, int]:
        await asyncio.to_thread(self.gate.wait)
        return "0" * 64, len(data)

    async def append(self, record: CommitRecord, content_hash: str, size: int) -> str:
        if self.busy:
            self.busy -= 1
            raise Busy("queue full", retry_after=0.01)
        if record.step in self._failing:
            raise Unavailable("503 slow down")
        await asyncio.sleep(0.001 * (record.step % 3))
        self.appended.append(record.step)
        return f"v{len(self.appended) - 1:010d}"

    async def note_replaced(self, count: int) -> None:
        self.replaced += count


SNAPSHOT = Snapshot.of(small_config())


def submit(sink: BackgroundCommits, step: int, *, final: bool = False) -> Future[CommitOutcome]:
    record = CommitRecord(ledger="s3://slow", message=f"step {step}", step=step, loss=0.1)
    return sink.submit(CommitRequest(SNAPSHOT, record, final))


def test_commits_are_made_in_the_order_they_were_submitted() -> None:
    target = SlowLedger()
    sink = BackgroundCommits(target, max_waiting=100)
    futures = [submit(sink, step) for step in range(30)]
    sink.close()
    assert target.appended == list(range(30))
    assert [f.result().version_id for f in futures] == [f"v{i:010d}" for i in range(30)]


def test_when_the_ledger_is_behind_the_oldest_waiting_snapshot_is_replaced_and_the_final_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = SlowLedger()
    target.gate.clear()
    sink = BackgroundCommits(target, max_started=1, max_waiting=2)
    first = submit(sink, 0)
    while sink._waiting:
        pass
    final = submit(sink, 1, final=True)
    later = [submit(sink, step) for step in (2, 3, 4, 5)]
    with caplog.at_level(logging.WARNING):
        target.gate.set()
        sink.close()
    statuses = [f.result().status for f in (first, final, *later)]
    assert statuses == ["committed", "committed", "replaced", "replaced", "replaced", "committed"]
    assert target.appended == [0, 1, 5]
    assert target.replaced == 3
    assert "Commit at step 2 replaced by step 3" in caplog.text


def test_a_failed_commit_is_logged_and_spooled_and_the_next_one_goes_on(
    caplog: pytest.LogCaptureFixture, own_spool: Path
) -> None:
    target = SlowLedger(failing=(1,))
    sink = BackgroundCommits(target)
    outcomes = [submit(sink, step) for step in range(3)]
    sink.close()
    assert [f.result().status for f in outcomes] == ["committed", "failed", "committed"]
    assert "Failed to commit at step 1: 503 slow down" in caplog.text
    failed = outcomes[1].result()
    assert failed.reason == "503 slow down"
    assert failed.spooled is not None
    (record,) = Spool().records()
    assert record.step == 1
    assert decode(Spool().load(record)).metadata.global_step == 0
    assert Path(failed.spooled).parent == own_spool


def test_a_target_that_cannot_be_opened_spools_everything() -> None:
    sink = BackgroundCommits(SlowLedger(opens=False))
    outcomes = [submit(sink, step) for step in range(2)]
    sink.close()
    assert [f.result().status for f in outcomes] == ["failed", "failed"]
    assert [record.step for record in Spool().records()] == [0, 1]


def test_a_spool_that_cannot_be_written_is_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    sink = BackgroundCommits(SlowLedger(failing=(0,)), spool=Spool(blocked))
    outcome = submit(sink, 0)
    sink.close()
    assert outcome.result().spooled is None
    assert "could not be kept either" in caplog.text


def test_a_busy_ledger_is_asked_again() -> None:
    target = SlowLedger()
    target.busy = 3
    sink = BackgroundCommits(target)
    outcome = submit(sink, 1)
    sink.close()
    assert outcome.result().status == "committed"
    assert target.busy == 0


def test_submitting_after_close_is_a_mistake() -> None:
    sink = BackgroundCommits(SlowLedger())
    sink.close()
    with pytest.raises(RuntimeError, match="after close"):
        submit(sink, 1)


def test_closing_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    sink = BackgroundCommits(SlowLedger())
    submit(sink, 1)
    names = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert "smc-commits" in names
    sink.close()
    # By name: servers that other tests left running start threads of their own at any time.
    left = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert left.isdisjoint({"smc-commits", "smc-encode", "asyncio"})


def test_the_spool_keeps_and_forgets(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "b")
    assert list(spool.records()) == []
    record = CommitRecord(ledger="s3://x", message="m", step=3, loss=None, metrics={"a": 1.0})
    spool.save(record, b"bytes")
    assert list(spool.records()) == [record]
    assert spool.load(record) == b"bytes"
    spool.remove(record)
    assert list(spool.records()) == []
    assert list(spool.directory.iterdir()) == []


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
    "template", ["{epoch}", "{step", "{loss:.4q}", "{step:.2s}", "{}", "{0}", "{step.real}", "{loss[0]}", "{step!z}"]
)
def test_bad_templates_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="commit_message_template"):
        check_template(template)
