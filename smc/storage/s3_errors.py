"""What S3's errors and answers mean to a ledger. The only module that knows what they are called."""

from __future__ import annotations

import asyncio

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.parsers import ResponseParserError

from smc.errors import AccessDenied, ConfigError, Conflict, NotFound, SpectralMCError, Unavailable

__all__ = ["FAILURES", "Redirected", "code_of", "status_of", "translated"]

_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "401",
    "403",
    "Unauthorized",
    "Forbidden",
}
# Answers of status 400 that another try may not get: to bytes that were altered or lost on their way among others.
_PASSING = {"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown"}


class Redirected(Exception):
    """The server sends whoever asks to another one."""


_TRANSIENT = (BotoConnectionError, HTTPClientError, aiohttp.ClientError, asyncio.TimeoutError, OSError)
FAILURES = (ClientError, BotoCoreError, ResponseParserError, aiohttp.ClientError, asyncio.TimeoutError, OSError)


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer, 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """The name that S3 gives an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def translated(error: Exception, *, where: str, bucket: str, endpoint: str) -> SpectralMCError:
    """The error of this package that says what one of `FAILURES` means for the object at `where`."""
    if isinstance(error, ClientError):
        return _refused(error, where, bucket, endpoint)
    if isinstance(error, HTTPClientError) and isinstance(error.kwargs.get("error"), Redirected):
        return ConfigError(f"{where}: {endpoint} {error.kwargs['error']}: give the address of the S3 server itself")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDenied(f"{where}: {error}; set AWS_ACCESS_KEY_ID and the rest, or AWS_PROFILE")
    if isinstance(error, _TRANSIENT):
        text = str(error).removeprefix("Connection was closed before we received a valid response from ")
        return Unavailable(f"{where}: {text or type(error).__name__}")
    if isinstance(error, ResponseParserError):
        return ConfigError(f"{where}: {endpoint} does not answer like S3; is it the address of an S3 server?")
    return ConfigError(f"{where}: {' '.join(str(error).split())}")


def _refused(error: ClientError, where: str, bucket: str, endpoint: str) -> SpectralMCError:
    code, status = code_of(error), status_of(error)
    detail = error.response.get("Error", {}).get("Message") or code
    if code == "NoSuchBucket":
        return ConfigError(f"bucket {bucket!r} does not exist at {endpoint}")
    if code in ("NoSuchKey", "404", "NotFound") or status == 404:
        return NotFound(f"{where} does not exist")
    if code == "PreconditionFailed" or status == 412:
        return Conflict(f"{where} exists already")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(f"{where}: access denied by {endpoint} ({code}: {detail})")
    if status in (408, 409, 429) or status >= 500 or code in _PASSING:
        return Unavailable(f"{where}: {code} ({detail})")
    return ConfigError(f"{where}: {endpoint} refused the request ({code}: {detail})")
