"""What a trained network says of a contract: price, distribution, Greeks, within what must hold.

Prices and distributions: contracts on the host give NumPy arrays; a tensor gives tensors on its own device, and on
a GPU a million of them never leave it. There the work of a chunk is one CUDA graph. Greeks are NumPy's.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from smc.errors import ConfigError
from smc.learning.modules import evaluating
from smc.learning.scale import Scaling, features, intrinsic, unit_of_price
from smc.problem.contracts import (
    FIELDS,
    BoundSpec,
    ContractsLike,
    columns,
    contract_array,
    is_random,
    outside_domain,
    unit_of,
)
from smc.problem.oracles import black_scholes
from smc.problem.oracles.black_scholes import Greeks, OptionKind, OptionKinds
from smc.simulation.cuda import NotCapturable, capture
from smc.simulation.levels import PayoffDistribution, levels_from_spectrum, reflected_levels, valid_levels

__all__ = ["Outside", "Predictor"]

logger = logging.getLogger("smc.prediction")

Outside = Literal["refuse", "warn"]
Array = npt.NDArray[np.float64]

_CHUNK = 65536
# Of a call's level, in units of the discounted strike: below, it may well be none.
_LEAST_PAYOFF = 1e-4
# Rows of the graphs that are captured when first needed: a few contracts do not pay for a whole chunk.
_GRAPH_ROWS = (256, 4096, _CHUNK)


class Predictor:
    """A network with the scaling and domain that give its output a meaning. Any thread may ask it."""

    def __init__(self, model: nn.Module, scaling: Scaling, domain: Mapping[str, BoundSpec], network_size: int) -> None:
        self._model, self._scaling, self.domain, self._size = model, scaling, domain, network_size
        self._device = scaling.spread.device
        self._graphs: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
        self._one_at_a_time = threading.RLock()  # of the threads that share a graph's memory
        self._capturable = self._device.type == "cuda"

    def predict_price(
        self,
        contracts: ContractsLike | Tensor,
        kind: OptionKinds = "put",
        *,
        outside: Outside = "refuse",
    ) -> Array | Tensor:
        """Prices within the no-arbitrage bounds. Shapes: -> (n,) float64."""
        if not isinstance(kind, str):
            return self._each(self.predict_price, contracts, kind, outside)
        _check_kind(kind)
        table, home = self._table(contracts, outside)
        put = self._in_chunks("price", self._put, table)
        value = put if kind == "put" else (put + _forward_value(table)).clamp_(min=0)
        return _returned(value, home)

    def predict_distribution(
        self,
        contracts: ContractsLike | Tensor,
        kind: OptionKinds = "put",
        *,
        outside: Outside = "refuse",
    ) -> PayoffDistribution:
        """Valid distributions whose means are the prices. Shapes: -> levels (n, N)."""
        if not isinstance(kind, str):

            def levels_of(rows: Any, one: OptionKind, *, outside: Outside) -> Array | Tensor:
                return self.predict_distribution(rows, one, outside=outside).levels

            return PayoffDistribution(self._each(levels_of, contracts, kind, outside))
        _check_kind(kind)
        table, home = self._table(contracts, outside)
        levels = self._put_levels if kind == "put" else self._call_levels
        return PayoffDistribution(_returned(self._in_chunks(f"{kind} levels", levels, table), home))

    def predict_greeks(
        self,
        contracts: ContractsLike | Tensor,
        kind: OptionKinds = "put",
        *,
        outside: Outside = "refuse",
    ) -> Greeks:
        """First derivatives, and gamma, by two passes of automatic differentiation. Shapes: -> five of (n,)."""
        if not isinstance(kind, str):

            def stacked(rows: Any, one: OptionKind, *, outside: Outside) -> Array:
                return np.stack(self.predict_greeks(rows, one, outside=outside), axis=1)

            return Greeks(*np.asarray(self._each(stacked, contracts, kind, outside)).T.copy())
        _check_kind(kind)
        with torch.inference_mode(False), torch.enable_grad():
            return self._greeks(contracts, kind, outside)

    def _greeks(self, contracts: ContractsLike | Tensor, kind: OptionKind, outside: Outside) -> Greeks:
        table, _ = self._table(contracts, outside)
        array = table.cpu().numpy()
        learnt = np.flatnonzero(is_random(array))
        out = Greeks(*(np.array(values) for values in black_scholes.greeks(array, "put")))
        for rows in (learnt[i : i + _CHUNK] for i in range(0, len(learnt), _CHUNK)):
            part = torch.from_numpy(array[rows]).to(self._device).requires_grad_()
            value, _ = self._spectrum(part)
            (first,) = torch.autograd.grad(value[:, 0].sum(), part, create_graph=True)
            (second,) = torch.autograd.grad(columns(first).X0.sum(), part)
            by, twice = columns(first.detach().cpu().numpy()), columns(second.cpu().numpy())
            for target, values in zip(out, (by.X0, twice.X0, by.v, -by.T, by.r), strict=True):
                target[rows] = values
        if kind == "put":
            return out
        c = columns(array)
        df, q = np.exp(-c.r * c.T), np.exp(-c.d * c.T)
        # Call = put + X0 q - K df, differentiated.
        theta = out.theta + c.d * c.X0 * q - c.r * c.K * df
        return Greeks(out.delta + q, out.gamma, out.vega, theta, out.rho + c.T * c.K * df)

    def _each(
        self,
        ask: Callable[..., Array | Tensor],
        contracts: ContractsLike | Tensor,
        kinds: OptionKinds,
        outside: Outside,
    ) -> Array | Tensor:
        """Answers for contracts of both kinds, `kinds` being one for each. Raises: ConfigError."""
        table, home = self._table(contracts, outside)
        rows = contracts if isinstance(contracts, Tensor) else table.cpu().numpy()
        named = np.asarray(kinds, dtype=object)
        if named.shape != (len(table),):
            raise ConfigError(f"kind must be one word, or one for each of {len(table)} contracts; got {named.shape}")
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
        if home is not None:
            return torch.cat([torch.as_tensor(part) for part in parts])[torch.from_numpy(order)]
        return np.concatenate([np.asarray(part) for part in parts])[order]

    # --- from contracts to values, on the device ------------------------------------------------------

    def _spectrum(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum of the discounted put payoff. Shapes: (n, 6) float64 -> two of (n, bins) float64."""
        inputs = features(table, self.domain).to(self._scaling.spread.dtype)
        with evaluating(self._model):
            real, imag = self._scaling.restore(*self._model(inputs, torch.zeros_like(inputs)))
        unit = unit_of_price(table)[:, None]
        real, imag = real.double() * unit, imag.double() * unit
        price = real[:, :1] + intrinsic(table)[:, None] * unit
        return torch.cat([price, real[:, 1:]], dim=1), imag

    def _put(self, table: Tensor) -> Tensor:
        learnt, certain = _known(table)
        lower, upper = _put_bounds(table)
        price = self._spectrum(learnt)[0][:, 0]
        return torch.where(is_random(table), torch.clamp(price, lower, upper), certain)

    def _put_levels(self, table: Tensor) -> Tensor:
        learnt, certain = _known(table)
        lower, upper = _put_bounds(table)
        real, imag = self._spectrum(learnt)
        levels = levels_from_spectrum(torch.complex(real, imag), self._size)
        valid = valid_levels(levels, torch.clamp(real[:, 0], lower, upper), upper)
        return torch.where(is_random(table)[:, None], valid, certain[:, None])

    def _call_levels(self, table: Tensor) -> Tensor:
        """By reflection of a put's, shifted onto the price that parity gives."""
        learnt, _ = _known(table)
        c = columns(learnt)
        discount = torch.exp(-c.r * c.T)
        reflected = (c.X0 * torch.exp((c.r - c.d - c.v.square() / 2) * c.T)).square() / c.K
        put = self._put_levels(torch.stack(c._replace(K=reflected), dim=1))
        levels = reflected_levels(put, c.K, reflected, discount, c.v * torch.sqrt(c.T))
        price = (self._put(table) + _forward_value(table)).clamp(min=0)
        # An error of the put's level is carried over by the square of the price there; nothing is known to be 0
        # better than where neither pays. From there on without a jump, or rounding would show.
        pays = levels / (discount * c.K)[:, None]
        variances = (1 + pays) ** 4 * pays / (pays + _LEAST_PAYOFF) + 1e-6
        valid = valid_levels(levels, price, torch.full_like(price, torch.inf), variances)
        return torch.where(is_random(table)[:, None], valid, price[:, None])

    def _in_chunks(self, name: str, function: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
        n = len(table)
        with torch.no_grad():
            if n == 0:  # no FFT of nothing: the answer for some contract says what it looks like
                return function(self._middle(1))[:0]
            rows = next((r for r in _GRAPH_ROWS if r >= n), _CHUNK)
            with self._one_at_a_time:
                work = self._graph(name, function, rows) if self._capturable else function
            pieces = [work(table[start : start + rows]) for start in range(0, n, rows)]
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _graph(self, name: str, function: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
        """`function` on up to `rows` contracts as one CUDA graph, captured once; as it is, if it cannot be."""
        if (name, rows) not in self._graphs:
            given = self._middle(rows)
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

    def _middle(self, rows: int) -> Tensor:
        """The contract in the middle of the domain, so many times."""
        middle = [(b.lower + b.upper) / 2 for b in (self.domain[field] for field in FIELDS)]
        return torch.tensor(middle, dtype=torch.float64, device=self._device).expand(rows, -1).contiguous()

    # --- what was asked -------------------------------------------------------------------------------

    def _table(self, contracts: ContractsLike | Tensor, outside: Outside) -> tuple[Tensor, torch.device | None]:
        """The contracts on this device, checked, and where the answer belongs (None: to NumPy)."""
        if outside not in ("refuse", "warn"):
            raise ConfigError(f"outside must be 'refuse' or 'warn', got {outside!r}")
        if isinstance(contracts, Tensor) and (contracts.is_floating_point() or len(contracts) == 0):
            table = contracts.detach().to(self._device, torch.float64)
            if not self._is_within(table):
                table = torch.from_numpy(self._checked(contract_array(contracts), outside)).to(self._device)
            return table, contracts.device
        array = self._checked(contract_array(contracts), outside)
        home = contracts.device if isinstance(contracts, Tensor) else None
        return torch.from_numpy(array).to(self._device), home

    def _is_within(self, table: Tensor) -> bool:
        """Whether the device sees nothing to complain of: one number read back, however many contracts."""
        if table.ndim != 2 or table.shape[1] != len(FIELDS) or len(table) == 0:
            return False
        bounds = [self.domain[field] for field in FIELDS]
        limits = torch.tensor([[b.lower, b.upper] for b in bounds], dtype=torch.float64).to(self._device)
        low, high = torch.aminmax(table, dim=0)  # NaN in, NaN out
        return bool(((low >= limits[:, 0]) & (high <= limits[:, 1])).all())

    def _checked(self, array: Array, outside: Outside) -> Array:
        learnt = np.flatnonzero(is_random(array))
        inside = array if len(learnt) == len(array) else array[learnt]
        for name, row in outside_domain(inside, self.domain).items():
            at = int(learnt[row])
            bound = self.domain[name]
            value = array[at, FIELDS.index(name)]
            text = (
                f"contracts[{at}].{name} = {value:g} is outside the trained domain "
                f"[{bound.lower:g}, {bound.upper:g}]{unit_of(name)}"
            )
            if outside == "refuse":
                raise ConfigError(text + "; pass outside='warn' to extrapolate")
            warnings.warn(text + ": extrapolated", stacklevel=5)
        return array


def _check_kind(kind: OptionKind) -> None:
    if kind not in ("put", "call"):
        raise ConfigError(f"kind must be 'put' or 'call', got {kind!r}")


def _returned(values: Tensor, home: torch.device | None) -> Array | Tensor:
    return values.cpu().numpy() if home is None else values.to(home)


def _known(table: Tensor) -> tuple[Tensor, Tensor]:
    """Contracts fit for the network, and the put's value where T = 0 or v = 0 and nothing is random."""
    learnt = torch.where(is_random(table)[:, None], table, torch.ones_like(table))
    return learnt, (-_forward_value(table)).clamp(min=0) + 0.0  # not -0


def _put_bounds(table: Tensor) -> tuple[Tensor, Tensor]:
    c = columns(table)
    return (-_forward_value(table)).clamp(min=0), c.K * torch.exp(-c.r * c.T)


def _forward_value(table: Tensor) -> Tensor:
    c = columns(table)
    return c.X0 * torch.exp(-c.d * c.T) - c.K * torch.exp(-c.r * c.T)
