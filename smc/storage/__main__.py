"""The ledger's command line: `python -m smc.storage COMMAND BUCKET`.

Exit status: 0 fine, 1 the ledger is corrupt, 2 the command could not be carried out. `--json` prints for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from smc.reporting import changing, commands
from smc.reporting.command_line import add_models, exit_status
from smc.storage.dev_server import DevServer
from smc.storage.memory import parse_seen
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["main"]


# The demo's bucket, and those that the examples name.
_DEV_BUCKETS = ("spectralmc", "my-model-bucket", "prod-models", "experiments-2025", "my-models")
_VERSION = "v0000000042, 42, head, head:EXPERIMENT, an alias, or the beginning of a hash"

Command = Callable[[AsyncBlockchainModelStore, argparse.Namespace], Awaitable[int]]


class AddCommand(Protocol):
    """Adds one command that works on an open ledger."""

    def __call__(self, name: str, command: Command, *, only_prints: bool = False) -> argparse.ArgumentParser: ...


def main(arguments: list[str] | None = None) -> int:
    """Run one command; -> the exit status. Errors are one line on standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    return exit_status(lambda: int(options.run(options)), may_be_cut=options.may_be_cut)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smc.storage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is retried")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def on_ledger(name: str, command: Command, *, only_prints: bool = False) -> argparse.ArgumentParser:
        about = (command.__doc__ or "").strip()
        sub = subparsers.add_parser(name, help=about, description=about)
        sub.add_argument("bucket", help="bucket, or s3://bucket/prefix")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=lambda options: asyncio.run(_with_store(command, options)), may_be_cut=only_prints)
        return sub

    _add_looking(on_ledger)
    _add_changing(on_ledger)
    _add_collection(on_ledger)
    _add_showing(on_ledger)
    server = subparsers.add_parser("dev-server", help="run a real S3 server on loopback, data kept")
    server.add_argument("--dir", type=Path, default=Path(".smc/s3"), help="data and credentials (default: .smc/s3)")
    server.add_argument("--port", type=_port, help="the S3 port (default: the last one, or a free one)")
    server.add_argument(
        "--bucket", action="append", help=f"a bucket to create; repeatable (default: {', '.join(_DEV_BUCKETS)})"
    )
    server.set_defaults(run=_dev_server, may_be_cut=False)
    return parser


def _add_as_of(sub: argparse.ArgumentParser) -> None:
    about = "the ledger as it was then: its versions, and what its aliases named"
    sub.add_argument("--at", type=_time, metavar="TIME", help=about)


def _add_looking(on_ledger: AddCommand) -> None:
    sub = on_ledger("verify", commands.verify)
    sub.add_argument("--blobs", action="store_true", help="the bytes of every checkpoint too")
    sub.add_argument("--full", action="store_true", help="read every block, whatever the server says of it")
    sub.add_argument(
        "--since",
        type=parse_seen,
        metavar="INDEX:HASH",
        help="an entry that was there, as an earlier call printed it: the log has to go on from it",
    )
    sub.add_argument("--memory", type=Path, metavar="FILE", help="a file that keeps that entry from call to call")
    on_ledger("find-corruption", commands.find_corruption)
    sub = on_ledger("list-versions", commands.list_versions, only_prints=True)
    sub.add_argument("--experiment", help="only this experiment's")
    sub.add_argument("--message", metavar="TEXT", help="only those whose message contains this")
    sub.add_argument("--tag", metavar="ALIAS", help="only the one that this alias names")
    sub.add_argument(
        "--since", type=_time, metavar="TIME", help="2026-11-25, 2026-11-25T10:00 (UTC), or 90m, 2h, 3d ago"
    )
    sub.add_argument("--until", type=_time, metavar="TIME")
    sub.add_argument("--last", type=_count, metavar="N", help="only the newest N")
    _add_as_of(sub)
    sub = on_ledger("inspect", commands.inspect, only_prints=True)
    sub.add_argument("version", nargs="?", help=f"{_VERSION}; the newest if left out")
    add_models(sub)
    _add_as_of(sub)
    sub = on_ledger("diff", commands.diff, only_prints=True)
    sub.add_argument("a", help=_VERSION)
    sub.add_argument("b", help="another")
    add_models(sub)
    _add_as_of(sub)
    sub = on_ledger("lineage", commands.lineage)
    sub.add_argument("--out", type=Path, metavar="FILE", help="a picture too: .png, .svg or .pdf")
    _add_as_of(sub)
    sub = on_ledger("alias-history", commands.alias_history, only_prints=True)
    sub.add_argument("name", nargs="?", help="only this alias's")
    sub = on_ledger("export", commands.export)
    sub.add_argument("version", help=_VERSION)
    sub.add_argument("file", type=Path)
    sub.add_argument("--force", action="store_true", help="replace the file")
    _add_as_of(sub)


def _add_changing(on_ledger: AddCommand) -> None:
    for name, command in (("tag", changing.tag), ("untag", changing.untag), ("rollback", changing.rollback)):
        sub = on_ledger(name, command)
        sub.add_argument("name", help="the alias")
        if name != "untag":
            sub.add_argument("version", nargs="?" if name == "rollback" else None, help=_VERSION)
        sub.add_argument("--message", default="", help="why, for the ledger")
    sub = on_ledger("import", changing.import_)
    sub.add_argument("file", type=Path)
    sub.add_argument("--experiment", default="", help="the experiment it belongs to")
    add_models(sub)
    sub.add_argument("--message", default="", help="for the ledger")
    sub = on_ledger("recover", changing.recover_spool)
    sub.add_argument("--spool", type=Path, help="the spool directory (default: SMC_SPOOL_DIR or ~/.smc/spool)")


def _add_collection(on_ledger: AddCommand) -> None:
    for name, command in (("gc-preview", changing.gc_preview), ("gc-run", changing.gc_run)):
        sub = on_ledger(name, command)
        sub.add_argument("keep", type=int, help="how many of the newest versions keep their checkpoints")
        sub.add_argument("--protect-tags", type=_names, default=[], metavar="5,12,BEST", help="keep these versions too")
        sub.add_argument("--lineage", action="store_true", help="keep what a kept version was resumed from, and so on")
        sub.add_argument("--no-heads", action="store_true", help="do not keep the newest version of each experiment")
        sub.add_argument(
            "--no-alias-history", action="store_true", help="do not keep what an alias named once and does not any more"
        )
        sub.add_argument(
            "--min-age",
            type=_age,
            default=timedelta(hours=1),
            metavar="AGE",
            help="leave what is younger, like 90m or 2d (default: 1h); less than 1h only while nobody commits",
        )
        if name == "gc-run":
            sub.add_argument("--yes", action="store_true", help="really delete")


def _add_showing(on_ledger: AddCommand) -> None:
    sub = on_ledger("tensorboard-log", commands.tensorboard_log)
    add_models(sub)
    sub.add_argument("--log-dir", type=Path, default=Path("runs"), help="where TensorBoard looks (default: runs)")
    sub = on_ledger("report", commands.report)
    sub.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    sub.add_argument("--contracts", type=int, default=2048, help="sample for the comparison with the closed form")
    sub.add_argument("--blobs", action="store_true", help="verify the bytes of every checkpoint")
    add_models(sub)
    _add_as_of(sub)


async def _with_store(command: Command, options: argparse.Namespace) -> int:
    for path in getattr(options, "models", ()):
        from smc.problem.models import load_models

        load_models(path)
    async with AsyncBlockchainModelStore(options.bucket) as store:
        return await command(store, options)


def _dev_server(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with DevServer(options.dir, buckets=options.bucket or _DEV_BUCKETS, port=options.port) as server:
        try:
            print(
                f"S3 at {server.endpoint_url}, buckets {', '.join(server.buckets)}, data in {options.dir}; "
                f"Ctrl-C ends it\nIn another terminal:  . {os.path.join(options.dir, 's3.env')}",
                flush=True,
            )
            return server.wait()
        except KeyboardInterrupt:
            return 0


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None or (not match[2] and float(match[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is no age: like 45s, 90m, 2h or 3d")
    try:
        age = timedelta(**{{"s": "seconds", "m": "minutes", "h": "hours"}.get(match[2], "days"): float(match[1])})
        datetime.now(UTC) - age
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text!r} is longer ago than dates go") from None
    return age


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of versions")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65535")
    return int(text)


def _time(text: str) -> datetime:
    if re.fullmatch(r"[\d.]+[smhd]", text):
        return datetime.now(UTC) - _age(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: like 2026-11-25, 2026-11-25T10:00, or 2h for two hours ago"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


if __name__ == "__main__":
    sys.exit(main())
