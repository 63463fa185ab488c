"""The demo, run as `make demo` runs it: a server and a Ray of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.service
def test_the_demo_runs_twice_into_one_ledger(tmp_path: Path) -> None:
    quick = tmp_path / "quick.yaml"
    quick.write_text(
        "recipe: tiny\nexperiments: {high_lr: {training: {learning_rate: 0.03}}, heston: {simulation: {process: "
        "{kind: heston}, product: {kind: european_put}}}}\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    command = [sys.executable, "-m", "jobs.demo", "--dir", str(tmp_path / "smc"), "--sweep", str(quick)]
    for run in (1, 2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Ledger verified: {6 * run} versions" in done.stdout
        assert "best: " in done.stdout
        assert "CVaR97.5" in done.stdout
        assert "heston: implied volatility of European puts under Heston's model" in done.stdout
    picture = (tmp_path / "smc" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_the_demo_says_what_is_wrong_with_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--dir", str(tmp_path), "--sweep", str(tmp_path / "none.yaml")]) == 2
    assert "there is no sweep file" in capfd.readouterr().err
