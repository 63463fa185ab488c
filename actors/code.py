"""Which source a LedgerActor runs: what differs may not be the same ledger."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["code_version", "sources"]


@lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the source that a LedgerActor runs: what differs may not be the same ledger."""
    files = sources()
    return hashlib.sha256(b"".join(files[name].read_bytes() for name in sorted(files))).hexdigest()[:16]


def sources() -> dict[str, Path]:
    """The files that a LedgerActor runs, by module: its own and what that imports of this project, directly or not.

    Imports for types alone do not count.
    """
    found: dict[str, Path] = {}
    waiting = ["actors.ledger"]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name) if name not in found else None
        if spec is not None and spec.origin is not None:
            found[name] = Path(spec.origin)
            waiting += _imports(ast.parse(found[name].read_bytes()))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this project that a module imports, with the packages they are in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] in ("smc", "actors", "jobs"):
                yield from (".".join(parts[: n + 1]) for n in range(len(parts)) if _is_module(parts[: n + 1]))
        yield from _imports(node)


def _is_module(parts: Sequence[str]) -> bool:
    with suppress(ImportError):
        return importlib.util.find_spec(".".join(parts)) is not None
    return False
