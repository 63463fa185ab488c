"""Training examples: contracts of the Sobol stream, what the network sees of them, and their targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from smc.contracts import BoundSpec
from smc.gbm import BlackScholes
from smc.scaling import features, intrinsic, unit_of_price
from smc.sobol_sampler import SobolSampler
from smc.spectrum import put_spectrum

__all__ = ["Contracts", "ExampleSource", "Examples"]

# On a CPU rows are made in whole blocks of the stream: vectorised functions round the ends of an array
# differently, and a row must not depend on the range that it is asked for in.
_BLOCK = 1024


class Examples(NamedTuple):
    """Shapes: inputs (n, features); targets (n, bins, 2), real and imaginary parts of scaled spectra."""

    inputs: Tensor
    targets: Tensor


class Contracts(NamedTuple):
    """Contracts on a device, and what follows from them alone.

    Shapes: table (n, 6) float64; inputs (n, features); terms (3, n), the strike, the scale of the payoff, and
    what is taken off the price.
    """

    table: Tensor
    inputs: Tensor
    terms: Tensor

    def select(self, rows: Tensor) -> Contracts:
        """The rows with these numbers, copied."""
        return Contracts(
            self.table.index_select(0, rows), self.inputs.index_select(0, rows), self.terms.index_select(1, rows)
        )


class ExampleSource:
    """Makes example i of the training stream, a function of seeds and i alone."""

    def __init__(self, engine: BlackScholes, domain: Mapping[str, BoundSpec]) -> None:
        self._engine, self._domain = engine, domain
        self._params = engine.config.sim_params
        self._sampler = SobolSampler(domain, seed=self._params.mc_seed)

    def contracts(self, start: int, count: int) -> Contracts:
        """Contracts start ... start + count - 1 of the Sobol stream."""
        if self._engine.device.type == "cuda":
            return self._describe(start, count)
        first = start - start % _BLOCK
        blocks = [self._describe(at, _BLOCK) for at in range(first, start + count, _BLOCK)]
        table, inputs = (torch.cat([b[i] for b in blocks])[start - first :][:count] for i in (0, 1))
        return Contracts(table, inputs, torch.cat([b.terms for b in blocks], dim=1)[:, start - first :][:, :count])

    def simulate(self, contracts: Contracts, first: Tensor) -> Examples:
        """Simulated examples, row 0 being stream `first`. Shapes: first () int64 on the engine's device."""
        strike, scale, shift = contracts.terms
        spectrum = put_spectrum(self._engine.simulate(contracts.table, first), strike, scale, self._params.network_size)
        targets = torch.view_as_real(spectrum)
        targets[:, 0, 0] -= shift
        return Examples(contracts.inputs, targets)

    def _describe(self, start: int, count: int) -> Contracts:
        points = torch.from_numpy(self._sampler.at(start, count))
        if self._engine.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
            points = points.pin_memory()
        table = points.to(self._engine.device, non_blocking=True)
        unit = unit_of_price(table)
        discount = torch.exp(-table[:, 3] * table[:, 2])
        terms = torch.stack([table[:, 1], discount / unit, intrinsic(table)])
        dtype = self._params.dtype.torch
        return Contracts(table, features(table, self._domain).to(dtype), terms.to(dtype))
