"""What the documents tell a reader to type is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from smc.storage.__main__ import _parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (path.name, match.group(1))
    for path in DOCUMENTS
    for match in re.finditer(r"^(?:\$ )?python -m smc\.storage ([^#\n]*)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_command_of_the_ledger_is_one(document: str, command: str) -> None:
    _parser().parse_args(shlex.split(command))


def test_every_command_is_documented() -> None:
    shown = {command.split()[0] for document, command in COMMANDS if document == "operations.md"}
    (subparsers,) = (action for action in _parser()._actions if action.metavar == "COMMAND")
    assert set(subparsers.choices or ()) - {"dev-server"} == shown
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
