from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import sweep, train
from tests.conftest import versions_of, wait_for_versions

ROOT = Path(__file__).parents[2]


class Elsewhere:
    """Somebody else's work in the cluster."""

    def is_up(self) -> bool:
        return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "recipe: tiny\n"
        "defaults: {commit_message_template: '[{step}] loss={loss:.3f}'}\n"
        "experiments: {one: , two: {training: {learning_rate: 0.02}}}\n"
    )
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_trains_every_experiment_into_one_ledger_and_goes_on_from_it(
    file: Path, on_seaweed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(file), "--ledger", on_seaweed]) == 0
    out = capfd.readouterr().out
    assert "2 of 2 experiments done" in out
    assert "trained to step 60" in out
    made = versions_of(on_seaweed)
    assert len(made) == 6
    for name in ("one", "two"):
        assert [v.step for v in made if v.experiment == name] == [20, 40, 60]
    # Submitted again, it finds everything finished; extended, it trains further.
    assert sweep.main([str(file), "--ledger", on_seaweed]) == 0
    assert capfd.readouterr().out.count("finished before, skipped") == 2
    # `train` runs one experiment by the same name.
    arguments = ["--ledger", on_seaweed, "--experiment", "one", "--recipe", "tiny", "--extend"]
    assert train.main(arguments) == 0
    again = versions_of(on_seaweed)
    assert again[:6] == made
    (last,) = {v.version_id for v in made if v.step == 60 and v.experiment == "one"}
    assert {v.resumed_from for v in again[6:]} == {last}
    assert [v.step for v in again[6:]] == [80, 100, 120]


@pytest.mark.usefixtures("ray_cluster")
def test_an_experiment_that_fails_does_not_take_the_others_along(
    tmp_path: Path, on_seaweed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    # As many fail as the cluster has places: each leaves its own to the next.
    bad = "{training: {learning_rate: 1.0e+30, schedule: constant}}"
    path.write_text(f"recipe: tiny\nexperiments:\n  bad: {bad}\n  worse: {bad}\n  good: \n")
    assert sweep.main([str(path), "--ledger", on_seaweed]) == 2
    out = capfd.readouterr().out
    assert "bad             failed: the loss is" in out
    assert "1 of 3 experiments done, 2 failed" in out
    assert [v.step for v in versions_of(on_seaweed) if v.experiment == "good"] == [20, 40, 60]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--ledger", "s3://no-such-bucket-here"], "error: bucket 'no-such-bucket-here' does not exist"),
        (["FILE"], "no ledger given: pass --ledger"),
        (["missing.yaml", "--ledger", "x"], "error: there is no sweep file missing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, file: Path, on_seaweed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(file) if a == "FILE" else a for a in arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("ray_cluster")
def test_bad_settings_of_train_are_one_line_and_status_2(on_seaweed: str, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["--ledger", on_seaweed, "--experiment", "x", "--recipe", "tiny", "--set"]
    for setting, message in (
        ("training.lr=1", "unknown key 'training.lr'"),
        ("nonsense", "expected KEY=VALUE"),
        ("training.batch_size=[", "is not a YAML value"),
        ("num_gpus=3", "asks for 1 CPUs and 3 GPUs, the cluster has 2 and 0"),
    ):
        assert train.main([*base, setting]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert versions_of(on_seaweed) == []


def test_unreachable_storage_is_one_line_and_status_2(
    file: Path, on_seaweed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert sweep.main([str(file), "--ledger", on_seaweed]) == 2
    error = capfd.readouterr().err
    assert "127.0.0.1:1" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_sweep_ends_with_final_commits(tmp_path: Path, on_seaweed: str) -> None:
    import ray

    path = tmp_path / "sweep.yaml"
    path.write_text("recipe: tiny\ndefaults: {training: {num_batches: 1000000}}\nexperiments: {a: , b: }\n")
    other = ray.remote(num_cpus=1)(Elsewhere).remote()  # so that there is no place for b
    ray.get(other.is_up.remote())
    command = [sys.executable, "-m", "jobs.sweep", str(path), "--ledger", on_seaweed]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_versions(on_seaweed, process, lambda versions: len(versions) >= 10)  # it is under way
    process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert time.monotonic() - signalled < 10
    ray.kill(other)
    assert process.returncode == 2, out
    assert out.count("stopped at step") == 1
    assert "b               not started: the sweep was stopped" in out
    newest = {v.experiment: v.step for v in versions_of(on_seaweed)}
    for name, step in newest.items():
        assert f"{name:<16}stopped at step {step} " in out
