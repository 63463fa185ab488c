"""A pricer's state into the ledger, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.checkpoint.tensor_header import model_hash
from smc.storage.chain import ModelVersion
from smc.storage.spool import CommitRecord
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["commit_snapshot", "load_snapshot_from_checkpoint"]


async def commit_snapshot(
    store: AsyncBlockchainModelStore,
    snapshot: GbmCVNNPricerConfig,
    message: str,
    *,
    experiment: str = "",
    loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> ModelVersion:
    """Commit a pricer's state now, and return the version it became.

    `parameters`, whatever JSON holds, stand in the entry as those of `train` do.

    Raises: ConfigError for what an entry cannot hold, before anything is uploaded; and what the store raises.
    """
    record = CommitRecord.checked(
        ledger=store.uri,
        message=message,
        step=snapshot.global_step,
        loss=loss,
        experiment=experiment,
        metrics=dict(metrics or {}),
        parameters=dict(parameters or {}),
        resumed_from=snapshot.resumed_from,
    )
    data = await asyncio.to_thread(lambda: encode(Snapshot.of(snapshot)))
    return await store.commit(data, record.model_copy(update={"model_hash": model_hash(data)}), fresh=True)


async def load_snapshot_from_checkpoint(
    store: AsyncBlockchainModelStore,
    version: ModelVersion,
    model_template: nn.Module | None = None,
    config_template: GbmCVNNPricerConfig | None = None,
) -> GbmCVNNPricerConfig:
    """A version's state, its hash verified, ready for `GbmCVNNPricer(...)`.

    The templates give the architecture and device, and a configuration that the checkpoint is checked
    against; a network made by `build_cvnn` needs neither. Raises: Corrupt, NotFound, ConfigError.
    """
    data = await store.load_checkpoint(version)
    state = restore(decode(data), model_template, config_template)
    return replace(state, resumed_from=version.version_id)
