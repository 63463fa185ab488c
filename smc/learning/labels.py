"""Training examples: contracts of the Sobol stream, what the network sees of them, and their targets.

With differential labels an example is a value and a derivative: along one random direction for each contract, of
what the network sees and of every bin of the target, the latter as the mean over the paths of each slice of the
payoff's pathwise derivative. It costs no second simulation.

Source: Huge and Savine, "Differential machine learning" (2020); pathwise derivatives, Glasserman, "Monte Carlo
Methods in Financial Engineering" (2003), section 7.2. A slice's bounds move with the contract, but so that it keeps
its probability, which is why the derivative of its mean is the mean of the derivative.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.learning.scale import features, intrinsic, spread_of, unit_of_price
from smc.models.numerical import Precision
from smc.problem.contracts import BoundSpec, columns
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes
from smc.simulation.levels import put_spectrum, put_spectrum_and_slope
from smc.simulation.normals import box_muller, philox4x32

__all__ = ["Contracts", "ExampleSource", "Examples", "ExamplesAhead"]

# On a CPU rows are made in whole blocks of the stream: vectorised functions round the ends of an array
# differently, and a row must not depend on the range that it is asked for in.
_BLOCK = 1024
# Sets the random numbers of directions apart from those of paths, which have the same key.
_DIRECTIONS = 0x5EED0D1F
# Between weights equal in units of price (exponent 0) and in bp of spot (2): measured by benchmarks.accuracy.
_WEIGHT_EXPONENT: Final = 0.5


class Examples(NamedTuple):
    """Shapes: inputs (n, order, features); targets (n, order, bins, 2), real and imaginary parts of scaled
    spectra; weights (n,), in the loss. `order` is 1, or 2 with differential labels: values, then derivatives.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class Contracts(NamedTuple):
    """Contracts on a device, and what follows from them alone.

    Shapes: table (n, 6) float64; inputs (n, order, features); terms (n, 3): the strike, the scale of the payoff and
    what is taken off the price; with differential labels (n, 7): the derivatives of the latter two, and a and b of
    d ln S = a + b ln(S / K), the derivative of a price at expiry, or where forwards are normalised that of ln F, and
    b; weights (n,).
    """

    table: Tensor
    inputs: Tensor
    terms: Tensor
    weights: Tensor

    def select(self, rows: Tensor) -> Contracts:
        """The rows with these numbers, copied."""
        return Contracts(*(values.index_select(0, rows) for values in self))


class ExampleSource:
    """Makes example i of the training stream, a function of seeds and i alone.

    Raises: ConfigError for differential labels of the Euler scheme: only the log scheme says from a price at expiry
    how that price moves with the contract.
    """

    def __init__(self, engine: BlackScholes, domain: Mapping[str, BoundSpec], *, differential: bool = False) -> None:
        if differential and not engine.config.simulate_log_return:
            raise ConfigError("differential labels need simulate_log_return=True")
        self.engine, self.differential = engine, differential
        self._domain = domain
        self._params = engine.config.sim_params
        self._sampler = SobolSampler(domain, seed=self._params.mc_seed)

    def contracts(self, start: int, count: int) -> Contracts:
        """Contracts start ... start + count - 1 of the Sobol stream."""
        if self.engine.device.type == "cuda":
            return self._describe(start, count)
        first = start - start % _BLOCK
        blocks = [self._describe(at, _BLOCK) for at in range(first, start + count, _BLOCK)]
        return Contracts(*(torch.cat(parts)[start - first :][:count] for parts in zip(*blocks, strict=True)))

    def simulate(self, contracts: Contracts, first: Tensor) -> Examples:
        """Simulated examples, row 0 being stream `first`. Shapes: first () int64 on the engine's device."""
        strike, scale, shift, *slopes = contracts.terms.T.contiguous()
        terminal, size = self.engine.simulate(contracts.table, first), self._params.network_size
        if not self.differential:
            targets = torch.view_as_real(put_spectrum(terminal, strike, scale, size))[:, None]
            targets[:, 0, 0, 0] -= shift
            return Examples(contracts.inputs, targets, contracts.weights)
        d_scale, d_shift, constant, slope = slopes
        d_log, normalized = (constant, slope), self.engine.config.normalize_forwards
        spectra = put_spectrum_and_slope(terminal, strike, scale, d_scale, d_log, size, normalized=normalized)
        targets = torch.stack([torch.view_as_real(spectrum) for spectrum in spectra], dim=1)
        targets[:, 0, 0, 0] -= shift
        targets[:, 1, 0, 0] -= d_shift
        return Examples(contracts.inputs, targets, contracts.weights)

    def _describe(self, start: int, count: int) -> Contracts:
        points = torch.from_numpy(self._sampler.at(start, count))
        if self.engine.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
            points = points.pin_memory()
        table = points.to(self.engine.device, non_blocking=True)
        dtype = self._params.dtype.torch
        if not self.differential:
            inputs, terms = features(table, self._domain)[:, None], _terms(table)
        else:
            (value, terms, law), (d_value, d_terms, d_law) = self._along(table, self._directions(start, table))
            # The log scheme: ln S = mean + deviation Z, and Z does not depend on the contract.
            slope = d_law[:, 1] / law[:, 1]
            if self.engine.config.normalize_forwards:
                constant = d_law[:, 0] + law[:, 1] * d_law[:, 1]  # of ln F = mean + deviation^2 / 2
            else:
                constant = d_law[:, 0] + slope * (torch.log(columns(table).K) - law[:, 0])
            inputs = torch.stack([value, d_value], dim=1)
            terms = torch.cat([terms, d_terms[:, 1:], torch.stack([constant, slope], dim=1)], dim=1)
        weights = (unit_of_price(table) / columns(table).X0) ** _WEIGHT_EXPONENT
        return Contracts(table, *(values.to(dtype) for values in (inputs, terms, weights)))

    def _along(self, table: Tensor, direction: Tensor) -> Any:
        """Features, terms and law of the contracts, and their derivatives along a direction."""

        def described(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return features(table, self._domain), _terms(table), _law(table)

        return torch.func.jvp(described, (table,), (direction,))

    def _directions(self, start: int, table: Tensor) -> Tensor:
        """How each contract moves: normal in every parameter but K, whose part follows from that of X0."""
        index = np.arange(start, start + len(table), dtype=np.uint64)
        low, high = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
        words = (philox4x32(self._params.mc_seed, (low, high, part, _DIRECTIONS)) for part in range(3))
        normals = [z for word in words for z in box_muller(word, Precision.float64)]
        c = columns(table)
        # Of the size of what the price can tell apart, or of the domain's.
        ones = torch.ones_like(c.T)
        rates = {name: spread_of(self._domain[name]) * ones for name in ("r", "d")}
        sizes = c._replace(X0=c.X0 * c.v * torch.sqrt(c.T), K=0 * ones, T=c.T / 2, v=c.v / 2, **rates)
        return torch.stack(sizes, dim=1) * torch.from_numpy(np.stack(normals, axis=1)).to(table.device)


class ExamplesAhead:
    """On a CPU, the stream's next examples, simulated in blocks beside training by the threads of `executor`.

    Which examples come is a function of the two positions alone; how far ahead they are made shows nowhere.
    Without an executor they are made when they are asked for, in the same blocks.
    """

    _WAITING = 16

    def __init__(self, source: ExampleSource, drawn: int, simulated: int, executor: Executor | None) -> None:
        self._source, self._executor = source, executor
        self._drawn, self._simulated = drawn, simulated
        self._rows = source.engine.rows_at_once
        self._contracts: deque[Contracts] = deque()
        self._futures: deque[Future[Examples]] = deque()
        self._ready: Examples | None = None

    def take(self, count: int) -> Examples:
        """The next `count` examples."""
        while self._ready is None or len(self._ready.weights) < count:
            block = self._next_block()
            if self._ready is not None:
                block = Examples(*(torch.cat(pair) for pair in zip(self._ready, block, strict=True)))
            self._ready = block
        taken = Examples(*(values[:count] for values in self._ready))
        self._ready = Examples(*(values[count:] for values in self._ready))
        return taken

    def _next_block(self) -> Examples:
        if self._executor is None:
            return self._source.simulate(*self._next_contracts())
        while len(self._futures) < self._WAITING:
            self._futures.append(self._executor.submit(self._source.simulate, *self._next_contracts()))
        return self._futures.popleft().result()

    def _next_contracts(self) -> tuple[Contracts, Tensor]:
        if not self._contracts:
            many = self._source.contracts(self._drawn, _BLOCK - self._drawn % _BLOCK)
            self._drawn += len(many.table)
            pieces = zip(*(torch.split(values, self._rows) for values in many), strict=True)
            self._contracts.extend(Contracts(*piece) for piece in pieces)
        contracts, first = self._contracts.popleft(), torch.tensor(self._simulated)
        self._simulated += len(contracts.table)
        return contracts, first


def _terms(table: Tensor) -> Tensor:
    c = columns(table)
    discount = torch.exp(-c.r * c.T)
    return torch.stack([c.K, discount / unit_of_price(table), intrinsic(table)], dim=1)


def _law(table: Tensor) -> Tensor:
    """Mean and standard deviation of the logarithm of the price at expiry. Shapes: (n, 6) -> (n, 2)."""
    c = columns(table)
    return torch.stack([torch.log(c.X0) + (c.r - c.d - c.v.square() / 2) * c.T, c.v * torch.sqrt(c.T)], dim=1)
