"""Model versions in a tamper-evident, ordered ledger on S3."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smc.storage.chain import ModelVersion
from smc.storage.recovery import recover
from smc.storage.store import AsyncBlockchainModelStore

if TYPE_CHECKING:
    from smc.storage.snapshots import commit_snapshot, load_snapshot_from_checkpoint

__all__ = [
    "AsyncBlockchainModelStore",
    "ModelVersion",
    "commit_snapshot",
    "load_snapshot_from_checkpoint",
    "recover",
]


def __getattr__(name: str) -> Any:
    # Only these two need torch, whose import takes longer than most commands and every append.
    if name in ("commit_snapshot", "load_snapshot_from_checkpoint"):
        return getattr(import_module("smc.storage.snapshots"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
