"""Model versions in a tamper-evident, ordered ledger on S3."""

from smc.storage.chain import ModelVersion
from smc.storage.store import (
    AsyncBlockchainModelStore,
    commit_snapshot,
    load_snapshot_from_checkpoint,
    recover,
)

__all__ = [
    "AsyncBlockchainModelStore",
    "ModelVersion",
    "commit_snapshot",
    "load_snapshot_from_checkpoint",
    "recover",
]
