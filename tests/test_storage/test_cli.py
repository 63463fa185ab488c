from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import safetensors.torch

from smc.checkpoint.file import Snapshot, encode
from smc.errors import ConfigError, Unavailable
from smc.learning.pricer import GbmCVNNPricer
from smc.storage import AsyncBlockchainModelStore
from smc.storage.__main__ import main
from smc.storage.chain import blob_key, block_key
from smc.storage.dev_server import DevServer
from smc.storage.s3 import S3ObjectStore
from smc.storage.spool import CommitRecord, Spool
from tests.conftest import small_config, small_training, versions_of
from tests.event_files import events


@pytest.fixture
def ledger(on_seaweed: str) -> str:
    """A ledger of four versions of two experiments."""
    store = AsyncBlockchainModelStore(on_seaweed)
    for name in ("alpha", "beta"):
        GbmCVNNPricer(small_config()).train(
            small_training(4), blockchain_store=store, auto_commit=True, commit_interval=2, experiment=name
        )
    return on_seaweed


def test_verify(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", ledger]) == 0
    assert capsys.readouterr().out.startswith("ok: 4 versions, 4 entries in 4 blocks, 2 checkpoints (sizes checked)")
    assert main(["verify", ledger, "--blobs", "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out)["ok"] is True

    async def damage() -> None:
        async with AsyncBlockchainModelStore(ledger) as store:
            data = await store.objects.get(block_key(2))
            await store.objects.put(block_key(2), data.replace(b'"beta"', b'"zeta"'))

    asyncio.run(damage())
    assert main(["verify", ledger]) == 1
    out = capsys.readouterr().out
    assert "log/0000000002.jsonl: its last entry, 2, has hash" in out
    assert "CORRUPT" in out


def test_list_versions(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-versions", ledger]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("v0000000000  20")
    assert "alpha" in lines[1]
    assert main(["list-versions", ledger, "--experiment", "beta", "--last", "1", "--json"]) == 0
    (version,) = orjson.loads(capsys.readouterr().out)
    assert (version["version"], version["experiment"], version["step"]) == ("v0000000003", "beta", 4)


def test_inspect(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", ledger, "v0000000001"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.weight" in out
    assert "global_step     4" in out
    assert main(["inspect", ledger, "--json"]) == 0
    shown = orjson.loads(capsys.readouterr().out)
    assert shown["version"]["version"] == "v0000000003"
    assert shown["tensors"]["model.layers.0.weight"] == ["float32", 16, 9, 2]


def test_an_empty_ledger(on_seaweed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "inspect", "list-versions", "lineage", "find-corruption"):
        assert main([command, on_seaweed]) == 2
        assert f"there is no ledger at {on_seaweed}" in capsys.readouterr().err

    async def prepare() -> None:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            await store.ledger.prepare()

    asyncio.run(prepare())
    assert main(["verify", on_seaweed]) == 0
    assert main(["inspect", on_seaweed]) == 0
    assert "is empty" in capsys.readouterr().out


def test_recover_commits_nothing_that_was_damaged_and_everything_else(
    on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, spool = encode(Snapshot.of(small_config())), Spool(tmp_path)
    paths = [
        spool.save(CommitRecord(ledger=on_seaweed, message=f"m{step}", step=step, loss=None), data) for step in range(4)
    ]
    paths[0].write_bytes(data[: len(data) // 2])
    paths[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    paths[2].unlink()
    assert main(["recover", on_seaweed, "--spool", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{paths[0]} is not what was kept" in error
    assert error.count("\n") == 1
    assert [version.step for version in versions_of(on_seaweed)] == [3]
    assert [record.step for record in spool.records()] == [0, 1, 2]
    assert main(["recover", on_seaweed, "--spool", str(tmp_path)]) == 1  # and again, until somebody removes it


def test_recover_commits_the_spool_once(on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = Spool(tmp_path / "kept")
    data = encode(Snapshot.of(GbmCVNNPricer(small_config()).snapshot()))
    for step in (3, 1, 2):
        spool.save(CommitRecord(ledger=on_seaweed, message=f"m{step}", step=step, loss=None), data)
    spool.save(CommitRecord(ledger="s3://another", message="x", step=1, loss=None), data)
    kept = {path: path.read_bytes() for path in spool.directory.glob("*")}
    assert main(["recover", on_seaweed, "--spool", str(spool.directory)]) == 0
    assert "3 commits recovered" in capsys.readouterr().out
    assert [r.ledger for r in spool.records()] == ["s3://another"]
    for path, content in kept.items():  # as if killed after the commit and before the removal
        path.write_bytes(content)
    assert main(["recover", on_seaweed, "--spool", str(spool.directory), "--json"]) == 0
    assert [v["counter"] for v in orjson.loads(capsys.readouterr().out)] == [0, 1, 2]
    assert main(["list-versions", on_seaweed, "--json"]) == 0
    assert [v["step"] for v in orjson.loads(capsys.readouterr().out)] == [1, 2, 3]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == status
    return capsys.readouterr().out


def as_json(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> Any:
    return orjson.loads(printed([*arguments, "--json"], capsys, status))


def test_versions_are_filtered(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    def counters(*options: str) -> list[int]:
        return [v["counter"] for v in as_json(["list-versions", ledger, *options], capsys)]

    times = [v["timestamp"] for v in as_json(["list-versions", ledger], capsys)]
    assert main(["tag", ledger, "best", "1"]) == 0
    assert counters("--tag", "best") == [1]
    assert counters("--message", "STEP=4") == [1, 3]
    assert counters("--message", "STEP=4", "--experiment", "beta") == [3]
    assert counters("--since", times[1], "--until", times[2]) == [1, 2]
    assert counters("--since", "1h") == [0, 1, 2, 3]
    assert counters("--until", "1h") == []
    assert counters("--since", "2200-01-01") == []
    assert counters("--last", "3", "--until", times[2]) == [0, 1, 2]
    assert "[best]" in printed(["list-versions", ledger], capsys).splitlines()[2]


def test_aliases_move_and_roll_back(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["tag", ledger, "live", "head:alpha"], capsys) == "live: v0000000001 (entry 4)\n"
    assert as_json(["tag", ledger, "live", "head"], capsys) == {
        "alias": "live",
        "version": "v0000000003",
        "was": "v0000000001",
        "entry": 5,
    }
    assert printed(["rollback", ledger, "live"], capsys) == "live: v0000000001, was v0000000003 (entry 6)\n"
    assert as_json(["rollback", ledger, "live", "v0000000002", "--message", "why"], capsys)["was"] == "v0000000001"
    assert as_json(["inspect", ledger, "live"], capsys)["version"]["aliases"] == ["live"]
    assert printed(["untag", ledger, "live"], capsys) == "live: nothing, was v0000000002 (entry 8)\n"
    assert as_json(["rollback", ledger, "live"], capsys)["version"] == "v0000000002"
    assert main(["verify", ledger, "--blobs"]) == 0


def test_two_versions_are_compared(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(["diff", ledger, "0", "1"], capsys)
    assert re.search(r"^step +2 +4$", out, re.MULTILINE)
    assert re.search(r"^layers.0.weight +\d\S+ +\d\S+ +\d\S* %$", out, re.MULTILINE)
    found = as_json(["diff", ledger, "0", "1"], capsys)
    assert found["fields"]["step"] == [2, 4]
    assert found["settings"]["global_step"] == [2, 4]
    assert [v["version"] for v in found["versions"]] == ["v0000000000", "v0000000001"]
    same = printed(["diff", ledger, "1", "3"], capsys)  # of two experiments with the same seed
    assert "settings: the same" in same


def test_a_lineage_is_printed_and_drawn(ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(["lineage", ledger, "--out", str(tmp_path / "lineage.png")], capsys)
    assert out.splitlines()[0].startswith("alpha  v0000000000 to v0000000001, 2 versions, steps 2 to 4")
    assert (tmp_path / "lineage.png").read_bytes().startswith(b"\x89PNG")
    runs = as_json(["lineage", ledger], capsys)
    assert runs[1] == {
        "experiment": "beta",
        "resumed_from": None,
        "versions": ["v0000000002", "v0000000003"],
        "steps": [2, 4],
    }


def test_a_version_leaves_as_a_file_and_comes_back(
    ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    assert printed(["export", ledger, "head:alpha", str(file)], capsys).startswith(f"{file}: v0000000001, ")
    tensors = safetensors.torch.load_file(file)
    assert tensors["model.layers.0.weight"].shape == (16, 9, 2)
    assert main(["export", ledger, "0", str(file)]) == 2
    assert f"{file} exists: give another name, or --force" in capsys.readouterr().err
    assert main(["export", ledger, "1", str(file), "--force"]) == 0
    version = as_json(["import", ledger, str(file), "--experiment", "copied", "--message", "back"], capsys)
    assert (version["version"], version["step"], version["experiment"]) == ("v0000000004", 4, "copied")
    original = as_json(["inspect", ledger, "1"], capsys)["version"]
    assert version["content_hash"] == original["content_hash"]
    assert version["model_hash"] == original["model_hash"]
    file.write_bytes(b"PK\x03\x04 not safetensors")
    assert main(["import", ledger, str(file)]) == 2
    assert f"error: {file}: not a safetensors file" in capsys.readouterr().err
    assert main(["tag", ledger, "best", "0", "--message", "\udcff"]) == 2
    assert "error: a tag entry that nobody could read" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]


def test_checkpoints_are_collected(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    # alpha and beta are equal, so two checkpoints are four versions.
    young = printed(["gc-preview", ledger, "1"], capsys)
    assert "deletes 0 checkpoints, 0 bytes" in young

    async def upload() -> None:
        async with AsyncBlockchainModelStore(ledger) as store:
            await store.upload(b"x" * 1234)

    asyncio.run(upload())
    preview = printed(["gc-preview", ledger, "1", "--min-age", "0"], capsys)
    assert "keeps 3 versions:" in preview
    assert "deletes 1 checkpoints, 1.23 kB:" in preview
    assert "1 uploads that no version names, 1.23 kB" in preview
    plan = as_json(["gc-preview", ledger, "1", "--min-age", "0", "--no-heads", "--protect-tags", "1, 2"], capsys)
    assert [kept["version"] for kept in plan["kept"]] == ["v0000000000", "v0000000001", "v0000000002", "v0000000003"]
    assert plan["bytes"] == 1234
    result = as_json(["gc-run", ledger, "1", "--min-age", "0", "--yes"], capsys)
    assert result == {"deleted": 1, "bytes": 1234, "spared": 0}
    assert "0 checkpoints deleted, 0 bytes freed; 3 versions kept" in printed(["gc-run", ledger, "1", "--yes"], capsys)
    assert main(["verify", ledger, "--blobs"]) == 0


def test_corruption_is_found_and_what_is_whole_is_named(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["find-corruption", ledger], capsys).startswith("nothing is corrupt: 4 entries and 2 checkpoints")
    assert as_json(["find-corruption", ledger], capsys)["ok"] is True

    async def damage(key: str) -> None:
        async with AsyncBlockchainModelStore(ledger) as store:
            data = bytearray(await store.objects.get(key))
            data[-1] ^= 1
            await store.objects.put(key, bytes(data))

    key = blob_key(as_json(["inspect", ledger, "1"], capsys)["version"]["content_hash"])
    asyncio.run(damage(key))
    out = printed(["find-corruption", ledger], capsys, 1)
    assert f"{key}: the bytes of v0000000003 do not have the hash in its name" in out
    assert "cannot be loaded: 2 versions: v0000000001, v0000000003" in out
    assert "newest whole version of beta: v0000000002, step 2" in out
    found = as_json(["find-corruption", ledger], capsys, 1)
    assert [v["version"] for v in found["affected"]] == ["v0000000001", "v0000000003"]
    assert [v["version"] for v in found["sound"]] == ["v0000000000", "v0000000002"]
    asyncio.run(damage(block_key(1)))
    assert "The log itself is damaged" in printed(["find-corruption", ledger], capsys, 1)


def test_the_history_goes_to_tensorboard_and_into_a_page(
    ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(["tensorboard-log", ledger, "--log-dir", str(tmp_path / "runs")], capsys)
    assert out == f"alpha: 2 versions\nbeta: 2 versions\ntensorboard --logdir={tmp_path / 'runs'}\n"
    found = events(tmp_path / "runs" / "beta")
    assert list(found["loss/by_version"]) == [2, 3]
    assert set(found) > {"commit/seconds", "metrics/learning_rate", "metrics/contracts", "outcome/loss"}
    page = tmp_path / "out" / "report.html"
    out = printed(["report", ledger, "--out", str(page), "--contracts", "64"], capsys)
    assert out == f"{page}: 4 versions of 2 experiments, ledger ok\n"
    assert "<h2>Learnt and exact</h2>" in page.read_text()
    assert as_json(["report", ledger, "--out", str(page), "--contracts", "64"], capsys)["ok"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "No_Bucket"], "error: 'No_Bucket' is neither a bucket's name nor s3://bucket/prefix"),
        (["verify", "no-such-bucket-here"], "error: bucket 'no-such-bucket-here' does not exist at http"),
        (["inspect", "LEDGER", "v0000000009"], "has no version v0000000009"),
        (["inspect", "LEDGER", "newest"], "'newest' is no version here: give v0000000042 or 42, head"),
        (["diff", "LEDGER", "head", "v0000000001"], "error: the ledger is empty"),
        (["tag", "LEDGER", "head", "head"], "error: the ledger is empty"),
        (["untag", "LEDGER", "best"], "has no alias 'best': there are none"),
        (["rollback", "LEDGER", "best"], "there is no alias 'best': there are none"),
        (["export", "LEDGER", "v0000000007", "/nowhere/x.safetensors"], "has no version v0000000007: it is empty"),
        (["export", "LEDGER", "v0000000007", "/"], "error: / is a folder: give a file's name"),
        (["list-versions", "LEDGER", "--tag", "nope"], "error: there is no alias 'nope': there are none"),
        (["import", "LEDGER", "Makefile"], "error: Makefile: not a safetensors file"),
        (["import", "LEDGER", "/nowhere/x.safetensors"], "No such file or directory: '/nowhere/x.safetensors'"),
        (["gc-preview", "LEDGER", "0"], "error: the number of versions to keep must be at least 1, got 0"),
        (["gc-preview", "LEDGER", "5", "--protect-tags", "5"], "has no version v0000000005"),
        (["gc-run", "LEDGER", "5"], "error: nothing was deleted: add --yes to delete this"),
        (["tensorboard-log", "LEDGER"], "has no versions"),
        (["lineage", "LEDGER", "--out", "x.exe"], "a picture is a .png, .svg or .pdf"),
        (["report", "LEDGER", "--contracts", "1"], "error: contracts must be at least 8, got 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, on_seaweed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([on_seaweed if a == "LEDGER" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == "" or arguments[0] == "gc-run"  # which shows what it would have deleted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list-versions", "b", "--since", "yesterday"], "'yesterday' is no time: like 2026-11-25"),
        (["gc-run", "b", "5", "--min-age", "7"], "'7' is no age: like 45s, 90m, 2h or 3d"),
        (["gc-run", "b", "5", "--min-age", "99999999999999d"], "is longer ago than dates go"),
        (["list-versions", "b", "--since", "9999999d"], "is longer ago than dates go"),
        (["list-versions", "b", "--last", "-1"], "argument --last"),
        (["dev-server", "--port", "70000"], "'70000' is no port: 1 to 65535"),
        (["gc-run", "b", "many"], "invalid int value: 'many'"),
        (["diff", "b", "head"], "the following arguments are required: b"),
    ],
)
def test_arguments_that_cannot_be_read_are_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_credentials_are_one_line_and_status_2(
    on_seaweed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main(["verify", on_seaweed]) == 2
    error = capsys.readouterr().err
    assert "access denied" in error
    assert error.count("\n") == 1


def test_unknown_commands_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["obliterate", "bucket"])
    assert caught.value.code == 2


@pytest.fixture
def dev_server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "smc.storage", "dev-server", "--dir", str(tmp_path / "s3"), "--bucket", "one"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.service
def test_the_dev_server_serves_keeps_its_data_and_its_secrets(
    dev_server: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dev_server.stdout is not None
    first = dev_server.stdout.readline()
    assert first.startswith("S3 at http://127.0.0.1:")
    environment = tmp_path / "s3" / "s3.env"
    assert environment.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "s3" / "identities.json").stat().st_mode & 0o777 == 0o600
    endpoint = first.split()[2].rstrip(",")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{endpoint}/one?list-type=2")
    dev_server.send_signal(signal.SIGTERM)
    assert dev_server.wait(timeout=60) == 0
    with DevServer(tmp_path / "s3", buckets=("one",)) as again:
        known = dict(line.removeprefix("export ").split("=", 1) for line in environment.read_text().splitlines())
        assert known == again.environment
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        assert main(["verify", "one"]) == 2  # it answers, and has no ledger yet
        assert os.path.exists(f"/proc/{again.pid}")


@pytest.mark.service
async def test_the_dev_servers_other_ports_take_nothing_without_credentials(tmp_path: Path) -> None:
    with DevServer(tmp_path / "s3", buckets=("one",)) as server:
        arguments = await asyncio.to_thread(Path(f"/proc/{server.pid}/cmdline").read_text)
        ports = [
            int(a.split("=")[1]) for a in arguments.split("\0") if re.fullmatch(r"-(master|volume|filer)\.port=\d+", a)
        ]
        assert len(ports) == 3
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            async with AsyncBlockchainModelStore("one") as store:
                await store.commit(b"checkpoint", CommitRecord(ledger="one", message="m", step=1, loss=None))
                for port in ports:
                    for method, path in (
                        ("PUT", "/buckets/one/log/0000000001.jsonl"),
                        ("POST", "/buckets/one/log/"),
                        ("DELETE", "/buckets/one/log/0000000000.jsonl"),
                        ("GET", "/buckets/one/log/0000000000.jsonl"),
                        ("GET", "/col/delete?collection=one"),
                        ("GET", "/dir/assign"),
                        ("POST", "/submit"),
                    ):
                        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method, data=b"x")
                        with pytest.raises(urllib.error.HTTPError) as refused:
                            await asyncio.to_thread(urllib.request.urlopen, request, timeout=10)
                        assert refused.value.code >= 400
                assert (await store.verify(blobs=True)).ok


@pytest.mark.parametrize(
    ("endpoint", "is_open"),
    [
        ("http://10.0.0.7:9000", True),
        ("http://minio:9000", True),
        ("http://[2001:db8::1]:9000", True),
        ("http://128.0.0.1", True),
        ("http://localhost.example.com", True),
        ("https://minio:9000", False),
        ("http://127.0.0.1:8333", False),
        ("http://127.1.2.3", False),
        ("http://[::1]:9000", False),
        ("http://localhost:9000", False),
        ("http://s3.localhost:9000", False),
    ],
)
async def test_plain_http_beyond_this_machine_is_said_and_signed(
    endpoint: str, is_open: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    async with S3ObjectStore("bucket", endpoint_url=endpoint) as store:
        assert (f"{endpoint} is not encrypted" in caplog.text) is is_open
        assert store._client.meta.config.s3["payload_signing_enabled"] is is_open


@pytest.mark.service
def test_a_port_that_others_take_before_the_server_has_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, choices = DevServer(tmp_path), 0
    choose = server._ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def ports(old: int | None) -> dict[str, int]:
            nonlocal choices
            choices += 1
            return choose(old) | ({"filer": other.getsockname()[1]} if choices == 1 else {})

        monkeypatch.setattr(server, "_ports", ports)
        with server:
            assert server.pid
        assert choices == 2
        choices = 0
        monkeypatch.setattr("smc.storage.dev_server._ATTEMPTS", 1)
        with pytest.raises(Unavailable, match=r"SeaweedFS ended with status 1; see \S+weed\.log"):
            server.start()
        server.stop()


def test_a_port_that_is_taken_is_refused(seaweed: DevServer, tmp_path: Path) -> None:
    port = int(seaweed.endpoint_url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
        DevServer(tmp_path, port=port).start()
