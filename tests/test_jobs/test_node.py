"""A node that is about to go: what it must not wait for."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest

from jobs import node


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked, in its order."""
    asked: list[str] = []
    monkeypatch.setattr("ray.init", lambda **_: asked.append("init"))
    monkeypatch.setattr("ray.shutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(node, "names_of_actors", lambda prefix: asked.append("trainers") or [])
    monkeypatch.setattr(node, "_DRAIN_SECONDS", 0.05)
    return asked


async def test_trainers_are_stopped_though_the_node_cannot_be_drained_in_time(
    monkeypatch: pytest.MonkeyPatch, without_ray: list[str]
) -> None:
    def slow(node_id: str) -> None:
        time.sleep(0.3)
        without_ray.append(f"drained {node_id}")

    monkeypatch.setattr(node, "_drain", slow)
    await node._commit_everything("1")
    assert without_ray == ["init", "trainers", "drained 1", "shutdown"]


async def test_a_drain_that_is_in_time_comes_first(monkeypatch: pytest.MonkeyPatch, without_ray: list[str]) -> None:
    monkeypatch.setattr(node, "_drain", lambda node_id: without_ray.append("drained"))
    await node._commit_everything("1")
    assert without_ray == ["init", "drained", "trainers", "shutdown"]


def test_a_drain_that_never_ends_is_a_line_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr("subprocess.run", never)
    node._drain("1")
    assert "the node could not be drained within 15 s" in caplog.text
