"""Learning when to exercise: what waiting is worth, regressed on paths of contracts from the whole domain.

Paths are followed under a policy, first under none that exercises early; what they then pay after each date is
regressed on what a policy sees on it, all contracts and dates together; the next policy exercises where that is less
than exercise pays. A few rounds of it settle. The policy is a function of the problem, the domain and a seed.

Sources: Longstaff and Schwartz, "Valuing American options by simulation" (2001); policy iteration, Howard, "Dynamic
programming and Markov processes" (1960).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smc.errors import ConfigError
from smc.problem.contracts import BoundSpec, resolve_domain
from smc.problem.exercise import Policy
from smc.problem.problem import Problem
from smc.problem.products.bermudan import BermudanOption
from smc.problem.products.price_on_date import PriceOnDate
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.config import SimulationParams
from smc.simulation.engine import Simulation

__all__ = ["prices_on_dates", "waiting", "with_policy"]

logger = logging.getLogger("smc.training")

# Contracts, paths of each, hidden units, rounds, and what a round's regression takes.
_CONTRACTS, _PATHS, _UNITS, _ROUNDS = 4096, 32, 32, 7
_STEPS, _BATCH, _RATE = 500, 8192, 0.01
# Of what contracts are standardised by, behind the point.
_DIGITS = 9
# Where exercise does not pay what waiting is worth matters less.
_OUT_OF_THE_MONEY = 0.1


def with_policy(
    problem: Problem, domain: Mapping[str, BoundSpec | Mapping[str, float]] | None = None, *, seed: int = 0
) -> Problem:
    """The problem with a policy of exercise for a domain, learned if it has none; any other problem as it is.

    Raises: ConfigError for bounds of a domain that do not hold.
    """
    product = problem.product
    if not isinstance(product, BermudanOption) or product.policy is not None:
        return problem
    bounds = resolve_domain(domain or {}, problem.schema)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = _learned(problem, product, bounds, seed)
    return Problem(problem.process, product.model_copy(update={"policy": policy}))


def prices_on_dates(
    problem: Problem,
    table: Tensor,
    paths: int,
    *,
    seed: int,
    steps: int,
    first: int = 0,
    sampling: Literal["pseudorandom", "sobol"] = "pseudorandom",
) -> Tensor:
    """Simulated prices of each asset on the product's dates. Shapes: (n, fields) -> (n, paths, dates, assets)."""
    process, dates = problem.process, problem.product.dates
    seen = Problem(process, PriceOnDate(dates=dates, n_assets=process.assets))
    params = SimulationParams(
        timesteps=steps, network_size=2, batches_per_mc_run=paths // 2, mc_seed=seed, skip=first,
        sampling=sampling,
    )  # fmt: skip
    simulation, found = Simulation(seen, params), torch.empty(len(table), paths, dates, process.assets)
    c = problem.schema.row(*table.unbind(dim=1))._asdict()
    for date in range(dates):
        for asset in range(process.assets):
            c["date"], c["asset"] = torch.full_like(table[:, 0], date + 1), torch.full_like(table[:, 0], asset)
            asked = torch.stack([c[name] for name in seen.schema.names], dim=1)
            found[:, :, date, asset] = simulation.payoffs(asked.numpy())
    return found


def waiting(problem: Problem, table: Tensor, prices: Tensor, dates: int) -> Tensor:
    """How much more the policy takes waiting to be worth than exercise, in currency, with so many dates to come.

    Shapes: table (n, fields), prices (n, ..., assets) -> (n, ...).
    """
    product = problem.product
    assert isinstance(product, BermudanOption)
    policy, seen = product.known, _seen(problem, product, product.known, table)
    shape = (len(table), *([1] * (prices.dim() - 2)))
    left = torch.full(prices.shape[:-1], float(dates))
    certain, ratios = _looked_at(product, seen, prices, left)
    u, p = policy.units, product.seen_count
    of_fields = seen.numbers @ torch.tensor(policy.of_fields).view(u, -1).T + torch.tensor(policy.biases)
    hidden = of_fields.view(*shape, u) + ratios @ torch.tensor(policy.of_ratios).view(u, p).T
    hidden = hidden + (left / product.dates)[..., None] * torch.tensor(policy.of_time)
    output = torch.tensor(policy.output)
    told = certain + nn.functional.softsign(hidden) @ output[:-1] + output[-1]
    return told * (seen.scale * seen.strike).view(shape)


class _Seen(NamedTuple):
    """What a policy reads of contracts. Shapes: numbers (n, f), else (n,); rate and growth of a date."""

    numbers: Tensor
    scale: Tensor
    strike: Tensor
    rate: Tensor
    growth: Tensor


def _seen(problem: Problem, product: BermudanOption, policy: Policy, table: Tensor) -> _Seen:
    names = problem.schema.names
    numbers = _numbers(policy, table, names)
    terms, law = _quadratic(numbers), problem.law(table)
    scale, growth = (terms @ torch.tensor(of, dtype=torch.float64) for of in (policy.scale, policy.growth))
    rate, date = -law.discount.log() / product.dates, law.c.T / product.dates
    found = numbers, scale.exp(), table[:, names.index("K")], rate, growth * date
    return _Seen(*(values.float() for values in found))


def _looked_at(product: BermudanOption, seen: _Seen, prices: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """What waiting is certain to be worth more, over K times the scale; and the ratios of prices, over the scale.

    Shapes: prices (n, ..., assets), left (n, ...) dates to come -> (n, ...), (n, ..., p).
    """
    shape = (-1, *([1] * (prices.dim() - 2)))
    scale, strike, rate, growth = (of.view(shape) for of in (seen.scale, seen.strike, seen.rate, seen.growth))
    certain = product.certain(prices, strike, rate, growth, left) / scale
    return certain, product.logs_seen(prices, strike.expand(prices.shape[:-1])) / scale[..., None]


class _Sample(NamedTuple):
    """Shapes, of n paths: numbers (n, f), ratios (n, dates, p), paid and certain (n, dates), hedge (n, dates - 1).

    `discounts` (n,) are those of a date, `left` (dates,) is the share of dates to come; what is paid is over K times
    the scale. `hedge` is what holding about a delta of the asset from date to date gains: its expected value is 0.
    """

    numbers: Tensor
    ratios: Tensor
    paid: Tensor
    certain: Tensor
    hedge: Tensor
    discounts: Tensor
    left: Tensor


class _Waiting(nn.Module):
    """What waiting is worth more than exercise. Shapes: (n, p), (n, 1), (n, fields) -> (n,)."""

    def __init__(self, ratios: int, fields: int) -> None:
        super().__init__()
        self.of_ratios = nn.Linear(ratios, _UNITS)
        self.of_time = nn.Linear(1, _UNITS, bias=False)
        self.of_fields = nn.Linear(fields, _UNITS, bias=False)
        self.output = nn.Linear(_UNITS, 1)

    def forward(self, ratios: Tensor, left: Tensor, numbers: Tensor) -> Tensor:
        hidden = self.of_ratios(ratios) + self.of_time(left) + self.of_fields(numbers)
        told: Tensor = self.output(nn.functional.softsign(hidden))[..., 0]
        return told


def _learned(problem: Problem, product: BermudanOption, domain: Mapping[str, BoundSpec], seed: int) -> Policy:
    table = torch.from_numpy(SobolSampler(domain, seed=seed, schema=problem.schema).sample(_CONTRACTS))
    policy = _blank(problem, domain, table)
    sample = _sample(problem, product, policy, table, domain, seed)
    network = _Waiting(product.seen_count, len(policy.fields))
    exercised = torch.zeros_like(sample.paid, dtype=torch.bool)
    exercised[:, -1] = True
    for round_ in range(_ROUNDS if product.dates > 1 else 0):
        value = _followed(sample, exercised)
        _regress(network, sample, value - sample.paid[:, :-1] - sample.certain[:, :-1], seed + round_)
        with torch.no_grad():
            waits = torch.stack(
                [network(sample.ratios[:, i], left.expand(len(sample.numbers), 1), sample.numbers)
                 for i, left in enumerate(sample.left[:-1])],
                dim=1,
            )  # fmt: skip
        exercised[:, :-1] = (sample.paid[:, :-1] > 0) & (sample.certain[:, :-1] + waits <= 0)
        logger.info("Exercise of %s, round %d: %.5f of the unit", problem.name, round_ + 1, float(
            (_followed(sample, exercised, whole=True) * sample.discounts).mean()))  # fmt: skip
    return policy.model_copy(update=_weights(network))


def _blank(problem: Problem, domain: Mapping[str, BoundSpec], table: Tensor) -> Policy:
    """A policy with its scales, and no network."""
    process, names = problem.process, problem.schema.names
    spots = {field.name for field in process.fields[: process.assets]}
    fields = [field for field in problem.schema if field.name not in spots and field.name not in problem.product.still]
    logarithms = tuple(field.least == 0 and domain[field.name].lower > 0 for field in fields)
    columns = [table[:, names.index(field.name)] for field in fields]
    taken = [c.log() if logarithm else c for c, logarithm in zip(columns, logarithms, strict=True)]
    policy = Policy.model_construct(  # what has no network yet
        fields=tuple(field.name for field in fields), logarithms=logarithms,
        centres=_rounded(float(c.mean()) for c in taken), spreads=_rounded(float(c.std()) for c in taken),
        scale=(), growth=(), of_ratios=(), of_time=(), of_fields=(), biases=(), output=(),
    )  # fmt: skip
    law, terms = problem.law(table), _quadratic(_numbers(policy, table, names))
    known = torch.stack([problem.product.width(law).log(), law.growth / law.c.T], dim=1)
    scale, growth = torch.linalg.lstsq(terms, known).solution.T.tolist()
    return policy.model_copy(update={"scale": _rounded(scale), "growth": _rounded(growth)})


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """To what is told apart of them: the last digits of a sum depend on where its terms lie in memory."""
    return tuple(round(float(value), _DIGITS) for value in values)


def _numbers(policy: Policy, table: Tensor, names: tuple[str, ...]) -> Tensor:
    """What the policy reads of contracts. Shapes: -> (n, fields)."""
    columns = [table[:, names.index(name)] for name in policy.fields]
    taken = [c.log() if logarithm else c for c, logarithm in zip(columns, policy.logarithms, strict=True)]
    return (torch.stack(taken, dim=1) - torch.tensor(policy.centres)) / torch.tensor(policy.spreads)


def _quadratic(numbers: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(numbers[:, :1]), numbers, numbers.square()], dim=1)


def _sample(
    problem: Problem, product: BermudanOption, policy: Policy, table: Tensor, domain: Mapping[str, BoundSpec], seed: int
) -> _Sample:
    dates = product.dates
    steps = dates if problem.process.exact else problem.default_steps(domain)
    prices = prices_on_dates(problem, table, _PATHS, seed=seed, steps=steps)
    seen = _seen(problem, product, policy, table)
    to_come = torch.arange(dates - 1, -1, -1.0)
    certain, ratios = _looked_at(product, seen, prices, to_come.expand(prices.shape[:-1]))
    strike, unit = seen.strike[:, None, None], (seen.scale * seen.strike)[:, None, None]
    paid = (product.sign * (product.underlyings(prices) - strike)).clamp(min=0) / unit
    numbers, discounts = (of.repeat_interleave(_PATHS, dim=0) for of in (seen.numbers, torch.exp(-seen.rate)))
    hedge = _hedge(problem, product, seen, table, prices) / unit
    ratios, paid, certain, hedge = (of.flatten(0, 1) for of in (ratios, paid, certain, hedge))
    return _Sample(numbers, ratios, paid, certain, hedge, discounts, to_come / dates)


def _hedge(problem: Problem, product: BermudanOption, seen: _Seen, table: Tensor, prices: Tensor) -> Tensor:
    """What a holding of the dearest asset gains from each date to the next, discounted to the first of the two.

    Shapes: prices (n, paths, dates, assets) -> (n, paths, dates - 1).
    """
    dates = product.dates
    expected = problem.law(table).paths(dates).float()
    grown = (expected[:, 1:] / expected[:, :-1])[:, None].expand(-1, prices.shape[1], -1, -1)
    before, dearest = prices[:, :, :-1], prices[:, :, :-1].argmax(dim=-1, keepdim=True)
    gains = (prices[:, :, 1:] - grown * before).gather(-1, dearest)[..., 0]
    shares = torch.arange(dates - 1, 0, -1.0) / dates
    away = torch.log(product.underlyings(before) / seen.strike[:, None, None]) / seen.scale[:, None, None]
    delta = product.sign * torch.special.ndtr(product.sign * away / shares.sqrt())
    return torch.exp(-seen.rate)[:, None, None] * delta * gains


def _followed(sample: _Sample, exercised: Tensor, *, whole: bool = False) -> Tensor:
    """What is paid after each date under the policy, less the hedge, discounted to it; or of the whole, to the first.

    Shapes: exercised (n, dates) -> (n, dates - 1), or (n,).
    """
    dates = sample.paid.shape[1]
    value, after = sample.paid[:, -1], []
    for date in range(dates - 2, -1, -1):
        after.append(value * sample.discounts - sample.hedge[:, date])
        value = torch.where(exercised[:, date], sample.paid[:, date], after[-1])
    if whole:
        return value
    return torch.stack(after[::-1], dim=1) if after else sample.paid[:, :0]


def _regress(network: _Waiting, sample: _Sample, target: Tensor, seed: int) -> None:
    """Least squares over paths and dates drawn at random, each with the same chance."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    paths, dates = target.shape
    for _ in range(_STEPS if dates else 0):
        rows = torch.randint(paths, (_BATCH,), generator=generator)
        columns = torch.randint(dates, (_BATCH,), generator=generator)
        told = network(sample.ratios[rows, columns], sample.left[columns][:, None], sample.numbers[rows])
        weight = torch.where(sample.paid[rows, columns] > 0, 1.0, _OUT_OF_THE_MONEY)
        loss = (weight * (told - target[rows, columns]).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in network.parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError("the policy of exercise has numbers that are not finite: is the domain too wide?")


def _weights(network: _Waiting) -> dict[str, tuple[float, ...]]:
    def flat(*tensors: Tensor) -> tuple[float, ...]:
        return tuple(np.concatenate([t.detach().double().numpy().ravel() for t in tensors]).tolist())

    return {
        "of_ratios": flat(network.of_ratios.weight), "biases": flat(network.of_ratios.bias),
        "of_time": flat(network.of_time.weight), "of_fields": flat(network.of_fields.weight),
        "output": flat(network.output.weight, network.output.bias),
    }  # fmt: skip
