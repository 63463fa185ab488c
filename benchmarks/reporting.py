"""Rows of a benchmark, printed as a table and written as JSON: {machine, commit, results}."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def memory_of(pid: int | str = "self", field: str = "VmRSS") -> int:
    """Bytes of a process's memory, by a field of /proc/PID/status: VmHWM its peak, RssAnon what no other has too."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


@dataclass
class Report:
    """Measured values; `bar` is what was promised and `holds` whether the value meets it."""

    title: str
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        bar, holds = None, None
        if at_most is not None:
            bar, holds = f"<= {at_most:g}", value <= at_most
        elif at_least is not None:
            bar, holds = f">= {at_least:g}", value >= at_least
        self.results.append(
            {
                "name": name,
                "value": float(value),
                "unit": unit,
                "bar": bar,
                "holds": None if holds is None else bool(holds),
            }
        )
        print(self._row(self.results[-1]), flush=True)

    def header(self) -> None:
        print(f"{self.title}\n{machine()}; commit {commit()}")
        print(self._row({"name": "", "value": None, "unit": "unit", "bar": "bar", "holds": None}))

    def _row(self, row: dict[str, Any]) -> str:
        value = "value" if row["value"] is None else f"{row['value']:.4g}"
        holds = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
        return f"{row['name']:<58}{value:>11} {row['unit']:<16}{row['bar'] or '':<10}{holds}"

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps({"machine": machine(), "commit": commit(), "results": self.results}, indent=1))


def gpu_seconds(work: Callable[[], object], *, repeats: int = 30, warmup: int = 3) -> float:
    """Median seconds of `work` on the GPU, by CUDA events, each repeat between two of them."""
    for _ in range(warmup):
        work()
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in spans:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as one CUDA graph, so that launches from a slow host do not show."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def machine() -> str:
    """What this runs on, without naming the host."""
    text = f"{os.cpu_count()} x {_cpu()}, Python {platform.python_version()}, torch {torch.__version__}"
    return text + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU")


def commit() -> str:
    """The checked-out commit, with + if the tree differs from it; SMC_COMMIT where there is no repository."""
    if "SMC_COMMIT" in os.environ:
        return os.environ["SMC_COMMIT"]
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def run(
    title: str, measure: Callable[[Report, argparse.Namespace], None], *arguments: tuple[str, dict[str, Any]]
) -> None:
    """The command line of a benchmark: its own arguments, and --json FILE."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="write {machine, commit, results} here")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    report = Report(title)
    report.header()
    measure(report, options)
    report.write(options.json)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
