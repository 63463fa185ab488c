"""Runs every command of docs/operations.md and writes what it printed under it.

    python -m benchmarks.operations [--check]

Starts an S3 server of its own; --check runs the commands and changes nothing. Lines that begin with `$ ` are
commands, run in an empty folder; what follows until the block's end is replaced. A command that ends with another
status than 0 says so in its last line. Lines of an HTML comment that begin with `$ ` are run and not shown.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from smc.storage.dev_server import DevServer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "operations.md"
LONGEST = 24
# Files that the page's commands find in their folder.
FILES = {
    "serve.py": """from smc.serving.client import InferenceClient

with InferenceClient("s3://models", "production", poll_seconds=2.0) as client:
    print(client.current.version.version_id, client.predict_price([[100, 105, 1.0, 0.03, 0.01, 0.25]]))
    print("problem:", client.status.problem)
""",
    "damage.py": """import asyncio, sys
from smc.storage import AsyncBlockchainModelStore
from smc.storage.chain import blob_key


async def main(bucket, version):
    async with AsyncBlockchainModelStore(bucket) as store:
        key = blob_key((await store.resolve(version)).content_hash)
        data = bytearray(await store.objects.get(key))
        data[-1] ^= 1
        await store.objects.put(key, bytes(data))


asyncio.run(main(*sys.argv[1:]))
""",
    "sweeps/operations.yaml": (ROOT / "sweeps" / "operations.yaml").read_text(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run the commands, change nothing")
    parser.add_argument("--keep", type=Path, help="the folder to run in, kept afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with DevServer(folder / "s3", buckets=("models",)) as server:
            environment = {
                **os.environ,
                **server.environment,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "RAY_USAGE_STATS_ENABLED": "0",
                "SMC_SPOOL_DIR": str(folder / "spool"),
                "COLUMNS": "120",
            }
            for name, text in FILES.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            page = filled(PAGE.read_text(), folder, environment)
    if not options.check:
        PAGE.write_text(page)
    return 0


def filled(page: str, folder: Path, environment: dict[str, str]) -> str:
    lines: list[str] = []
    block, hidden, skipping = False, False, False
    for line in page.splitlines():
        if line.startswith("```"):
            block, skipping = not block and line != "```", False
        if line.startswith("<!--"):
            hidden = True
        if hidden and line.startswith("$ "):
            run(line[2:], folder, environment)
        if "-->" in line:
            hidden = False
        if block and line.startswith("$ ") and not hidden:
            if skipping:
                lines.append("")
            lines += [line, *run(line[2:], folder, environment)]
            skipping = True
        elif not skipping:
            lines.append(line)
    return "\n".join(lines) + "\n"


def run(command: str, folder: Path, environment: dict[str, str]) -> list[str]:
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    output = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    output = [re.sub(re.escape(str(folder)), ".", line) for line in output if "WARNING" not in line]
    if len(output) > LONGEST:
        left_out = len(output) - LONGEST + 6
        output = [*output[: LONGEST - 11], f"... {left_out} lines more ...", *output[-5:]]
    if done.returncode:
        output.append(f"# status {done.returncode}")
    print("\n".join(output), flush=True)
    return output


if __name__ == "__main__":
    sys.exit(main())
