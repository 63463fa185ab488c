"""Which cluster a job joins, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import status


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "RAY_ADDRESS=http://127.0.0.1:8265 is a dashboard's"),
        ("127.0.0.1:9", "no Ray cluster at 127.0.0.1:9: Connection refused"),
        ("head", "RAY_ADDRESS=head is not HOST:PORT of a head, like 127.0.0.1:6379"),
        ("head:99999", "RAY_ADDRESS=head:99999 is not HOST:PORT of a head"),
        (None, "no Ray cluster runs on this machine"),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert status.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
