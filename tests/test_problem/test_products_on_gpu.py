"""Every product on a GPU: the same paths as on a CPU, the same expected payoffs, and both in registers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.learning.exercise import with_policy
from smc.models.numerical import Precision
from smc.problem.conditional import is_conditional
from smc.problem.problem import Problem
from smc.problem.processes.correlated_gbm import CorrelatedGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.product import Product
from smc.problem.products.autocallable import Autocallable
from smc.problem.products.barrier import UpAndInPut, UpAndOutCall
from smc.problem.products.bermudan import BermudanOption
from smc.problem.products.lookback import FloatingLookbackPut
from smc.simulation import linking, paths
from smc.simulation.regression import regressed_prices
from tests.test_problem.products import products
from tests.test_problem.test_linking import first_of, table_of

pytestmark = pytest.mark.gpu

HESTON = (
    UpAndOutCall(dates=4), UpAndInPut(dates=4, monitoring="continuous", rebate=2.0), Autocallable(dates=4),
    FloatingLookbackPut(dates=4, monitoring="continuous"),
)  # fmt: skip


@cache
def problems() -> dict[str, Problem]:
    """All products under the simplest process that they go with, and some under Heston's."""
    found = [Problem(CorrelatedGBM() if product.assets == 2 else GeometricBrownianMotion(), product)
             for product in products()]  # fmt: skip
    found += [Problem(Heston(), product) for product in HESTON]
    return {f"{problem.name} {settings(problem.product)}": problem for problem in found}


def settings(product: Product) -> str:
    return " ".join(str(getattr(product, name)) for name in ("monitoring", "over") if hasattr(product, name))


@pytest.mark.parametrize("name", list(problems()))
def test_a_product_pays_on_a_gpu_what_it_pays_on_a_cpu(name: str) -> None:
    problem = problems()[name]
    if isinstance(problem.product, BermudanOption):
        problem = with_policy(problem)
    table = table_of(problem)
    device = torch.from_numpy(table).cuda()
    for precision in Precision:
        for sampling in ("pseudorandom", "sobol"):
            sizes: dict[str, Any] = {
                "seed": 7, "paths": 3001, "steps": 8, "precision": precision, "sampling": sampling,
            }  # fmt: skip
            here = [paths.simulate(problem, table, 2**33 - 2, **sizes)[:, None]]
            there = [linking.simulate(problem, device, first_of(2**33 - 2), **sizes)[:, None]]
            if is_conditional(problem):
                here += paths.simulate_priced(problem, [table], 2**33 - 2, **sizes)
                there += linking.simulate_priced(problem, [device], first_of(2**33 - 2), **sizes)
            tolerance = 3e-4 if precision is Precision.float32 else 1e-9
            for ours, theirs in zip(here, there, strict=True):
                found = theirs.cpu().numpy()
                apart = np.abs(found - ours) > tolerance * np.maximum(table[:, :1, None], np.abs(ours))
                # Beside a barrier or a strike rounding may put a path on the other side: a few in a thousand.
                assert apart.mean() <= (3e-5 if problem.product.lipschitz else 1e-3), (sampling, precision)
                assert ours[:, 0].std() > 0
            if is_conditional(problem):
                prices = regressed_prices(there[1]).cpu().numpy(), regressed_prices(torch.from_numpy(here[1])).numpy()
                np.testing.assert_allclose(*prices, atol=2 * tolerance * float(table[:, 0].max()))


def test_a_note_of_many_dates_is_compiled_for_a_gpu_too() -> None:
    problem = Problem(GeometricBrownianMotion(), Autocallable(dates=26))
    table = table_of(problem)
    sizes: dict[str, Any] = {
        "seed": 7, "paths": 2048, "steps": 26, "precision": Precision.float64, "sampling": "sobol",
    }  # fmt: skip
    (ours,) = paths.simulate_priced(problem, [table], 5, **sizes)
    (theirs,) = linking.simulate_priced(problem, [torch.from_numpy(table).cuda()], first_of(5), **sizes)
    np.testing.assert_allclose(theirs[:, 1].cpu().numpy(), ours[:, 1], rtol=1e-9)


def test_the_usual_products_use_registers_alone() -> None:
    for name, problem in problems().items():
        try:
            problem.product.check_ready()
        except ConfigError:
            continue
        kernel = linking.link(problem, Precision.float32, "pseudorandom", torch.device("cuda", 0), every_step=False)
        assert kernel.raw.local_size_bytes == 0, name
