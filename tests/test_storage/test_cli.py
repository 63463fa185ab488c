from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from smc.checkpoint import Snapshot, encode
from smc.errors import ConfigError
from smc.gbm_trainer import GbmCVNNPricer
from smc.spool import CommitRecord, Spool
from smc.storage import AsyncBlockchainModelStore
from smc.storage.__main__ import main
from smc.storage.chain import block_key
from smc.storage.dev_server import DevServer
from tests.conftest import small_config, small_training


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
    assert lines[1].startswith("v0000000000 20")
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
    assert main(["verify", on_seaweed]) == 0
    assert main(["inspect", on_seaweed]) == 0
    assert "is empty" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "No_Bucket"], "error: 'No_Bucket' is neither a bucket's name nor s3://bucket/prefix"),
        (["verify", "no-such-bucket-here"], "error: bucket 'no-such-bucket-here' does not exist at http"),
        (["inspect", "LEDGER", "v0000000009"], "has no version v0000000009"),
        (["inspect", "LEDGER", "newest"], "error: 'newest' is not a version"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, on_seaweed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([on_seaweed if a == "LEDGER" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


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
        assert main(["verify", "one"]) == 0
        assert os.path.exists(f"/proc/{again.pid}")


def test_a_port_that_is_taken_is_refused(seaweed: DevServer, tmp_path: Path) -> None:
    port = int(seaweed.endpoint_url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
        DevServer(tmp_path, port=port).start()
