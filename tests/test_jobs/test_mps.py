"""A node whose processes share a GPU by NVIDIA's MPS; its control program is played, and notes what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import node


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the control program was started with, line by line."""
    told, program = tmp_path / "told", tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] || exit 3\n'
        f'if [ "$1" = -d ]; then echo "start $CUDA_MPS_PIPE_DIRECTORY" >> {told}; exit ${{REFUSE:-0}}; fi\n'
        f'echo "$(cat) $CUDA_MPS_PIPE_DIRECTORY" >> {told}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return told


def test_the_service_runs_as_long_as_the_node_which_is_told_of_it(told: Path) -> None:
    assert node.main(["--mps", "--", "sh", "-c", f'echo "node $CUDA_MPS_PIPE_DIRECTORY" >> {told}', "--block"]) == 0
    (start, pipe), (ran, its), (end, same) = (line.split() for line in told.read_text().splitlines())
    assert (start, ran, end) == ("start", "node", "quit")
    assert pipe == its == same
    assert not Path(pipe).exists()


def test_what_is_wrong_with_the_service_is_said_before_the_node_starts(
    told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--mps", "--", "sh", "-c", f"echo node >> {told}", "--block"]
    monkeypatch.setenv("REFUSE", "7")
    assert node.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: NVIDIA's MPS did not start (status 7)")
    monkeypatch.setenv("PATH", str(told.parent))
    assert node.main(arguments) == 2
    assert "there is no nvidia-cuda-mps-control, which comes with the driver" in capsys.readouterr().err
    assert "node" not in told.read_text()
