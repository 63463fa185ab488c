"""Upper bounds of options that are exercised early: whoever knew the path in advance could not gain more.

For any martingale M that starts at 0 an option is worth at most E max_i (h_i - M_i), h_i being what exercise on date i
pays, discounted; the nearer M is to the option's own, the nearer the bound. M is made of the policy's idea of the
option's value: of each step what that value turns out to be, less the mean over inner paths of one date.

Sources: Rogers, "Monte Carlo valuation of American options" (Mathematical Finance, 2002); Andersen and Broadie,
"Primal-dual simulation algorithm for pricing multidimensional American options" (Management Science, 2004).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.learning.exercise import prices_on_dates, waiting
from smc.problem.contracts import ContractsLike, contract_array
from smc.problem.problem import Problem
from smc.problem.products.bermudan import BermudanOption
from smc.simulation.engine import Estimate

__all__ = ["has_upper_bound", "upper_bound"]


def has_upper_bound(problem: Problem) -> bool:
    """Whether an upper bound can be simulated: of what is exercised early, where prices alone say how they go on."""
    if not isinstance(problem.product, BermudanOption):
        return False
    law = problem.law(torch.tensor([[(field.lower + field.upper) / 2 for field in problem.schema]]))
    return problem.process.restarted(law.c, law.spots) is not None


def upper_bound(
    problem: Problem, contracts: ContractsLike, *, paths: int = 512, inner: int = 256, seed: int = 0
) -> Estimate:
    """Upper bounds and their standard errors, by `paths` paths and as many `inner` ones from each date of each.

    Shapes: n contracts -> (n,). Raises: ConfigError where there is none.
    """
    product = problem.product
    if not isinstance(product, BermudanOption) or not has_upper_bound(problem):
        raise ConfigError(
            f"there is no upper bound of {problem.name}: it takes an option with dates of exercise, and a process "
            "whose prices alone say how they go on"
        )
    if paths % 2 or inner % 2 or min(paths, inner) < 2:
        raise ConfigError(f"paths and inner must be even numbers, 2 at least, got {paths} and {inner}")
    table = torch.from_numpy(contract_array(contracts, problem.schema))
    found = np.array([_of_one(problem, product, row, paths, inner, seed + 2 * i) for i, row in enumerate(table)])
    return Estimate(found[:, 0], found[:, 1], paths)


def _of_one(
    problem: Problem, product: BermudanOption, row: Tensor, paths: int, inner: int, seed: int
) -> tuple[float, float]:  # fmt: skip
    names, dates = problem.schema.names, product.dates
    steps = _steps_of_date(problem, row)
    outer = prices_on_dates(problem, row[None], paths, seed=seed, steps=dates * steps)[0]
    table = row.expand(paths, -1).contiguous()
    c, strike = problem.schema.row(*table.unbind(dim=1)), float(row[names.index("K")])
    discount = float(problem.law(row[None]).discount[0]) ** (1 / dates)
    before = problem.law(table).spots.float()
    martingale, best = torch.zeros(paths), torch.full((paths,), -math.inf)
    one_date = Problem(problem.process, product.model_copy(update={"dates": 1}))
    for date in range(1, dates + 1):
        columns = c._asdict() | {name: values.double() for name, values in
                                 problem.process.restarted(c, before.double()).items()}  # fmt: skip
        columns["T"] = c.T / dates
        start = torch.stack([columns[name] for name in names], dim=1)
        many = prices_on_dates(
            one_date, start, inner, seed=seed + 1, first=date * paths, steps=steps, sampling="sobol"
        )[:, :, 0]  # fmt: skip
        left = dates - date

        def value(prices: Tensor, left: int = left) -> Tensor:
            """What the option is worth on this date, as the policy sees it. Shapes: (paths, ..., assets) -> (...)."""
            pays = (product.sign * (product.underlyings(prices) - strike)).clamp(min=0)
            if left <= 0:
                return pays
            return pays + waiting(problem, table, prices, left).clamp(min=0)

        now = outer[:, date - 1]
        grown = discount**date
        martingale = martingale + grown * (value(now[:, None])[:, 0] - value(many).mean(dim=1))
        pays = (product.sign * (product.underlyings(now) - strike)).clamp(min=0)
        best = torch.maximum(best, grown * pays - martingale)
        before = now
    return float(best.mean()), float(best.std() / paths**0.5)


def _steps_of_date(problem: Problem, row: Tensor) -> int:
    """Time steps from one date to the next."""
    if problem.process.exact:
        return 1
    longest = problem.process.longest_step(problem.schema.row(*row.tolist()))
    expiry = float(row[problem.schema.column("T")])
    return max(1, math.ceil(expiry / problem.product.dates / longest))
