"""Which model of a ledger is served: loaded and verified beside the predictions, and swapped in as a whole.

`ModelFollower` is the whole logic, a plain class that is stepped by `poll`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from smc.checkpoint.file import decode_parts, restore
from smc.checkpoint.tensor_header import TensorHeader
from smc.errors import ConfigError, Corrupt, NotFound, NumericsError, Unavailable
from smc.prediction.predicting import Predicting
from smc.prediction.predictor import Predictor
from smc.problem.contracts import BoundSpec, bound_of, resolve_domain, unit_of
from smc.problem.problem import known_fields
from smc.simulation.cuda import require_device, synchronize
from smc.storage.catalog import Catalog
from smc.storage.chain import ModelVersion, block_key
from smc.storage.log import HEAD_KEY
from smc.storage.memory import Seen, read_memory, write_memory
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["ModelFollower", "ServedModel", "ServingStatus", "load_predictor"]

logger = logging.getLogger("smc.serving")

Array = npt.NDArray[np.float64]

# Of so many polls, one asks whether the last known block is still the same and one for the block behind it, in place
# of asking for a new hint: a hint may be lost, and a log be cut behind it.
_ROUND: Final = 16
# Seconds until a version that could not be loaded is tried again: doubled each time, up to this.
_LONGEST_WAIT: Final = 60.0
# References to a retired model that nobody else has: of the list, of the loop over it, and of the question.
_ONLY_OURS: Final = 3


@dataclass(frozen=True)
class ServedModel(Predicting):
    """A verified version, ready to predict. It never changes: whoever holds it goes on with it after a swap."""

    version: ModelVersion
    predictor: Predictor

    def asked(self) -> Predictor:
        """Its predictor."""
        return self.predictor


@dataclass(frozen=True)
class ServingStatus:
    """What is served, what should be, and what is in the way.

    `checked` is when the ledger was last seen to be as expected; `problem` is None while all is well.
    """

    serving: ModelVersion | None
    wanted: ModelVersion | None
    problem: str | None
    checked: datetime | None
    polls: int
    swaps: int


async def load_predictor(
    store: AsyncBlockchainModelStore,
    version: ModelVersion,
    *,
    device: torch.device | str = "cpu",
    model_template: nn.Module | None = None,
    whole: bool = False,
) -> Predictor:
    """A version's predictor, verified: its model's tensors are read, not the optimiser's, unless `whole`.

    Raises: Corrupt, NotFound, Unavailable; ConfigError if a template is needed or does not fit, or if nothing was
    trained yet; NumericsError if it does not predict.
    """
    header, parts = await store.load_model(version, whole=whole)
    return await asyncio.to_thread(lambda: _built(version, header, parts, torch.device(device), model_template))


def _same_bytes(a: ModelVersion, b: ModelVersion) -> bool:
    """Whether what a prediction reads of two versions is the same, by all that their entries say of it."""
    return (a.content_hash, a.model_hash) == (b.content_hash, b.model_hash)


def _built(
    version: ModelVersion,
    header: TensorHeader,
    parts: Mapping[str, memoryview],
    device: torch.device,
    template: nn.Module | None,
) -> Predictor:
    state = restore(decode_parts(header, parts), template)
    if state.scaling is None:
        raise ConfigError(f"{version.version_id} was committed before any training: it has no output scaling")
    model = state.cvnn.to(device).eval().requires_grad_(False)
    problem = state.cfg.problem
    domain = resolve_domain(state.domain_bounds, problem.schema)
    size, bars = state.cfg.sim_params.network_size, state.error_bars
    predictor = Predictor(
        model, state.scaling.to(device), domain, size, problem, bars.to(device) if bars is not None else None
    )
    # A first call sets up what later ones use, on a GPU the graphs; and a model that cannot predict is not served.
    middle = np.array([[(domain[name].lower + domain[name].upper) / 2 for name in problem.schema.names]])
    prices = [predictor.predict_price(middle, kind) for kind in predictor.price_kinds]
    levels = [predictor.predict_distribution(middle, kind).host_levels for kind in predictor.distribution_kinds]
    if not all(np.isfinite(np.asarray(values)).all() for values in (*prices, *levels)):
        raise NumericsError(f"{version.version_id} does not predict: a price in the middle of its domain is not finite")
    return predictor


class ModelFollower:
    """Keeps one verified model of a ledger at hand: the one that `reference` means, or from now on means.

    `reference` is a version, a hash, an alias, `head` or `head:EXPERIMENT`; `track` says whether to follow it. By
    default what can move is followed. `memory` is a file that keeps the last entry seen: a ledger that does not
    lead on from there is refused, after a restart as well. `domain`, bounds of all fields or of some, is where its
    users ask: a model that was not trained on all of it is not served, and the one before it goes on. It belongs to one
    event loop; any thread may read `served`. Raises: ConfigError.
    """

    def __init__(
        self,
        store: AsyncBlockchainModelStore,
        reference: str = "head",
        *,
        track: bool | None = None,
        device: torch.device | str = "cpu",
        model_template: nn.Module | None = None,
        memory: Path | None = None,
        domain: Mapping[str, BoundSpec | Mapping[str, float]] | None = None,
    ) -> None:
        self._store, self._reference, self._track = store, reference, track
        self._domain = {name: bound_of(name, bound) for name, bound in (domain or {}).items()}
        if unknown := sorted(set(self._domain) - set(known_fields())):
            raise ConfigError(f"domain_bounds: unknown field {unknown[0]!r}; allowed are {', '.join(known_fields())}")
        self._device, self._template = require_device(device), model_template
        self._memory = memory
        self._remembered = read_memory(memory, store.uri)
        self._etag: str | None = None
        self._end_etag: str | None = None
        self._end = -1  # the last block known to be there
        self._wanted: ModelVersion | None = None
        self._whole = False  # the reference is a hash, so that every byte is to be verified
        self._suspect = False  # the ledger was not what it should be when last looked at
        self._failures, self._retry_at = 0, 0.0
        self._load_error: Exception | None = None
        self._memory_error: OSError | None = None
        self._problem: str | None = None
        self._checked: datetime | None = None
        self._polls = self._swaps = 0
        # Whoever lets go of a model last takes it down, up to a millisecond or two: not a caller.
        self._retired: list[ServedModel] = []
        self.served: ServedModel | None = None

    @property
    def status(self) -> ServingStatus:
        """What is served, and what is in the way."""
        serving = self.served.version if self.served else None
        return ServingStatus(serving, self._wanted, self._problem, self._checked, self._polls, self._swaps)

    async def poll(self) -> None:
        """Look whether something else is to be served, and serve it: one conditional request when nothing is new.

        Whatever was served goes on being served when this fails. Raises: Unavailable, ConfigError, NotFound, Corrupt,
        NumericsError, which are in `status` as well.
        """
        self._polls += 1
        try:
            await self._let_go()
            await self._poll()
        except Exception as error:
            # What is wrong with the ledger stays wrong until it has been looked at again.
            self._suspect = self._suspect or not (isinstance(error, Unavailable) or error is self._load_error)
            self._say(error)
            raise
        self._say(self._memory_error)

    async def _let_go(self) -> None:
        """Take down the retired models that no caller holds any more."""
        ours = [sys.getrefcount(model) <= _ONLY_OURS for model in self._retired]
        if any(ours) and self._device.type == "cuda":
            # A caller's stream may still be reading what would be given to the next model.
            await asyncio.to_thread(synchronize, self._device)
        self._retired = [model for model, done in zip(self._retired, ours, strict=True) if not done]

    def go_on_with(self, store: AsyncBlockchainModelStore) -> None:
        """Look at the ledger through another connection; what was read and what is served stay."""
        self._store, self._etag, self._suspect = store, None, True

    def note(self, error: Exception) -> None:
        """Say why nobody polls any more."""
        self._say(error)

    async def _poll(self) -> None:
        if self._follows and (self._wanted is None or await self._is_news()):
            await self._look()
        self._checked = datetime.now(UTC)
        wanted = self._wanted
        if wanted is None or (self.served is not None and self.served.version == wanted):
            return
        if self._load_error is not None and time.monotonic() < self._retry_at:
            raise self._load_error.with_traceback(None)
        try:
            predictor = await self._loaded(wanted)
        except Exception as error:  # also what torch raises when the device's memory is full
            self._failures, self._load_error = self._failures + 1, error
            self._retry_at = time.monotonic() + min(_LONGEST_WAIT, 0.25 * 2**self._failures)
            raise
        if self.served is not None:
            self._retired.append(self.served)
        # One assignment: a caller has the old model or the new one, and each is whole.
        self.served = ServedModel(wanted, predictor)
        self._failures, self._load_error = 0, None
        self._swaps += 1
        logger.info(
            "serving %s (%s, step %d) for %s", wanted.version_id, wanted.experiment, wanted.step, self._reference
        )

    @property
    def _follows(self) -> bool:
        """Whether the ledger is still to be asked: what is pinned cannot change once it is known."""
        return self._wanted is None or bool(self._track)

    async def _is_news(self) -> bool:
        """Whether the ledger has changed, at the price of one request."""
        if self._suspect:
            return True
        turn = self._polls % _ROUND
        if turn == _ROUND // 2:
            return await self._exists(block_key(self._end + 1))
        if turn == 0 and self._end >= 0:
            await self._check_end()
            return False
        try:
            changed = await self._store.objects.get_if_changed(HEAD_KEY, self._etag)
        except NotFound:
            return True
        if changed is None:
            return False
        self._etag = changed[1]
        return True

    async def _look(self) -> None:
        """Read what is new, and what the reference means now."""
        etag, self._etag = self._etag, None  # asked again if any of this fails
        if self._end >= 0:
            await self._check_end()
        catalog = await self._store.catalog()
        self._check_memory(catalog)
        self._remember(catalog)
        version = catalog.resolve(self._reference)
        # Whoever asks for a hash gets those bytes: the hash of the model alone, in the entry, is its committer's word.
        self._whole = catalog.is_hash(self._reference)
        moves = self._reference.startswith("head") or self._reference in catalog.aliases
        if self._track and not moves:
            raise ConfigError(f"{self._reference} never moves: there is nothing to track")
        self._track = moves if self._track is None else self._track
        if version != self._wanted:
            self._wanted, self._failures, self._load_error = version, 0, None
        self._etag, self._suspect = etag, False

    async def _loaded(self, version: ModelVersion) -> Predictor:
        served = self.served.version if self.served is not None else None
        if self.served is not None and served is not None and _same_bytes(served, version):
            return self.served.predictor
        predictor = await load_predictor(
            self._store, version, device=self._device, model_template=self._template, whole=self._whole
        )
        self._check_domain(version, predictor)
        return predictor

    def _check_domain(self, version: ModelVersion, predictor: Predictor) -> None:
        schema = predictor.problem.schema
        for field, asked in self._domain.items():
            schema.column(field)
            learnt = predictor.domain[field]
            if not (learnt.lower <= asked.lower and asked.upper <= learnt.upper):
                raise ConfigError(
                    f"{version.version_id} was trained on {field} from {learnt.lower:g} to {learnt.upper:g}, and is to "
                    f"be asked from {asked.lower:g} to {asked.upper:g}{unit_of(field, schema)}"
                )

    async def _exists(self, key: str) -> bool:
        try:
            await self._store.objects.stat(key)
        except NotFound:
            return False
        return True

    async def _check_end(self) -> None:
        """Raises: Corrupt if the last block that was there is not, or not the same."""
        key = block_key(self._end)
        try:
            changed = await self._store.objects.get_if_changed(key, self._end_etag)
        except NotFound:
            reason = "the block, which was there, is missing: the log was cut off"
            raise Corrupt(f"{key}: {reason}", ((key, reason),)) from None
        if changed is None:
            return
        data, etag = changed
        if self._remembered is None or self._remembered.block != self._end or not self._remembered.ends(data):
            reason = "the block is another than the one that was there"
            raise Corrupt(f"{key}: {reason}", ((key, reason),))
        self._end_etag = etag

    def _check_memory(self, catalog: Catalog) -> None:
        known = self._remembered
        if known is None:
            return
        if not catalog.has(known.index, known.hash):
            key = block_key(known.block)
            if catalog.tail.block <= known.block:
                reason = f"the block, which was there, is missing: the log ends at block {catalog.tail.block - 1}"
            else:
                reason = "its last entry is not the one that was there: this is not the ledger that was served before"
            raise Corrupt(f"{key}: {reason}", ((key, reason),))

    def _remember(self, catalog: Catalog) -> None:
        tail = catalog.tail
        if tail.block == 0:
            return
        seen = Seen(self._store.uri, tail.block - 1, tail.parent_hash, tail.index - 1)
        if self._end != seen.block:
            self._end, self._end_etag = seen.block, None
        if seen == self._remembered and self._memory_error is None:
            return
        self._remembered, self._memory_error = seen, None
        if self._memory is not None:
            # What cannot be remembered is no reason not to serve; it is a problem all the same.
            try:
                write_memory(self._memory, seen)
            except OSError as error:
                self._memory_error = error

    def _say(self, error: Exception | None) -> None:
        """Log a problem when its kind is new, and its end."""
        before, self._problem = self._problem, f"{type(error).__name__}: {error}" if error else None
        if error is not None and not (before or "").startswith(f"{type(error).__name__}: "):
            kept = f"; goes on with {self.served.version.version_id}" if self.served else ""
            logger.warning("%s: %s%s", self._reference, self._problem, kept)
        elif error is None and before is not None:
            logger.info("%s: all is well again", self._reference)
