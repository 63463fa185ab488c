"""An HTTP proxy in front of a real S3 server that delays, refuses, breaks off and hangs, from a seed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web


class FaultProxy:
    """Runs in a thread of its own. Headers pass untouched, so that signatures hold.

    `rate` is the share of requests that fail, evenly by status 500 and 503, a reset before and after the
    request was applied, or after its head, a hang, a byte altered on its way, and an answer cut short. `latency` is
    added to every request.
    """

    KINDS = ("500", "503", "reset-before", "reset-after", "head-only", "hang", "alter", "truncate")

    def __init__(
        self,
        target: str,
        *,
        rate: float = 0.0,
        latency: float = 0.0,
        hang: float = 2.0,
        seed: int = 1,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self._target, self.rate, self.latency, self._hang, self._kinds = target, rate, latency, hang, kinds
        self._random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.asked_first = 0  # requests that waited for leave to send their body, a round trip more
        self.url = ""
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            app = web.Application(client_max_size=2**31)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self.asked_first += "Expect" in request.headers
        body = await request.read()
        if self.latency:
            await asyncio.sleep(self.latency)
        fault = self._random.choice(self._kinds) if self._random.random() < self.rate else ""
        if fault:
            self.faults[fault] += 1
        if fault in ("500", "503"):
            return web.Response(status=int(fault))
        if fault == "hang":
            await asyncio.sleep(self._hang)
        if fault == "head-only":
            await self._send_head(request)
        if fault in ("reset-before", "hang", "head-only"):
            return self._reset(request)
        if fault == "alter" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        url = self._target + request.raw_path
        async with self._session.request(
            request.method, url, data=body, headers=request.headers, allow_redirects=False, skip_auto_headers={"Accept"}
        ) as answer:
            data = await answer.read()
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
        if fault == "reset-after":
            return self._reset(request)
        if request.method == "HEAD":
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            return response
        headers["Content-Length"] = str(len(data))
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        if fault == "truncate" and len(data) > 1:
            await response.write(data[: len(data) // 2])
            return self._reset(request)
        await response.write(data)
        await response.write_eof()
        return response

    async def _send_head(self, request: web.Request) -> None:
        """What a client leaves that is killed before it sends the body."""
        target = urlsplit(self._target)
        _, writer = await asyncio.open_connection(target.hostname, target.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        writer.write(f"{request.method} {request.raw_path} HTTP/1.1\r\n{head}\r\n".encode())
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.1)

    def _reset(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)
