"""What every command does with text and with an error: one line, whatever is in it, and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path

from smc.errors import ConfigError, Corrupt, SpectralMCError

__all__ = ["add_models", "check_file", "exit_status", "replace_file", "say", "shown"]


def shown(text: str) -> str:
    """A text as one line that moves no cursor and changes no colour: what would do so is shown by its number.

    That is control characters, those that turn the direction of writing, and what separates lines.
    """
    return "".join(c if c.isprintable() or c == " " or _is_harmless(c) else _escaped(c) for c in text)


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) in ("Zs", "Cn", "Co")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="backslashreplace").decode()


def say(line: str = "") -> None:
    """Print one line on standard output."""
    print(shown(line))


def check_file(path: Path) -> None:
    """Raises: ConfigError if something stands at this path that a file cannot replace."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file, and is not replaced by one: give another name")


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file beside and rename it, so that the old one stays until the new one is whole.

    Raises: ConfigError if what is there is no file; OSError.
    """
    check_file(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def exit_status(command: Callable[[], int], *, may_be_cut: bool = False) -> int:
    """Run a command; -> its status, 1 for a corrupt ledger, 2 for what could not be carried out, 130 for Ctrl-C.

    `may_be_cut`: the command only prints, and whoever reads it may stop doing so.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whatever the locale, a character that it lacks is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except Corrupt as error:
        print(f"corrupt: {shown(str(error))}", file=sys.stderr)
        return 1
    except (SpectralMCError, OSError) as error:
        if may_be_cut and isinstance(error, BrokenPipeError):
            return 0
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def add_models(parser: argparse.ArgumentParser) -> None:
    """The option that names files with processes and products of one's own."""
    parser.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file that registers processes and products of your own; repeatable",
    )
