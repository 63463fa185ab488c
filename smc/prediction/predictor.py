"""What a trained network says of a contract: price, distribution, Greeks, within what must hold.

Prices and distributions: contracts on the host give NumPy arrays; a tensor gives tensors on its own device, and on
a GPU a million of them never leave it. There the work of a chunk is one CUDA graph. Greeks are NumPy's.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from smc.errors import ConfigError
from smc.learning.error_bars import ErrorBars
from smc.learning.modules import evaluating
from smc.learning.scale import Scaling, View
from smc.prediction.distribution import PayoffDistribution
from smc.problem.contracts import BoundSpec, ContractsLike, contract_array, outside_domain, unit_of
from smc.problem.oracles.black_scholes import Greeks, OptionKind, OptionKinds
from smc.problem.problem import EUROPEAN_PUT, Problem
from smc.simulation.cuda import NotCapturable, capture
from smc.simulation.levels import levels_from_spectrum, valid_levels

__all__ = ["LEARNT", "Kind", "Kinds", "Outside", "Predictor"]

logger = logging.getLogger("smc.prediction")

Outside = Literal["refuse", "warn"]
Kind = OptionKind | Literal["learnt"]
Kinds = OptionKinds | Literal["learnt"]
"""Which option is asked about, one word for all contracts of a call, or one for each."""
LEARNT: Final = "learnt"
Array = npt.NDArray[np.float64]

_CHUNK = 65536
# Rows of the graphs that are captured when first needed: a few contracts do not pay for a whole chunk.
_GRAPH_ROWS = (256, 4096, _CHUNK)
# By how much a field is moved for the derivative of a payoff that is certain, relative to its size.
_DIFFERENCE = 1e-6


@dataclass(frozen=True)
class _Asked:
    """Contracts on the device of the model, `home` being where the answer belongs (None: to NumPy).

    What is certain needs no network: `learnt` has another contract in these rows, and `payoffs` what they pay.
    """

    table: Tensor
    home: torch.device | None
    learnt: Tensor
    certain: Tensor
    payoffs: Tensor

    def settle(self, values: Tensor) -> Tensor:
        """Fill in what is certain. Shapes: (n,) or (n, N)."""
        if len(self.certain):
            values[self.certain] = self.payoffs if values.ndim == 1 else self.payoffs[:, None]
        return values

    def returned(self, values: Tensor) -> Array | Tensor:
        return values.cpu().numpy() if self.home is None else values.to(self.home)


class Predictor:
    """A network with the scaling and domain that give its output a meaning. Any thread may ask it.

    `kind` is "put" or "call", one for all contracts or one for each: of the two one may be what was learnt, and the
    other may follow from it. The default, "learnt", is what was learnt.
    """

    def __init__(
        self,
        model: nn.Module,
        scaling: Scaling,
        domain: Mapping[str, BoundSpec],
        network_size: int,
        problem: Problem = EUROPEAN_PUT,
        error_bars: ErrorBars | None = None,
    ) -> None:
        self._model, self._scaling, self.domain, self._size = model, scaling, domain, network_size
        self.problem, self.error_bars = problem, error_bars
        self._view = View(problem, domain)
        self._device = scaling.spread.device
        self._graphs: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
        self._one_at_a_time = threading.RLock()  # of the threads that share a graph's memory
        self._capturable = self._device.type == "cuda"

    @property
    def price_kinds(self) -> tuple[Kind, ...]:
        """What there are prices of: what was learnt, first, and the other option where its price follows."""
        option = self.problem.product.option
        if option is None:
            return (LEARNT,)
        if self.problem.product.parity(self.problem.law(self._view.middle())) is None:
            return (option,)
        return (option, "call" if option == "put" else "put")

    @property
    def distribution_kinds(self) -> tuple[Kind, ...]:
        """What there are distributions of, as `price_kinds`."""
        reflects = self.problem.product.reflection is not None and self.problem.process.log_normal
        return self.price_kinds if reflects else self.price_kinds[:1]

    def predict_price(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Array | Tensor:
        """Prices within the no-arbitrage bounds. Shapes: -> (n,) float64."""
        if not isinstance(kind, str):
            return self._each(self.predict_price, contracts, kind, outside)
        other = self._is_other(kind)
        asked = self._asked(contracts, outside)
        value = asked.settle(self._in_chunks("price", self._price, asked.learnt))
        if other:
            value = (value + self._parity(asked.table)).clamp_(min=0)
        return asked.returned(value)

    def predict_error_bar(
        self, contracts: ContractsLike | Tensor, *, outside: Outside = "refuse"
    ) -> Array | Tensor:  # fmt: skip
        """Half-widths of intervals around prices. Shapes: -> (n,)."""
        bars = self.error_bars
        if bars is None or not bars.known:
            why = "its training has not ended" if bars is not None else "it was trained with held_back=0"
            raise ConfigError(f"this pricer has no error bars: {why}")
        asked = self._asked(contracts, outside)
        with torch.no_grad():
            inputs = self._view.features(asked.learnt).to(self._scaling.spread.dtype)
            widths = bars.half_width(inputs) * self._view.unit(asked.learnt)
        widths[asked.certain] = 0.0
        return asked.returned(widths)

    def predict_distribution(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> PayoffDistribution:
        """Valid distributions whose means are the prices. Shapes: -> levels (n, N)."""
        if not isinstance(kind, str):

            def levels_of(rows: Any, one: OptionKind, *, outside: Outside) -> Array | Tensor:
                return self.predict_distribution(rows, one, outside=outside).levels

            return PayoffDistribution(self._each(levels_of, contracts, kind, outside))
        other = self._is_other(kind)
        if other and kind not in self.distribution_kinds:
            raise ConfigError(
                f"the distribution of a {kind} does not follow from {self.problem.name}, which was learnt, though its "
                "price does: train a product of its own"
            )
        asked = self._asked(contracts, outside)
        if not other:
            levels = asked.settle(self._in_chunks("levels", self._levels, asked.learnt))
        else:
            levels = self._in_chunks("other levels", self._other_levels, asked.learnt)
            if len(asked.certain):
                parity = self._parity(asked.table)[asked.certain]
                levels[asked.certain] = (asked.payoffs + parity).clamp(min=0)[:, None]
        return PayoffDistribution(asked.returned(levels))

    def predict_greeks(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Greeks:
        """First derivatives, and gamma, by two passes of automatic differentiation. Shapes: -> five of (n,).

        Vega is the derivative by the field that the process calls its volatility; of Heston's model, by the variance
        today. Raises: ConfigError for a problem without such a field, or without `r`: `predict_sensitivities` has those
        that it has.
        """
        if not isinstance(kind, str):

            def stacked(rows: Any, one: OptionKind, *, outside: Outside) -> Array:
                return np.stack(self.predict_greeks(rows, one, outside=outside), axis=1)

            return Greeks(*np.asarray(self._each(stacked, contracts, kind, outside)).T.copy())
        volatility = self.problem.process.volatility or "v"
        if missing := [name for name in ("r", volatility) if name not in self.problem.schema.names]:
            raise ConfigError(
                f"{self.problem.name} has no field {missing[0]!r}, and so no such Greek: predict_sensitivities has the "
                f"derivatives by {', '.join(self.problem.schema.names)}"
            )
        first, delta, gamma = self._derivatives(contracts, kind, outside)
        return Greeks(delta, gamma, getattr(first, volatility), -first.T, first.r)

    def predict_sensitivities(
        self, contracts: ContractsLike | Tensor, kind: Kind = LEARNT, *, outside: Outside = "refuse"
    ) -> Any:
        """Derivatives of the price by every field of a contract, a named tuple. Shapes: -> (n,) each."""
        return self._derivatives(contracts, kind, outside)[0]

    def _derivatives(self, contracts: ContractsLike | Tensor, kind: Kind, outside: Outside) -> tuple[Any, Array, Array]:
        """First derivatives by name; delta and gamma, for which ratios to the spot move against it.

        Shapes: -> (n,) each.
        """
        other = self._is_other(kind)
        with torch.inference_mode(False), torch.enable_grad():
            asked = self._asked(contracts, outside)
            first = np.empty((len(asked.table), len(self.problem.schema)))
            delta, gamma = np.empty(len(first)), np.zeros(len(first))
            for start in range(0, len(asked.table), _CHUNK):
                part = asked.learnt[start : start + _CHUNK].clone().requires_grad_()
                value, _ = self._spectrum(part)
                (once,) = torch.autograd.grad(value[:, 0].sum(), part, create_graph=True)
                by_spot = self._by_spot(part, once)
                (twice,) = torch.autograd.grad(by_spot.sum(), part)
                chunk = slice(start, start + _CHUNK)
                first[chunk], delta[chunk] = once.detach().cpu().numpy(), by_spot.detach().cpu().numpy()
                gamma[chunk] = self._by_spot(part, twice).detach().cpu().numpy()
            if len(asked.certain):
                rows = asked.certain.cpu().numpy()
                certain = asked.table[asked.certain].cpu()
                first[rows] = self._certain_derivatives(certain)
                delta[rows] = self._by_spot(certain, torch.from_numpy(first[rows])).numpy()
                gamma[rows] = 0.0  # a payoff that is certain is straight almost everywhere
            if other:
                table = asked.table.clone().requires_grad_()
                (more,) = torch.autograd.grad(self._parity(table).sum(), table)
                first += more.cpu().numpy()
                delta += self._by_spot(table, more).detach().cpu().numpy()
        return self.problem.schema.row(*np.ascontiguousarray(first.T)), delta, gamma

    def _by_spot(self, table: Tensor, derivatives: Tensor) -> Tensor:
        """By the first spot, barriers staying where they are. Shapes: (n, fields), derivatives by each -> (n,)."""
        schema = self.problem.schema
        c, by = schema.row(*table.unbind(dim=1)), schema.row(*derivatives.unbind(dim=1))
        spot = self.problem.process.fields[0].name
        moved: Tensor = getattr(by, spot)
        for ratio in self.problem.product.ratios:
            moved = moved - getattr(by, ratio) * getattr(c, ratio) / getattr(c, spot)
        return moved

    def _certain_derivatives(self, table: Tensor) -> Array:
        """Of the certain payoff by each field, by differences. Shapes: (n, fields) -> the same."""
        derivatives = []
        for column, field in enumerate(self.problem.schema):
            step = _DIFFERENCE * table[:, column].abs().clamp(min=1.0)
            up, down = table.clone(), table.clone()
            up[:, column] += step
            down[:, column] = torch.maximum(down[:, column] - step, torch.full_like(step, field.least))
            width = (up[:, column] - down[:, column]).numpy()
            derivatives.append((self.problem.certain_payoffs(up) - self.problem.certain_payoffs(down)) / width)
        return np.stack(derivatives, axis=1)

    def _each(
        self,
        ask: Callable[..., Array | Tensor],
        contracts: ContractsLike | Tensor,
        kinds: OptionKinds,
        outside: Outside,
    ) -> Array | Tensor:
        """Answers for contracts of both kinds, `kinds` being one for each. Raises: ConfigError."""
        asked = self._asked(contracts, outside)
        rows = contracts if isinstance(contracts, Tensor) else asked.table.cpu().numpy()
        named = np.asarray(kinds, dtype=object)
        if named.shape != (len(asked.table),):
            raise ConfigError(
                f"kind must be one word, or one for each of {len(asked.table)} contracts; got {named.shape}"
            )
        for row, kind in enumerate(named.tolist()):
            if kind not in ("put", "call"):
                raise ConfigError(f"kind[{row}] must be 'put' or 'call', got {kind!r}")
        places = [np.flatnonzero(named == kind) for kind in ("put", "call")]
        order = np.argsort(np.concatenate(places))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is outside the domain has been said
            parts = [
                ask(rows[place], kind, outside=outside) for place, kind in zip(places, ("put", "call"), strict=True)
            ]
        if asked.home is not None:
            return torch.cat([torch.as_tensor(part) for part in parts])[torch.from_numpy(order)]
        return np.concatenate([np.asarray(part) for part in parts])[order]

    # --- from contracts to values, on the device ------------------------------------------------------

    def _spectrum(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum of the discounted payoff. Shapes: (n, fields) float64 -> two of (n, bins) float64."""
        inputs = self._view.features(table).to(self._scaling.spread.dtype)
        with evaluating(self._model):
            real, imag = self._scaling.restore(*self._model(inputs, torch.zeros_like(inputs)))
        unit = self._view.unit(table)[:, None]
        real, imag = real.double() * unit, imag.double() * unit
        price = real[:, :1] + self._view.anchor(table)[:, None] * unit
        return torch.cat([price, real[:, 1:]], dim=1), imag

    def _price(self, table: Tensor) -> Tensor:
        bounds = self._view.bounds(table)
        return torch.clamp(self._spectrum(table)[0][:, 0], bounds.lower, bounds.upper)

    def _levels(self, table: Tensor) -> Tensor:
        bounds = self._view.bounds(table)
        real, imag = self._spectrum(table)
        levels = levels_from_spectrum(torch.complex(real, imag), self._size)
        return valid_levels(levels, torch.clamp(real[:, 0], bounds.lower, bounds.upper), bounds.payoff)

    def _other_levels(self, table: Tensor) -> Tensor:
        """By reflection of what was learnt, shifted onto the price that parity gives."""
        law, reflection = self.problem.law(table), self.problem.product.reflection
        assert reflection is not None
        learnt = self._levels(torch.stack(list(reflection.contracts(law)), dim=1))
        levels, variances = reflection.levels(law, learnt)
        price = (self._price(table) + self._parity(table)).clamp(min=0)
        return valid_levels(levels, price, torch.full_like(price, torch.inf), variances)

    def _parity(self, table: Tensor) -> Tensor:
        parity = self.problem.product.parity(self.problem.law(table))
        assert parity is not None
        return parity

    def _in_chunks(self, name: str, function: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
        n = len(table)
        with torch.no_grad():
            if n == 0:  # no FFT of nothing: the answer for some contract says what it looks like
                return function(self._view.middle().to(self._device))[:0]
            rows = next((r for r in _GRAPH_ROWS if r >= n), _CHUNK)
            with self._one_at_a_time:
                work = self._graph(name, function, rows) if self._capturable else function
            pieces = [work(table[start : start + rows]) for start in range(0, n, rows)]
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _graph(self, name: str, function: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
        """`function` on up to `rows` contracts as one CUDA graph, captured once; as it is, if it cannot be."""
        if (name, rows) not in self._graphs:
            given = self._view.middle(rows).to(self._device)
            results: list[Tensor] = []

            def work() -> None:
                results[:] = [function(given)]

            try:
                replay = capture(work, self._device)
            except NotCapturable as error:
                logger.warning("Prediction runs eagerly: %s", error)
                self._capturable = False
                return function

            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            one_at_a_time = self._one_at_a_time  # not self: a predictor and its graphs go when nobody holds it

            def replayed(part: Tensor) -> Tensor:
                with one_at_a_time:
                    done.wait()  # for a call on another stream, which uses the same memory
                    given[: len(part)] = part
                    replay()
                    answer = results[0][: len(part)].clone()
                    done.record()
                return answer

            self._graphs[name, rows] = replayed
        return self._graphs[name, rows]

    # --- what was asked -------------------------------------------------------------------------------

    def _is_other(self, kind: Kind) -> bool:
        """Whether it is not what was learnt but follows from it. Raises: ConfigError."""
        if kind in (LEARNT, self.problem.product.option):
            return False
        if kind not in ("put", "call"):
            raise ConfigError(f"kind must be 'put' or 'call', got {kind!r}")
        if kind not in self.price_kinds:
            raise ConfigError(
                f"kind={kind!r} does not follow from {self.problem.name}, which was learnt: leave kind out to ask for "
                "that, or train a product of its own"
            )
        return True

    def _asked(self, contracts: ContractsLike | Tensor, outside: Outside) -> _Asked:
        """The contracts on this device, checked."""
        if outside not in ("refuse", "warn"):
            raise ConfigError(f"outside must be 'refuse' or 'warn', got {outside!r}")
        home = contracts.device if isinstance(contracts, Tensor) else None
        none = torch.empty(0, dtype=torch.int64, device=self._device)
        if isinstance(contracts, Tensor) and (contracts.is_floating_point() or len(contracts) == 0):
            table = contracts.detach().to(self._device, torch.float64)
            if self._is_within(table):  # and what is within is random
                return _Asked(table, home, table, none, none.double())
        array = contract_array(contracts, self.problem.schema)
        host = torch.from_numpy(array)
        certain = torch.nonzero(~self.problem.is_random(host))[:, 0]
        learnt = host
        if len(certain):
            learnt = host.clone()
            learnt[certain] = self._view.middle()
        self._check_inside(learnt.numpy(), outside)
        payoffs = torch.from_numpy(self.problem.certain_payoffs(host[certain]))
        table, learnt, certain, payoffs = (x.to(self._device) for x in (host, learnt, certain, payoffs))
        return _Asked(table, home, learnt, certain, payoffs)

    def _is_within(self, table: Tensor) -> bool:
        """Whether the device sees nothing to complain of: one number read back, however many contracts."""
        names = self.problem.schema.names
        if table.ndim != 2 or table.shape[1] != len(names) or len(table) == 0:
            return False
        bounds = [self.domain[name] for name in names]
        limits = torch.tensor([[b.lower, b.upper] for b in bounds], dtype=torch.float64).to(self._device)
        low, high = torch.aminmax(table, dim=0)  # NaN in, NaN out
        return bool(((low >= limits[:, 0]) & (high <= limits[:, 1])).all())

    def _check_inside(self, array: Array, outside: Outside) -> None:
        schema = self.problem.schema
        for name, row in outside_domain(array, self.domain, schema).items():
            bound = self.domain[name]
            text = (
                f"contracts[{row}].{name} = {array[row, schema.column(name)]:g} is outside the trained domain "
                f"[{bound.lower:g}, {bound.upper:g}]{unit_of(name, schema)}"
            )
            if outside == "refuse":
                raise ConfigError(text + "; pass outside='warn' to extrapolate")
            warnings.warn(text + ": extrapolated", stacklevel=5)
