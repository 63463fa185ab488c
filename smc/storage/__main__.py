"""The ledger's command line: `python -m smc.storage COMMAND BUCKET`.

Exit status: 0 fine, 1 the ledger is corrupt, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from smc.command_line import exit_status
from smc.spool import Spool
from smc.storage.chain import ModelVersion
from smc.storage.dev_server import DevServer
from smc.storage.store import AsyncBlockchainModelStore, recover

__all__ = ["main"]


# The demo's bucket, and those that the examples name.
_DEV_BUCKETS = ("spectralmc", "my-model-bucket", "prod-models", "experiments-2025", "my-models")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; -> the exit status. Errors are one line on standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    return exit_status(lambda: int(options.run(options)), may_be_cut=options.may_be_cut)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smc.storage", description=__doc__.splitlines()[0])
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is retried")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def on_ledger(
        name: str, help: str, command: Callable[[AsyncBlockchainModelStore, argparse.Namespace], Awaitable[int]]
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("bucket", help="bucket, or s3://bucket/prefix")
        sub.add_argument("--json", action="store_true", help="print JSON")
        only_prints = command in (_list_versions, _inspect)
        sub.set_defaults(run=lambda options: asyncio.run(_with_store(command, options)), may_be_cut=only_prints)
        return sub

    verify = on_ledger("verify", "recompute every hash of the ledger", _verify)
    verify.add_argument("--blobs", action="store_true", help="the bytes of every checkpoint too")
    verify.add_argument("--full", action="store_true", help="read every block, whatever the server says of it")
    listing = on_ledger("list-versions", "list the versions, oldest first", _list_versions)
    listing.add_argument("--experiment", help="only this experiment's")
    listing.add_argument("--last", type=int, metavar="N", help="only the newest N")
    inspect = on_ledger("inspect", "show one version, its configuration and tensors", _inspect)
    inspect.add_argument("version", nargs="?", help="like v0000000042; the newest if left out")
    recovery = on_ledger("recover", "commit what the local spool keeps for this ledger", _recover)
    recovery.add_argument("--spool", type=Path, help="the spool directory (default: SMC_SPOOL_DIR or ~/.smc/spool)")

    server = commands.add_parser("dev-server", help="run a real S3 server on loopback, data kept")
    server.add_argument("--dir", type=Path, default=Path(".smc/s3"), help="data and credentials (default: .smc/s3)")
    server.add_argument("--port", type=int, help="the S3 port (default: the last one, or a free one)")
    server.add_argument(
        "--bucket", action="append", help=f"a bucket to create; repeatable (default: {', '.join(_DEV_BUCKETS)})"
    )
    server.set_defaults(run=_dev_server, may_be_cut=False)
    return parser


async def _with_store(
    command: Callable[[AsyncBlockchainModelStore, argparse.Namespace], Awaitable[int]], options: argparse.Namespace
) -> int:
    async with AsyncBlockchainModelStore(options.bucket) as store:
        return await command(store, options)


async def _verify(store: AsyncBlockchainModelStore, options: argparse.Namespace) -> int:
    report = await store.verify(blobs=options.blobs, full=options.full)
    if options.json:
        _print_json({**vars(report), "ok": report.ok})
    else:
        for key, reason in report.problems:
            print(f"{key}: {reason}")
        checked = "bytes checked" if options.blobs else "sizes checked"
        print(
            f"{'ok' if report.ok else 'CORRUPT'}: {report.versions} versions, {report.entries} entries in "
            f"{report.blocks} blocks, {report.blobs} checkpoints ({checked}), {report.collected} collected, "
            f"{len(report.problems)} problems"
        )
    return 0 if report.ok else 1


async def _list_versions(store: AsyncBlockchainModelStore, options: argparse.Namespace) -> int:
    versions = await store.list_versions()
    if options.experiment is not None:
        versions = [v for v in versions if v.experiment == options.experiment]
    if options.last is not None:
        versions = versions[max(0, len(versions) - options.last) :]
    if options.json:
        _print_json([_as_json(v) for v in versions])
        return 0
    print(f"{'version':<12}{'time (UTC)':<21}{'experiment':<14}{'step':>8}  {'loss':>10}  {'hash':<9} message")
    for v in versions:
        loss = "" if v.loss is None else f"{v.loss:.3e}"
        print(
            f"{v.version_id:<12}{v.timestamp:%Y-%m-%d %H:%M:%S}  {v.experiment:<14}{v.step:>8}  {loss:>10}  "
            f"{v.content_hash[:8]}  {v.commit_message}"
        )
    return 0


async def _inspect(store: AsyncBlockchainModelStore, options: argparse.Namespace) -> int:
    version = await (store.get_version(options.version) if options.version else store.get_head())
    if version is None:
        print(f"{store.uri} is empty")
        return 0
    from smc.checkpoint import decode

    snapshot = decode(await store.load_checkpoint(version))
    shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in snapshot.tensors.items()}
    metadata = snapshot.metadata.model_dump(mode="json")
    if options.json:
        _print_json({"version": _as_json(version), "checkpoint": metadata, "tensors": shapes})
        return 0
    for name, value in _as_json(version).items():
        print(f"{name:<16}{value}")
    for name, value in metadata.items():
        print(f"{name:<16}{orjson.dumps(value).decode()}")
    for name, (dtype, *shape) in sorted(shapes.items()):
        print(f"  {name:<52}{dtype:<10}{' x '.join(map(str, shape))}")
    return 0


async def _recover(store: AsyncBlockchainModelStore, options: argparse.Namespace) -> int:
    versions = await recover(store, Spool(options.spool))
    if options.json:
        _print_json([_as_json(v) for v in versions])
        return 0
    for v in versions:
        print(f"{v.version_id}  step {v.step}  {v.content_hash[:8]}  {v.commit_message}")
    print(f"{len(versions)} commits recovered into {store.uri}")
    return 0


def _dev_server(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with DevServer(options.dir, buckets=options.bucket or _DEV_BUCKETS, port=options.port) as server:
        print(
            f"S3 at {server.endpoint_url}, buckets {', '.join(server.buckets)}, data in {options.dir}; Ctrl-C ends it"
        )
        print(f"In another terminal:  . {os.path.join(options.dir, 's3.env')}", flush=True)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0


def _as_json(version: ModelVersion) -> dict[str, Any]:
    return {"version": version.version_id, **version.model_dump(mode="json")}


def _print_json(value: object) -> None:
    def plain(item: object) -> object:
        if isinstance(item, datetime):
            return item.isoformat()
        raise TypeError(type(item).__name__)

    print(orjson.dumps(value, default=plain, option=orjson.OPT_INDENT_2).decode())


if __name__ == "__main__":
    sys.exit(main())
