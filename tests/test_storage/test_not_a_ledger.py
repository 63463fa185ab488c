"""What is no S3, no ledger, no spool record or no file is said for what it is, in one line, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.errors import ConfigError, Corrupt, NotFound
from smc.learning.pricer import GbmCVNNPricer
from smc.reporting.command_line import shown
from smc.reporting.training_tensorboard import folder_name
from smc.storage import AsyncBlockchainModelStore, commit_snapshot, recover
from smc.storage.__main__ import main
from smc.storage.chain import blob_key
from smc.storage.commits import check_entry, check_template
from smc.storage.dev_server import DevServer
from smc.storage.gc import RetentionPolicy, collect, plan_collection
from smc.storage.objects import MemoryObjectStore
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import NO_DELAYS, small_config, small_training


def record(name: str, **changes: Any) -> CommitRecord:
    return CommitRecord(
        **{"ledger": "s3://memory", "commit_id": name, "message": name, "step": 1, "loss": None, **changes}
    )


def opened(objects: Any) -> AsyncBlockchainModelStore:
    return AsyncBlockchainModelStore("memory", objects=objects, retry_delays=NO_DELAYS)


# --- is this S3? -----------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "empty": (200, {}, b""),
    "page": (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html><body><p>Welcome<br></body></html>"),
    "xhtml": (
        200,
        {"Content-Type": "application/xhtml+xml"},
        b"<html xmlns='http://www.w3.org/1999/xhtml'><body/></html>",
    ),
    "json": (200, {"Content-Type": "application/json"}, b'{"ok": true}'),
    "other xml": (200, {"Content-Type": "application/xml"}, b"<Result><Item>1</Item></Result>"),
    "login": (302, {"Location": "https://login.example/sign-in"}, b""),
    "moved": (301, {"Location": "https://elsewhere.example/"}, b""),
    "for ever": (307, {"Location": "SELF"}, b""),
    "permanent": (308, {"Location": "SELF"}, b""),
    "see other": (303, {"Location": "/login"}, b"<html>login</html>"),
    "not found page": (404, {"Content-Type": "text/html"}, b"<html>404</html>"),
    "teapot": (418, {}, b"short and stout"),
}


@pytest.fixture(params=ANSWERS)
def impostor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that is no S3: it gives every request the same answer."""
    status, headers, body = ANSWERS[request.param]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                here = f"http://127.0.0.1:{server.server_port}{self.path}"
                self.send_header(name, value.replace("SELF", here))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    for name, value in (("ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"), ("ACCESS_KEY_ID", "x"),
                        ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    yield str(request.param)
    server.shutdown()
    server.server_close()


COMMANDS = [
    ["verify", "bucket"],
    ["list-versions", "bucket"],
    ["gc-run", "bucket", "5", "--yes"],
    ["tag", "bucket", "best", "head"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_what_is_no_s3_is_said_in_one_line(
    impostor: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    if impostor in ("login", "moved"):
        assert ANSWERS[impostor][1]["Location"] in captured.err
    if impostor in ("empty", "xhtml", "other xml"):  # botocore takes what is no XML for a failure that passes
        assert "does not answer like S3" in captured.err


@pytest.mark.parametrize("name", ["zz", "A", "has_underscore", "x" * 64, "a/b", "", "-a", "192.168.1.1/x"])
def test_a_bucket_that_s3_forbids_is_refused_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        DevServer(tmp_path, buckets=(name,))


@pytest.mark.service
def test_the_dev_server_is_asked_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with DevServer(tmp_path, buckets=("one",)) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert main(["verify", "one"]) == 2  # it answered: there is no ledger


# --- is this the ledger? -----------------------------------------------------------------------------------


async def test_checkpoints_without_a_log_are_a_fault_and_stay() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        for i in range(3):
            await store.commit(b"checkpoint %d" % i, record(f"c{i}"))
    for key in [key for key in objects.objects if not key.startswith("blobs/")]:
        await objects.delete(key)
    whole = dict(objects.objects)
    async with opened(objects) as store:
        assert (await store.verify()).problems == [("log/", "there is no log, and there are 3 checkpoints")]
        for work in (plan_collection, collect):
            with pytest.raises(Corrupt, match="3 checkpoints and no version: the log is gone"):
                await work(store, RetentionPolicy(keep_last=1, min_age=timedelta(0)))
    assert {k: v for k, v in objects.objects.items() if k.startswith("blobs/")} == whole


async def test_a_version_whose_checkpoint_is_gone_is_not_tagged() -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        version = await store.commit(b"gone", record("a"))
        await objects.delete(blob_key(version.content_hash))
        with pytest.raises(NotFound, match="the checkpoint of v0000000000 is not there"):
            await store.tag("best", version)
        assert (await store.catalog()).aliases == {}


async def test_a_bucket_that_keeps_earlier_versions_frees_nothing() -> None:
    class Versioned(MemoryObjectStore):
        async def delete(self, key: str) -> bool:
            await super().delete(key)
            return False

    async with opened(Versioned()) as store:
        for i in range(4):
            await store.commit(b"checkpoint %d" % i, record(f"c{i}"))
        result = await collect(store, RetentionPolicy(keep_last=1, min_age=timedelta(0)))
        assert (result.deleted, result.freed) == (2, False)


# --- the spool -----------------------------------------------------------------------------------------------

BAD_RECORDS: dict[str, Any] = {
    "empty.json": b"",
    "cut.json": b'{"ledger": "s3://mem',
    "other.json": b'{"name": "another program"}',
    "list.json": b"[]",
    "binary.json": b"\xff\xfe\x00",
    "folder.json": None,
    "renamed.json": "record",
    "future.json": b'{"ledger":"s3://memory","message":"m","step":1,"loss":null,"unknown":1}',
    "wrong.json": b'{"ledger":"s3://memory","message":5,"step":"x","loss":null}',
    "deep.json": b"[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_RECORDS)
async def test_one_bad_record_does_not_stop_the_others(name: str, tmp_path: Path) -> None:
    spool, bad = Spool(tmp_path), tmp_path / name
    for good in ("a", "b", "z"):
        spool.save(record(good), good.encode())
    if BAD_RECORDS[name] is None:
        bad.mkdir()
    elif BAD_RECORDS[name] == "record":
        bad.write_bytes((tmp_path / "a.json").read_bytes())
    else:
        bad.write_bytes(BAD_RECORDS[name])
    async with opened(MemoryObjectStore()) as store:
        with pytest.raises(Corrupt, match=f"spool: .*{name}"):
            await recover(store, spool)
        assert {v.commit_id for v in await store.list_versions()} == {"a", "b", "z"}
    assert set(os.listdir(tmp_path)) == {name}


async def test_what_the_ledger_refuses_stays_in_the_spool_and_the_rest_goes_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.save(record("a", message="x" * 70_000), b"a")
    spool.save(record("b"), b"b")
    async with opened(MemoryObjectStore()) as store:
        with pytest.raises(Corrupt, match=r"spool: a: a commit entry of .* bytes: 64,000 are allowed"):
            await recover(store, spool)
        assert [v.commit_id for v in await store.list_versions()] == ["b"]
    assert set(os.listdir(tmp_path)) == {"a.json", "a.safetensors"}


@pytest.mark.parametrize(
    "template",
    ["\udce9", "step {step} \ud800", "{loss:>{step}}", "{step:>1000000000}", "{loss:.999999999f}", "{step:{batch}}",
     "x" * 3000, "{epoch}", "{0}", "{}", "{step.real}", "{step!z}", "{loss:q}", "{step"],
)  # fmt: skip
def test_a_template_that_could_fail_is_refused_before_training(template: str, own_spool: Path) -> None:
    with pytest.raises(ConfigError, match="commit_message_template"):
        check_template(template)
    store = AsyncBlockchainModelStore("memory", objects=MemoryObjectStore())
    with pytest.raises(ConfigError):
        GbmCVNNPricer(small_config()).train(
            small_training(2), blockchain_store=store, auto_commit=True, commit_message_template=template
        )
    assert not own_spool.exists()


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [("\udce9", {}), ("a", {"x": "\ud800"}), ("a", {"\ud800": 1}), ("a", {"x": 2**70}), ("a", {"x": float("nan")}),
     ("a", {"x": object()}), ("a", {"x": {1, 2}}), ("a", {"x": b"5"}), ("a", {"x": "y" * 50_000}), ("x" * 50_000, {})],
)  # fmt: skip
def test_an_entry_that_could_not_be_written_is_refused_before_training(experiment: str, parameters: Any) -> None:
    with pytest.raises(ConfigError):
        check_entry(experiment, parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": "low"},
        {"message": None},
        {"message": 5},
        {"message": "\udce9"},
        {"metrics": {"a": float("inf")}},
        {"metrics": {"a": "b"}},
        {"metrics": {"\ud800": 1.0}},
        {"experiment": None},
    ],
)
async def test_a_manual_commit_that_no_entry_can_hold_is_a_config_error(changes: dict[str, Any]) -> None:
    objects = MemoryObjectStore()
    async with opened(objects) as store:
        with pytest.raises(ConfigError):
            await commit_snapshot(store, small_config(), **{"message": "m", **changes})
        assert objects.objects == {}


# --- what reaches a terminal, a file, a folder -------------------------------------------------------------------

HOSTILE = [
    "\x1b[2Jok: 3 versions, 0 problems",
    "\rok",
    "a\nv0000000009  forged",
    "a\x00b",
    "\x9b31m",
    "\x7f",
    "\u202egnp.exe",
    "\u2028line",
    "\x1b]0;title\x07",
    "tab\there",
    "\x85next",
    "\u2066isolated\u2069",
]


@given(st.text() | st.sampled_from(HOSTILE))
def test_what_is_shown_is_one_line_that_does_nothing(text: str) -> None:
    line = shown(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028\u2029\u2066" for c in line)
    line.encode()
    if text.isprintable():
        assert line == text


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_messages_reach_the_terminal_as_text(
    text: str, on_moto: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        async with AsyncBlockchainModelStore(on_moto) as store:
            for i in range(2):
                data = b"checkpoint %d" % i
                version = await store.commit(data, record(f"c{i}", experiment=text, message=text, ledger=on_moto))
            await store.tag("best", version, text)
            await store.ledger.close()

    asyncio.run(fill())
    Spool(tmp_path).save(record("spooled", message=text, experiment=text, ledger=on_moto), b"s")
    for command in (
        ["list-versions", on_moto],
        ["diff", on_moto, "0", "1"],
        ["lineage", on_moto],
        ["gc-preview", on_moto, "1"],
        ["recover", on_moto, "--spool", str(tmp_path)],
        ["list-versions", on_moto, "--tag", text],
        ["tag", on_moto, text, "0"],
        ["inspect", on_moto, f"head:{text}x"],
        ["verify", on_moto],
    ):
        main(command)
        captured = capsys.readouterr()
        for character in set(text) & set("\x1b\r\x00\x9b\x7f\u202e\u2028\x07\x85\u2066\t"):
            assert character not in captured.out + captured.err, command
        assert "\nv0000000009" not in captured.out


def test_a_folder_has_a_name_that_a_file_system_takes(tmp_path: Path) -> None:
    names = ["x" * 256, "x" * 257, "é" * 200, "a/../b", "..", "con\x00", "", "x" * 120, "x" * 121]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert len(folder.encode()) < 200


def test_what_is_no_file_is_not_replaced_by_one(
    on_moto: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        async with AsyncBlockchainModelStore(on_moto) as store:
            await store.commit(b"checkpoint", record("c", ledger=on_moto))

    asyncio.run(fill())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), tmp_path):
        assert main(["export", on_moto, "0", str(path), "--force"]) == 2
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()
    old = tmp_path / "page.html"
    old.write_text("the old page")
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr("pathlib.Path.write_bytes", full)
        assert main(["report", on_moto, "--out", str(old)]) == 2
    assert old.read_text() == "the old page"
    assert set(os.listdir(tmp_path)) == {"pipe", "page.html"}
    capsys.readouterr()


async def test_verification_beside_a_first_commit_waits_for_the_first_block(
    memory_store: AsyncBlockchainModelStore,
) -> None:
    async with memory_store as store:
        for number in range(4):
            await store.upload(b"checkpoint %d" % number)
        verifying = asyncio.create_task(store.verify(blobs=True))
        await asyncio.sleep(0.6)
        assert not verifying.done()
        await store.commit(b"checkpoint 0", CommitRecord(ledger=store.uri, message="", step=1, loss=None))
        report = await verifying
        assert report.ok
        assert report.versions == 1


async def test_checkpoints_whose_log_does_not_come_are_a_fault(memory_store: AsyncBlockchainModelStore) -> None:
    async with memory_store as store:
        await store.upload(b"checkpoint")
        report = await store.verify()
        assert report.problems == [("log/", "there is no log, and there are 1 checkpoints")]
