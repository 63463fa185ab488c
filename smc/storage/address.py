"""Where a ledger is: its bucket and prefix, and the server that has them."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
from functools import lru_cache
from urllib.parse import urlsplit

import botocore.session
from botocore.exceptions import BotoCoreError

from smc.errors import ConfigError

__all__ = ["endpoint_of", "parse_uri", "warn_if_open"]

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
# Names that a ledger gives to what lies under its prefix: another ledger there would be taken for a part of it.
_TAKEN = {"log", "blobs", "index", "head.json", "waiting.json"}
logger = logging.getLogger("smc.storage")


def parse_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix of `bucket`, `s3://bucket` or `s3://bucket/some/prefix`.

    Raises: ConfigError for anything else.
    """
    path = uri.removeprefix("s3://")
    bucket, _, prefix = path.partition("/")
    if (prefix and path == uri) or not _BUCKET.match(bucket):
        raise ConfigError(f"{uri!r} is neither a bucket's name nor s3://bucket/prefix")
    prefix = prefix.strip("/")
    if taken := [part for part in prefix.split("/") if part in _TAKEN]:
        raise ConfigError(
            f"{uri!r}: a ledger in s3://{bucket} would take {taken[0]!r} for a part of its own; a prefix has no part "
            f"named {', '.join(sorted(_TAKEN))}"
        )
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise ConfigError(f"{uri!r}: a prefix is made of names separated by single slashes")
    return bucket, f"{prefix}/" if prefix else ""


def endpoint_of(endpoint_url: str | None = None) -> str | None:
    """The server that botocore's environment and profiles name where `endpoint_url` does not; None for AWS itself.

    A bucket of AWS is the same one from every region. Raises: ConfigError.
    """
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") and "KEY" not in k))
    return _endpoint_of(endpoint_url, settings)


@lru_cache
def _endpoint_of(endpoint_url: str | None, settings: tuple[tuple[str, str], ...]) -> str | None:
    try:
        session = botocore.session.get_session()
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", endpoint_url=endpoint_url, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 endpoint: {error}") from None
    found = str(client.meta.endpoint_url).rstrip("/")
    host = urlsplit(found).hostname or ""
    return None if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else found


@lru_cache
def warn_if_open(endpoint: str) -> bool:
    """Whether others on the way to a server can read and change what is sent to it; the first time it is logged."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme != "http" or host == "localhost" or host.endswith(".localhost"):
        return False
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return False
    logger.warning(
        "%s is not encrypted: checkpoints can be read, and the ledger held up, on the way to it; use https", endpoint
    )
    return True
