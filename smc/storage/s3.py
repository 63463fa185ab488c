"""Objects on S3 through aiobotocore."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, NoReturn

import botocore.session
import numpy as np
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
)

from smc.errors import AccessDenied, ConfigError, Unavailable
from smc.storage.address import endpoint_of, parse_uri, warn_if_open
from smc.storage.limits import LIMITS
from smc.storage.objects import Body, ObjectInfo
from smc.storage.s3_errors import FAILURES, Redirected, code_of, status_of, translated

__all__ = ["S3ObjectStore", "endpoint_of", "parse_uri"]

# Parts of a large object that travel at a time.
_PARALLEL = 8
_CHUNK = 2**20
_ABORT_SECONDS = 2.0


class _Direct:
    """An HTTP session that follows no redirection: a request is signed for one server, and is not sent to another.

    Where AWS names a bucket's region, botocore signs again for that one.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    async def request(self, *arguments: Any, **how: Any) -> Any:
        response = await self._session.request(*arguments, allow_redirects=False, **how)
        headers = response.headers
        if 300 <= response.status < 400 and response.status != 304 and "x-amz-bucket-region" not in headers:
            response.release()
            raise Redirected(f"redirects to {headers.get('location', 'nowhere')} (status {response.status})")
        return response


class _Session(AIOHTTPSession):  # type: ignore[misc]
    async def _get_session(self, proxy_url: str | None) -> _Direct:
        return _Direct(await super()._get_session(proxy_url))


class S3ObjectStore:
    """One bucket, under one prefix, on the event loop that entered it.

    Endpoint, region and credentials come from botocore's standard environment and profiles. botocore
    does not retry: the ledger does, because it knows what a repeated request means.
    """

    def __init__(self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None) -> None:
        self._bucket, self._prefix, self._endpoint_url = bucket, prefix, endpoint_url
        self._context: Any = None
        self._client: Any = None

    async def __aenter__(self) -> S3ObjectStore:
        config = AioConfig(
            http_session_cls=_Session,
            connect_timeout=5,
            read_timeout=60,
            # More than the uploads at a time: a block must not wait for a connection behind them.
            max_pool_connections=96,
            # Of a request's 1.5 ms here, a fifth went into checking arguments that are ours and into
            # putting the same user agent together again.
            parameter_validation=False,
            user_agent="spectralmc",
            retries={"total_max_attempts": 1, "mode": "standard"},
            # What is stored has its MD5 in a signed header; without this it would be hashed again, on the event loop.
            s3={"payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            session = get_session()
            session.register_component("data_loader", _service_descriptions())
            self._context = session.create_client("s3", endpoint_url=self._endpoint_url, config=config)
            self._client = await self._context.__aenter__()
            if warn_if_open(self._endpoint()):
                # Without TLS only a signature over the body tells the server that it was altered.
                self._client.meta.config.s3["payload_signing_enabled"] = True
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"S3 client for bucket {self._bucket}: {error}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._context.__aexit__(kind, error, trace)
        self._client = None

    async def get(
        self, key: str, size: int | None = None, on_bytes: Callable[[memoryview], None] | None = None
    ) -> bytes | bytearray:
        if size is not None and size > 2 * LIMITS.part:
            return await self._get_in_ranges(key, size, on_bytes)
        data, _ = await self._get_whole(key)
        if on_bytes is not None:
            await asyncio.to_thread(on_bytes, memoryview(data))
        return data

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        try:
            return (await self._get_whole(key, Range=f"bytes={start}-{stop - 1}"))[0] if stop > start else b""
        except _NothingThere:
            return b""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        try:
            return await self._get_whole(key, **({"IfNoneMatch": etag} if etag else {}))
        except _NothingThere:
            return None

    async def _get_whole(self, key: str, **how: str) -> tuple[bytes, str]:
        """What one request is answered with, and its ETag."""
        try:
            response = await self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **how)
            async with response["Body"] as body:
                data = bytes(await body.read())
        except FAILURES as error:
            if isinstance(error, ClientError) and status_of(error) in (304, 416):
                raise _NothingThere from None
            self._translate(error, key)
        self._check_answer(response, key, "ETag", "ContentLength")
        if len(data) != response["ContentLength"]:
            raise Unavailable(f"{self._where(key)}: {len(data)} of {response['ContentLength']} bytes arrived")
        return data, str(response["ETag"])

    async def put(self, key: str, data: Body) -> None:
        try:
            if len(data) > 2 * LIMITS.part:
                await self._put_in_parts(key, data)
            else:
                await self._put_whole(key, data)
        except FAILURES as error:
            await self._denied_or_missing(error)
            self._translate(error, key)

    async def _put_whole(self, key: str, data: Body, **how: str) -> None:
        response = await self._client.put_object(
            Bucket=self._bucket, Key=self._prefix + key, Body=_sendable(data), ContentMD5=await _digest(data), **how
        )
        self._check_answer(response, key, "ETag")

    async def _get_in_ranges(self, key: str, size: int, on_bytes: Callable[[memoryview], None] | None) -> bytearray:
        """One buffer of the whole size, filled by parallel ranged requests: no second copy."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        arrived = {start: asyncio.Event() for start in range(0, size, LIMITS.part)}

        async def fetch(start: int) -> None:
            stop = min(start + LIMITS.part, size)
            try:
                response = await self._client.get_object(
                    Bucket=self._bucket, Key=self._prefix + key, Range=f"bytes={start}-{stop - 1}"
                )
                at = start
                async with response["Body"] as body:
                    while chunk := await body.read(_CHUNK):
                        view[at : at + len(chunk)] = chunk
                        at += len(chunk)
            except FAILURES as error:
                self._translate(error, key)
            except ValueError:
                raise Unavailable(f"{self._where(key)}: more bytes arrived than were asked for") from None
            if at != stop:
                raise Unavailable(f"{self._where(key)}: {at - start} of {stop - start} bytes arrived")
            arrived[start].set()

        async def follow() -> None:
            for start, event in arrived.items():
                await event.wait()
                if on_bytes is not None:
                    await asyncio.to_thread(on_bytes, view[start : start + LIMITS.part])

        following = asyncio.create_task(follow())
        try:
            await _side_by_side(fetch, arrived)
            await following
        finally:
            following.cancel()
        return buffer

    async def _put_in_parts(self, key: str, data: Body, **how: str) -> None:
        """A multipart upload, a few parts at a time; abandoned parts are removed.

        A part is a view, copied by the transport alone: with eight on their way, a 48th of the whole each, that is a
        sixth of the checkpoint. A file over the buffer would save this copy, but aiohttp reads it in pieces of
        64 KiB through another thread, at half the speed.
        """
        size = max(LIMITS.smallest_part, len(data) // 48)
        where = {"Bucket": self._bucket, "Key": self._prefix + key}
        upload = (await self._client.create_multipart_upload(**where))["UploadId"]
        etags: dict[int, str] = {}

        async def send(start: int) -> None:
            number = start // size + 1
            part = memoryview(data)[start : start + size]
            response = await self._client.upload_part(
                **where, UploadId=upload, PartNumber=number, Body=part, ContentMD5=await _digest(part)
            )
            etags[number] = response["ETag"]

        try:
            await _side_by_side(send, range(0, len(data), size))
            parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
            await self._client.complete_multipart_upload(
                **where, UploadId=upload, MultipartUpload={"Parts": parts}, **how
            )
        except BaseException:
            # Whoever ends this may have no time to lose.
            with contextlib.suppress(*FAILURES):
                async with asyncio.timeout(_ABORT_SECONDS):
                    await self._client.abort_multipart_upload(**where, UploadId=upload)
            raise

    async def create(self, key: str, data: Body) -> None:
        try:
            if len(data) > 2 * LIMITS.part:
                await self._put_in_parts(key, data, IfNoneMatch="*")
            else:
                await self._put_whole(key, data, IfNoneMatch="*")
        except FAILURES as error:
            await self._denied_or_missing(error)
            self._translate(error, key)

    async def stat(self, key: str) -> ObjectInfo:
        try:
            response = await self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except FAILURES as error:
            if isinstance(error, ClientError) and code_of(error) in ("404", "NotFound", "NoSuchKey"):
                # HEAD has no body to tell a missing key from a missing bucket. Who may not ask for the bucket was told
                # of a key: S3 refuses the question itself where it would give away more.
                with contextlib.suppress(AccessDenied):
                    await self.check_bucket()
            self._translate(error, key)
        self._check_answer(response, key, "ETag", "ContentLength", "LastModified")
        return ObjectInfo(key, response["ContentLength"], response["LastModified"], _md5(response["ETag"]))

    async def delete(self, key: str) -> bool:
        try:
            response = await self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except FAILURES as error:
            self._translate(error, key)
        return not response.get("DeleteMarker", False)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            try:
                page = await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix, **token)
            except FAILURES as error:
                self._translate(error, prefix)
            # Of a server that is none, botocore reads an empty answer as an empty listing.
            self._check_answer(page, prefix, "Name", "IsTruncated")
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self._prefix)
                yield ObjectInfo(key, item["Size"], item["LastModified"], _md5(item["ETag"]))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def check_bucket(self) -> None:
        """Raises: ConfigError if the bucket is not there, AccessDenied if it is not ours."""
        try:
            await self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if code_of(error) in ("404", "NoSuchBucket", "NotFound"):
                raise ConfigError(f"bucket {self._bucket!r} does not exist at {self._endpoint()}") from None
            self._translate(error, "")
        except FAILURES as error:
            self._translate(error, "")

    async def _denied_or_missing(self, error: Exception) -> None:
        # Writing into a bucket that is not there may be answered with a bare denial.
        if isinstance(error, ClientError) and code_of(error) == "AccessDenied":
            await self.check_bucket()

    def _check_answer(self, answer: Mapping[str, Any], key: str, *fields: str) -> None:
        """Raises: ConfigError if an answer of status 200 is none that S3 gives."""
        if missing := [field for field in fields if field not in answer]:
            raise ConfigError(
                f"{self._where(key)}: {self._endpoint()} does not answer like S3 (no {missing[0]}): is it the "
                "address of an S3 server?"
            )

    def _endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    def _where(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _translate(self, error: Exception, key: str) -> NoReturn:
        raise translated(error, where=self._where(key), bucket=self._bucket, endpoint=self._endpoint()) from None


@lru_cache
def _service_descriptions() -> Any:
    """botocore's files about services, read once: those of S3 take longer than all the rest of opening."""
    return botocore.session.get_session().get_component("data_loader")


async def _side_by_side(work: Callable[[int], Awaitable[None]], starts: Iterable[int]) -> None:
    """Run `work` for every start, a few at a time; the first failure ends the others."""
    gate = asyncio.Semaphore(_PARALLEL)

    async def one(start: int) -> None:
        async with gate:
            await work(start)

    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(one(start))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _sendable(data: Body) -> bytearray:
    """What botocore can send twice, after a redirection, which a view is not. Copied without Python's lock.

    Not bytes either: of those botocore makes a file, and asks with `Expect: 100-continue` before it sends one. A block
    would take two round trips.
    """
    if isinstance(data, bytearray):
        return data
    copy = bytearray(len(data))
    np.copyto(np.frombuffer(copy, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))
    return copy


async def _digest(data: Body) -> str:
    """For Content-MD5, with which a server refuses altered bytes.

    SeaweedFS 4 compares nothing else. When a connection ends between a request's head and its body it stores an empty
    object, and an empty block is the end of a ledger.
    """
    if len(data) > _CHUNK:
        return await asyncio.to_thread(_md5_of, data)
    return _md5_of(data)


def _md5_of(data: Body) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _md5(etag: str) -> str | None:
    """The MD5 in an ETag; that of a multipart upload is none."""
    value = etag.strip('"').lower()
    return value if re.fullmatch(r"[0-9a-f]{32}", value) else None


class _NothingThere(Exception):
    """The answer was 304 or 416: nothing new, or nothing in the range."""
