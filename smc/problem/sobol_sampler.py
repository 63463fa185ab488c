"""Contracts drawn quasi-randomly: a scrambled Sobol sequence over the domain, resumable anywhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

from smc.errors import ConfigError
from smc.problem.contracts import SCHEMA, BoundSpec, resolve_domain
from smc.problem.schema import Schema

__all__ = ["SobolSampler"]

_BLOCK = 1024
_EPOCH = 1 << 30


class SobolSampler:
    """The sequence of training contracts, as a function of seed and index alone.

    `skip` is how many contracts were already taken; it is the sampler's whole state. Contract i is
    the same whether it was reached one at a time, in batches, or by starting at skip = i.

    Source: Sobol (1967); Joe and Kuo direction numbers (2008); linear matrix scrambling with a
    digital shift, Matousek (1998), as in scipy.stats.qmc.
    """

    def __init__(
        self,
        domain_bounds: Mapping[str, BoundSpec | Mapping[str, float]],
        *,
        seed: int,
        skip: int = 0,
        schema: Schema = SCHEMA,
    ) -> None:
        if skip < 0:
            raise ConfigError(f"skip must be at least 0, got {skip}")
        domain = resolve_domain(domain_bounds, schema)
        self.skip = skip
        self._lower = np.array([domain[f].lower for f in schema.names])
        self._width = np.array([domain[f].upper - domain[f].lower for f in schema.names])
        self._seed = seed
        self._block_start = -1
        self._fields = len(schema)
        self._block = np.empty((0, self._fields))
        self._engine: qmc.Sobol | None = None
        self._epoch = 0

    def sample(self, n: int) -> npt.NDArray[np.float64]:
        """The next n contracts. Shapes: -> (n, fields)."""
        contracts = self.at(self.skip, n)
        self.skip += n
        return contracts

    def at(self, start: int, n: int) -> npt.NDArray[np.float64]:
        """Contracts start ... start + n - 1, without moving `skip`. Shapes: -> (n, fields)."""
        return self._lower + self._width * self.unit_points(start, n)

    def unit_points(self, start: int, n: int) -> npt.NDArray[np.float64]:
        """Points start ... start + n - 1 of the sequence in the unit cube, without moving `skip`."""
        pieces = []
        at = start
        while at < start + n:
            first = at - at % _BLOCK
            block = self._block_at(first)
            stop = min(start + n, first + _BLOCK)
            pieces.append(block[at - first : stop - first])
            at = stop
        return np.concatenate(pieces) if pieces else np.empty((0, self._fields))

    def _block_at(self, first: int) -> npt.NDArray[np.float64]:
        if first != self._block_start:
            # scipy's generator goes forward only, and fast-forwards no more than 32 bits: going back means
            # starting again, which a resumed run does once, and every 2^30 points are scrambled anew.
            epoch, position = divmod(first, _EPOCH)
            if self._engine is None or epoch != self._epoch or self._engine.num_generated > position:
                rng = np.random.default_rng([self._seed, epoch])
                self._engine, self._epoch = qmc.Sobol(d=self._fields, scramble=True, bits=30, rng=rng), epoch
            if position > self._engine.num_generated:
                self._engine.fast_forward(position - self._engine.num_generated)
            self._block = self._engine.random(_BLOCK)
            self._block_start = first
        return self._block
