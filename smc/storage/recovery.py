"""What a crash or an outage left in the spool, into the ledger."""

from __future__ import annotations

from collections.abc import Callable

from smc.errors import AccessDenied, ConfigError, Corrupt
from smc.storage.chain import ModelVersion
from smc.storage.spool import Spool
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["recover"]


async def recover(
    store: AsyncBlockchainModelStore, spool: Spool, *, told: Callable[[ModelVersion], None] | None = None
) -> list[ModelVersion]:
    """Commit what the spool keeps for this ledger, each once, and remove it when it is in; `told` hears of each.

    What turns out to be in the ledger already, because its acknowledgement came too late, is not uploaded again.
    Raises: Corrupt, after all the others are in, naming what is no record, is not what was kept, or what the ledger
    cannot hold; it stays where it is.
    """
    records, left = spool.read()
    versions = []
    for record in records:
        if record.ledger != store.uri:
            continue
        entry = await store.ledger.find(record.commit_id)
        version = entry.version if entry is not None else None
        try:
            data = b"" if version else spool.load(record)
        except Corrupt as error:
            left.append(str(error).removeprefix("spool: "))
            continue
        try:
            version = version or await store.commit(data, record)
        except AccessDenied:
            raise
        except ConfigError as error:
            left.append(f"{record.commit_id}: {error}")
            continue
        spool.remove(record)
        versions.append(version)
        if told is not None:
            told(version)
    if left:
        raise Corrupt(f"spool: {'; '.join(left)}")
    return versions
