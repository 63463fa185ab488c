"""A network between a client and a server on this machine: latency and bandwidth, byte for byte otherwise.

.venv/bin/python -m benchmarks.slow_link --to 127.0.0.1:8333 --latency 0.2 --megabytes 200
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
from types import TracebackType
from urllib.parse import urlsplit

_CHUNK = 256 * 1024


class SlowLink:
    """A TCP proxy in a process of its own. `latency` seconds there and back, `megabytes` a second each way, in all."""

    def __init__(self, target_url: str, *, latency: float, megabytes: float) -> None:
        self._command = [sys.executable, "-m", "benchmarks.slow_link", "--to", urlsplit(target_url).netloc]
        self._command += ["--latency", str(latency), "--megabytes", str(megabytes)]
        self.url = ""

    def __enter__(self) -> SlowLink:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


class _Direction:
    """One way of the link: what all connections send takes its turn on the wire, then arrives `delay` later."""

    def __init__(self, delay: float, bytes_per_second: float) -> None:
        self._delay, self._rate, self._free_at = delay, bytes_per_second, 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    at, data = await travelling.get()
                    await asyncio.sleep(at - loop.time())
                    if not data:
                        writer.close()
                        return
                    writer.write(data)
                    await writer.drain()

        arriving = asyncio.create_task(arrive())
        data = b"first"
        while data:
            try:
                data = await reader.read(_CHUNK)
            except ConnectionError:
                data = b""
            self._free_at = max(self._free_at, loop.time()) + len(data) / self._rate
            if self._free_at - loop.time() > 0.002:  # shorter naps would take longer than asked for
                await asyncio.sleep(self._free_at - loop.time())
            travelling.put_nowait((loop.time() + self._delay, data))
        await arriving


async def serve(host: str, port: int, latency: float, bytes_per_second: float) -> None:
    """Listen on a free port, print it, and pass every connection on."""
    there, back = (_Direction(latency / 2, bytes_per_second) for _ in range(2))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, port, limit=4 * _CHUNK)
            await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=4 * _CHUNK)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", required=True)
    parser.add_argument("--latency", type=float, required=True)
    parser.add_argument("--megabytes", type=float, required=True)
    options = parser.parse_args()
    host, port = options.to.split(":")
    asyncio.run(serve(host, int(port), options.latency, options.megabytes * 1e6))
