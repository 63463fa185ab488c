"""Training examples: contracts of the Sobol stream, what the network sees of them, and their targets.

With differential labels an example is a value and a derivative: along one random direction for each contract, of
what the network sees and of every bin of the target, the latter as the mean over the paths of each slice of the
payoff's derivative along the path. Where a payoff may jump the price alone has a derivative, if it is an expected one.

Source: Huge and Savine, "Differential machine learning" (2020); pathwise derivatives, Glasserman, "Monte Carlo
Methods in Financial Engineering" (2003), section 7.2. A slice's bounds move with the contract, but so that it keeps
its probability, which is why the derivative of its mean is the mean of the derivative.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.learning.scale import View
from smc.models.numerical import Precision
from smc.problem.conditional import is_conditional
from smc.problem.contracts import BoundSpec
from smc.problem.problem import Problem
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholes, Simulation
from smc.simulation.levels import (
    payoff_spectrum,
    payoff_spectrum_and_slope,
    shortfall_spectrum,
    shortfall_spectrum_and_slope,
)
from smc.simulation.normals import box_muller, philox4x32

__all__ = ["Contracts", "ExampleSource", "Examples", "ExamplesAhead", "check_derivatives"]

# On a CPU rows are made in whole blocks of the stream: vectorised functions round the ends of an array
# differently, and a row must not depend on the range that it is asked for in.
_BLOCK = 1024
# Sets the random numbers of directions apart from those of paths, which have the same key.
_DIRECTIONS = 0x5EED0D1F
# How far a contract is moved along its direction, whose parts are of the size that a price can tell apart: the bias of
# a difference is that share of a second derivative, and what single precision loses is divided by it.
_STEP: Final = 2.0**-9


class Examples(NamedTuple):
    """Shapes: inputs (n, order, features); targets (n, order, bins, 2), real and imaginary parts of scaled
    spectra; weights (n,), in the loss. `order` is 1, or 2 with differential labels: values, then derivatives.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class Contracts(NamedTuple):
    """Contracts on a device, and what follows from them alone.

    Shapes: table (n, fields) float64; inputs (n, order, features); terms (n, k): what is taken off the price, its
    derivative, and what the labels need; weights (n,); moved (n, fields) float64, each contract a little along its
    direction, or (n, 0) without derivatives.
    """

    table: Tensor
    inputs: Tensor
    terms: Tensor
    weights: Tensor
    moved: Tensor

    def select(self, rows: Tensor) -> Contracts:
        """The rows with these numbers, copied."""
        return Contracts(*(values.index_select(0, rows) for values in self))


class ExampleSource:
    """Makes example i of the training stream, a function of seeds and i alone.

    Raises: ConfigError for differential labels where there are none: of a payoff that jumps, and of the Euler scheme of
    `BlackScholes`, whose prices at expiry do not say how they move with the contract.
    """

    def __init__(
        self, engine: BlackScholes | Simulation, domain: Mapping[str, BoundSpec], *, differential: bool = False
    ) -> None:
        self.engine, self.differential = engine, differential
        self.view = View(engine.problem, domain)
        self._params = engine.params
        fields = engine.problem.schema
        self._ends = torch.tensor([[field.least for field in fields], [field.most for field in fields]])
        self._sampler = SobolSampler(domain, seed=self._params.mc_seed, schema=engine.problem.schema)
        self._labels = _TerminalLabels(engine) if isinstance(engine, BlackScholes) else _PathLabels(engine)
        if differential:
            if isinstance(engine, BlackScholes) and not engine.config.simulate_log_return:
                raise ConfigError("differential labels need simulate_log_return=True")
            check_derivatives(engine.problem, conditional=isinstance(engine, Simulation) and engine.conditional)

    @property
    def bins_with_slopes(self) -> int | None:
        """Of how many bins there are derivatives: of all if None, of the price alone where a payoff may jump."""
        return None if self.engine.problem.product.lipschitz else 1

    def contracts(self, start: int, count: int) -> Contracts:
        """Contracts start ... start + count - 1 of the Sobol stream."""
        if self.engine.device.type == "cuda":
            return self._describe(start, count)
        first = start - start % _BLOCK
        blocks = [self._describe(at, _BLOCK) for at in range(first, start + count, _BLOCK)]
        return Contracts(*(torch.cat(parts)[start - first :][:count] for parts in zip(*blocks, strict=True)))

    def simulate(self, contracts: Contracts, first: Tensor) -> Examples:
        """Simulated examples, row 0 being stream `first`. Shapes: first () int64 on the engine's device."""
        anchors = contracts.terms[:, :2].T
        if not self.differential:
            spectra = [self._labels.spectrum(contracts, first)]
        else:
            spectra = list(self._labels.spectrum_and_slope(contracts, first))
        targets = torch.stack([torch.view_as_real(spectrum) for spectrum in spectra], dim=1)
        for order in range(len(spectra)):
            targets[:, order, 0, 0] -= anchors[order]
        return Examples(contracts.inputs, targets, contracts.weights)

    def check_payoffs(self, count: int) -> None:
        """Raises: ConfigError if a path of the first `count` contracts pays less than nothing, or no number."""
        if isinstance(self.engine, Simulation):
            first = torch.zeros((), dtype=torch.int64, device=self.engine.device)
            least = float(self.engine.simulate(self.contracts(0, count).table, first).min())
            if not least >= 0:
                raise ConfigError(
                    f"{self.engine.problem.name}: a path pays {least:g}: a payoff is a number, at least 0; what may be "
                    "owed is a product of its own"
                )

    def _describe(self, start: int, count: int) -> Contracts:
        points = torch.from_numpy(self._sampler.at(start, count))
        if self.engine.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
            points = points.pin_memory()
        table = points.to(self.engine.device, non_blocking=True)
        dtype, view = self._params.dtype.torch, self.view

        def described(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return view.features(table), view.anchor(table), self._labels.terms(view, table)

        if not self.differential:
            value, anchor, terms = described(table)
            inputs, terms = value[:, None], torch.cat([anchor[:, None], 0 * anchor[:, None], terms], dim=1)
            moved = table[:, :0]
        else:
            direction = self._directions(start, table)
            found, derivatives = torch.func.jvp(described, (table,), (direction,))  # type: ignore[misc]
            (value, anchor, terms), (d_value, d_anchor, d_terms) = found, derivatives
            inputs = torch.stack([value, d_value], dim=1)
            terms = torch.cat([torch.stack([anchor, d_anchor], dim=1), self._labels.moving(terms, d_terms)], dim=1)
            moved = table + _STEP * direction
        weights = view.weight(table)
        return Contracts(table, inputs.to(dtype), terms.to(dtype), weights.to(dtype), moved)

    def _directions(self, start: int, table: Tensor) -> Tensor:
        """How each contract moves: normal in every parameter, by as much as `View.moves` says."""
        index = np.arange(start, start + len(table), dtype=np.uint64)
        low, high = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
        parts = range(-(-table.shape[1] // 2))
        words = (philox4x32(self._params.mc_seed, (low, high, part, _DIRECTIONS)) for part in parts)
        normals = np.stack([z for word in words for z in box_muller(word, Precision.float64)], axis=1)
        direction = self.view.moves(table) * torch.from_numpy(normals[:, : table.shape[1]]).to(table.device)
        # What would leave what a contract can be, a correlation of 1 for one, is moved the other way.
        moved = table + _STEP * direction
        beyond = (moved < self._ends[0].to(table.device)) | (moved > self._ends[1].to(table.device))
        return torch.where(beyond, -direction, direction)


def check_derivatives(problem: Problem, *, conditional: bool) -> None:
    """Raises: ConfigError where derivatives cannot be labels.

    Of a payoff that may jump the price has a derivative, if it is `conditional`, an expected payoff of each path.
    """
    product = problem.product
    if not product.lipschitz and not (conditional and is_conditional(problem)):
        raise ConfigError(
            f"differential labels need a payoff that moves little when a price does, and that of {product.kind} may "
            "jump: train with differential=0"
        )


class _PathLabels:
    """Of any problem: payoffs of paths; derivatives by the same random numbers at a contract a little beside it."""

    def __init__(self, engine: Simulation) -> None:
        self._engine = engine

    def terms(self, view: View, table: Tensor) -> Tensor:
        """The scale of payoffs. Shapes: (n, fields) -> (n, 1)."""
        return 1 / view.unit(table)[:, None]

    def moving(self, terms: Tensor, d_terms: Tensor) -> Tensor:
        """The same, and its derivative. Shapes: (n, 1) each -> (n, 2)."""
        return torch.cat([terms, d_terms], dim=1)

    def spectrum(self, contracts: Contracts, first: Tensor) -> Tensor:
        scale, size = contracts.terms[:, 2].contiguous(), self._engine.params.network_size
        if not self._engine.conditional:
            return payoff_spectrum(self._engine.simulate(contracts.table, first), scale, size)
        (found,) = self._engine.simulate_priced([contracts.table], first)
        return _with_price(payoff_spectrum(found.payoffs, scale, size), found.prices * scale)

    def spectrum_and_slope(self, contracts: Contracts, first: Tensor) -> tuple[Tensor, Tensor]:
        tables = contracts.table, contracts.moved
        scale, d_scale, size = contracts.terms[:, 2], contracts.terms[:, 3], self._engine.params.network_size
        if not self._engine.conditional:
            payoffs, moved = self._engine.simulate_pairs(*tables, first)
            slopes = moved.sub_(payoffs).div_(_STEP)
            return payoff_spectrum_and_slope(payoffs, slopes, scale, d_scale, size)
        here, there = self._engine.simulate_priced(tables, first)
        moved_price = (there.prices - here.prices) / _STEP * scale + here.prices * d_scale
        if not self._engine.problem.product.lipschitz:  # what is derived of other bins is not looked at
            spectrum = _with_price(payoff_spectrum(here.payoffs, scale.contiguous(), size), here.prices * scale)
            return spectrum, _with_price(torch.zeros_like(spectrum), moved_price)
        slopes = there.payoffs.sub_(here.payoffs).div_(_STEP)
        spectrum, slope = payoff_spectrum_and_slope(here.payoffs, slopes, scale, d_scale, size)
        return _with_price(spectrum, here.prices * scale), _with_price(slope, moved_price)


def _with_price(spectrum: Tensor, price: Tensor) -> Tensor:
    """The spectrum with another price in bin 0, or with the derivative of one. Shapes: (n, bins), (n,) -> (n, bins)."""
    spectrum[:, 0] = price
    return spectrum


class _TerminalLabels:
    """Of what log-normal prices fall short of: prices at expiry, and derivatives along them in closed form."""

    def __init__(self, engine: BlackScholes) -> None:
        self._engine = engine

    def terms(self, view: View, table: Tensor) -> Tensor:
        """Ceiling, scale of the payoff, and mean and deviation of the logarithm of the price at expiry.

        Shapes: (n, fields) -> (n, 4).
        """
        law = view.problem.law(table)
        scale = law.discount / view.unit(table)
        return torch.stack([self._engine.ceiling(law), scale, law.log_median, law.deviation], dim=1)

    def moving(self, terms: Tensor, d_terms: Tensor) -> Tensor:
        """Ceiling C, scale and its derivative, and how a price at expiry moves: a and b of d ln S = a + b ln(S / C).

        Where forwards are normalised, a is the derivative of ln F. Shapes: (n, 4) each -> (n, 5).
        """
        ceiling, scale, mean, deviation = terms.T
        _, d_scale, d_mean, d_deviation = d_terms.T
        # The log scheme: ln S = mean + deviation Z, and Z does not depend on the contract.
        slope = d_deviation / deviation
        if self._engine.config.normalize_forwards:
            constant = d_mean + deviation * d_deviation  # of ln F = mean + deviation^2 / 2
        else:
            constant = d_mean + slope * (torch.log(ceiling) - mean)
        return torch.stack([ceiling, scale, d_scale, constant, slope], dim=1)

    def spectrum(self, contracts: Contracts, first: Tensor) -> Tensor:
        _, _, ceiling, scale, *_ = contracts.terms.T.contiguous()
        return shortfall_spectrum(
            self._engine.simulate(contracts.table, first), ceiling, scale, self._engine.params.network_size
        )

    def spectrum_and_slope(self, contracts: Contracts, first: Tensor) -> tuple[Tensor, Tensor]:
        _, _, ceiling, scale, d_scale, constant, slope = contracts.terms.T.contiguous()
        return shortfall_spectrum_and_slope(
            self._engine.simulate(contracts.table, first), ceiling, scale, d_scale, (constant, slope),
            self._engine.params.network_size, normalized=self._engine.config.normalize_forwards,
        )  # fmt: skip


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
