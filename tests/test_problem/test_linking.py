"""The same paths on a GPU, by the same scalar methods, linked into one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smc.errors import ConfigError
from smc.gbm import Simulation, SimulationParams
from smc.models.numerical import Precision
from smc.problem.problem import Problem
from smc.problem.processes.bates import Bates
from smc.problem.processes.cev import ConstantElasticity
from smc.problem.processes.correlated_gbm import CorrelatedGBM, OneFactorGBM
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.processes.heston import Heston
from smc.problem.processes.rough_heston import LiftedRoughHeston
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.barrier import DownAndOutCall, UpAndOutCall
from smc.problem.products.basket import BasketPut
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import EuropeanCall, EuropeanPut
from smc.simulation import linking, paths
from smc.simulation.cuda import capture
from smc.simulation.levels_cuda import payoff_levels
from smc.simulation.regression import regressed_prices
from tests.test_problem.test_paths import MeanReverting, RangePayoff, Uncompilable, reference_rows

pytestmark = pytest.mark.gpu

LOG, EULER = GeometricBrownianMotion(), GeometricBrownianMotion(scheme="euler")
PROBLEMS = [
    *(Problem(LOG, product) for product in (EuropeanPut(), EuropeanCall(), DigitalPut())),
    *(Problem(LOG, product) for product in (ArithmeticAsianPut(dates=3), ArithmeticAsianCall(dates=12))),
    *(Problem(LOG, product) for product in (UpAndOutCall(dates=6), DownAndOutCall(dates=12))),
    *(Problem(EULER, product) for product in (EuropeanPut(), ArithmeticAsianPut(dates=12))),
    *(Problem(Heston(), product) for product in (EuropeanCall(), ArithmeticAsianPut(dates=4))),
    *(Problem(Bates(), product) for product in (EuropeanCall(), ArithmeticAsianPut(dates=4))),
    *(Problem(ConstantElasticity(), product) for product in (EuropeanPut(), UpAndOutCall(dates=6))),
    *(Problem(process, BasketPut(n_assets=5)) for process in (OneFactorGBM(n_assets=5), CorrelatedGBM(n_assets=5))),
    Problem(LiftedRoughHeston(), EuropeanCall()),
    Problem(LiftedRoughHeston(factors=3), ArithmeticAsianPut(dates=4)),
    Problem(MeanReverting(), RangePayoff()),
    Problem(MeanReverting(scale=0.5), EuropeanCall()),
]


def table_of(problem: Problem, count: int = 5) -> np.ndarray:
    uniform = np.random.default_rng(2).random((count, len(problem.schema)))
    lower, upper = (np.array([getattr(field, end) for field in problem.schema]) for end in ("lower", "upper"))
    return np.asarray(lower + (upper - lower) * uniform)


def first_of(stream: int) -> torch.Tensor:
    return torch.tensor(stream, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_cpu_and_gpu_simulate_the_same_paths(problem: Problem, precision: Any, sampling: Any) -> None:
    table = table_of(problem)
    sizes: dict[str, Any] = {"seed": 2**50 + 3, "paths": 3001, "steps": 12, "precision": precision}
    here = paths.simulate(problem, table, 2**33 - 2, sampling=sampling, **sizes)
    device = torch.from_numpy(table).cuda()
    there = linking.simulate(problem, device, first_of(2**33 - 2), sampling=sampling, **sizes).cpu().numpy()
    tolerance = 1e-4 if precision is Precision.float32 else 1e-10
    apart = np.abs(here - there) > tolerance * table[:, :1]
    # Where a payoff jumps, rounding may put a path on the other side: a few in ten thousand.
    assert apart.mean() <= (0 if problem.product.lipschitz else 3e-4)
    assert here.std() > 0


@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("process", [Heston(), Bates(), LiftedRoughHeston()], ids=lambda process: process.kind)
def test_cpu_and_gpu_follow_the_same_outer_paths_to_the_same_prices(
    process: Any, precision: Any, sampling: Any
) -> None:
    for product, steps in ((EuropeanPut(), 11), (DigitalPut(), 6), (EuropeanPut(), 1)):
        problem = Problem(process, product)
        table = table_of(problem)
        sizes: dict[str, Any] = {"seed": 5, "paths": 3001, "steps": steps, "precision": precision, "sampling": sampling}
        moved = table * 1.001
        here = paths.simulate_priced(problem, [table, moved], 2**33 - 2, **sizes)
        device = [torch.from_numpy(rows).cuda() for rows in (table, moved)]
        there = linking.simulate_priced(problem, device, first_of(2**33 - 2), **sizes)
        tolerance = 2e-4 if precision is Precision.float32 else 1e-9
        for ours, theirs, contracts in zip(here, there, (table, moved), strict=True):
            found = theirs.cpu().numpy()
            scale = np.maximum(1.0, np.abs(ours))
            scale[:, :2] = contracts[:, :1, None]
            apart = np.abs(found - ours) > tolerance * scale
            assert apart.mean() <= 3e-4, (problem.name, [float(apart[:, i].mean()) for i in range(apart.shape[1])])
            prices = regressed_prices(theirs).cpu().numpy(), regressed_prices(torch.from_numpy(ours)).numpy()
            np.testing.assert_allclose(*prices, atol=float(tolerance * contracts[:, 0].max()))


def test_regressed_prices_are_captured_and_do_not_depend_on_the_batch() -> None:
    outputs = torch.randn((300, 5, 4096), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    outputs[:, 1] += outputs[:, 2:].sum(dim=1)
    whole, results = regressed_prices(outputs), []
    np.testing.assert_allclose(whole.cpu().numpy(), regressed_prices(outputs.cpu()).numpy(), atol=1e-6)
    assert torch.equal(regressed_prices(outputs[7:9].contiguous()), whole[7:9])

    def work() -> None:
        results[:] = [regressed_prices(outputs)]

    replay = capture(work, outputs.device)
    replay()
    torch.cuda.synchronize()
    assert torch.equal(results[0], whole)


@pytest.mark.parametrize("sampling", ["pseudorandom", "sobol"])
@pytest.mark.parametrize("precision", list(Precision))
def test_pairs_of_contracts_have_the_same_random_numbers(precision: Any, sampling: Any) -> None:
    for problem in PROBLEMS:
        table = torch.from_numpy(table_of(problem)).cuda()
        moved = 1.001 * table
        sizes: dict[str, Any] = {"seed": 3, "paths": 3001, "steps": 12, "precision": precision, "sampling": sampling}
        pair = linking.simulate_pairs(problem, table, moved, first_of(5), **sizes)
        for found, contracts in zip(pair, (table, moved), strict=True):
            alone = linking.simulate(problem, contracts, first_of(5), **sizes)
            # Two contracts in a kernel may be rounded otherwise than one alone; where a payoff jumps that shows.
            apart = (found - alone).abs() > (1e-4 if precision is Precision.float32 else 1e-10) * contracts[:, :1]
            assert float(apart.double().mean()) <= (0 if problem.product.lipschitz else 3e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 8])
def test_any_number_of_steps_uses_the_normals_of_its_address(steps: int) -> None:
    for problem in (Problem(LOG, EuropeanPut()), Problem(MeanReverting(), EuropeanPut())):
        table = table_of(problem)
        for precision in Precision:
            sizes: dict[str, Any] = {"seed": 3, "paths": 100, "steps": steps, "precision": precision}
            here = paths.simulate(problem, table, 5, sampling="pseudorandom", **sizes)
            device = torch.from_numpy(table).cuda()
            there = linking.simulate(problem, device, first_of(5), sampling="pseudorandom", **sizes)
            np.testing.assert_allclose(there.cpu().numpy(), here, atol=2e-3 if "32" in precision else 1e-9)


@pytest.mark.parametrize(("product", "contract", "value"), reference_rows())
def test_reference_values_are_met_at_a_billion_paths(product: Any, contract: list[float], value: float) -> None:
    problem, paths_, rows = Problem(LOG, product), 1 << 21, 32
    table = torch.tensor([contract] * rows, dtype=torch.float64, device="cuda")
    sums = torch.zeros(2, dtype=torch.float64, device="cuda")
    calls = 16
    for call in range(calls):
        payoffs = linking.simulate(
            problem, table, first_of(call * rows), seed=1, paths=paths_, steps=product.dates,
            precision=Precision.float32, sampling="pseudorandom",
        ).double()  # fmt: skip
        sums += torch.stack([payoffs.sum(), payoffs.square().sum()])
    count = paths_ * rows * calls
    mean, square = (sums / count).tolist()
    assert count > 1e9
    assert abs(mean - value) < 3 * ((square - mean**2) / count) ** 0.5


def test_a_graph_is_replayed_on_other_contracts_and_streams() -> None:
    problem = Problem(LOG, ArithmeticAsianPut(dates=4))
    one, two = (torch.from_numpy(table_of(problem)[:, :]).cuda() * factor for factor in (1.0, 0.999))
    table, first, results = one.clone(), first_of(3), []
    sizes: dict[str, Any] = {"seed": 3, "paths": 512, "steps": 8, "precision": Precision.float32}

    def work() -> None:
        results[:] = [linking.simulate(problem, table, first, sampling="pseudorandom", **sizes)]

    replay = capture(work, table.device)
    for contracts, stream in ((one, 3), (two, 11)):
        table.copy_(contracts)
        first.fill_(stream)
        replay()
        expected = linking.simulate(problem, contracts, first_of(stream), sampling="pseudorandom", **sizes)
        assert torch.equal(results[0], expected)


def test_a_kernel_uses_registers_alone() -> None:
    for problem in PROBLEMS:
        kernel = linking.link(problem, Precision.float32, "pseudorandom", torch.device("cuda", 0), every_step=False)
        assert kernel.raw.local_size_bytes == 0, problem.name
        usual = type(problem.process) in (GeometricBrownianMotion, Heston)
        assert kernel.raw.num_regs <= (64 if usual else 128), problem.name


def test_a_simulation_on_a_gpu_is_that_on_a_cpu() -> None:
    problem = Problem(LOG, ArithmeticAsianPut(dates=4))
    params = SimulationParams(
        timesteps=8, network_size=32, batches_per_mc_run=16, mc_seed=1, sampling="pseudorandom", skip=7
    )
    here, there = Simulation(problem, params), Simulation(problem, params, "cuda")
    table = table_of(problem)
    assert there.payoffs(table).is_cuda
    torch.testing.assert_close(there.levels(table, offset=3).cpu(), here.levels(table, offset=3), rtol=1e-4, atol=1e-3)
    a, b = here.price(table[:2], paths=1 << 14), there.price(table[:2], paths=1 << 14)
    np.testing.assert_allclose(a.price, b.price, rtol=1e-5)


def test_no_contracts_and_many() -> None:
    problem = Problem(LOG, EuropeanPut())
    sizes: dict[str, Any] = {"seed": 3, "paths": 2, "steps": 2, "precision": Precision.float32}
    for count in (0, 70_000):
        table = torch.from_numpy(np.tile(table_of(problem, 1), (count, 1))).cuda()
        for sampling in ("pseudorandom", "sobol"):
            assert linking.simulate(problem, table, first_of(0), sampling=sampling, **sizes).shape == (count, 2)  # type: ignore[arg-type]


def test_what_cannot_be_compiled_is_one_error_with_its_line() -> None:
    problem = Problem(Uncompilable(), RangePayoff())
    table = torch.ones((1, 6), dtype=torch.float64, device="cuda")
    with pytest.raises(ConfigError, match="cannot be compiled"):
        linking.simulate(
            problem, table, first_of(0), seed=1, paths=4, steps=4, precision=Precision.float32, sampling="pseudorandom"
        )


def payoffs_of(name: str, paths_: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(5)
    price = 100 * torch.exp(0.4 * torch.randn(6, paths_, dtype=torch.float64))
    made = {
        "puts": (100 - price).clamp(min=0),
        "calls": (price - 120).clamp(min=0),
        "heavy tails": price**3,
        "digitals": (price > 100).double(),
        "nothing": torch.zeros_like(price),
        "one path": torch.where(torch.arange(paths_) == 7, 3.0, 0.0).expand(6, -1),
        "a cap": price.clamp(max=101).sub(99).clamp(min=0),
        "from tiny to huge": torch.exp(20 * torch.randn(6, paths_, dtype=torch.float64)),
        "whole numbers": price.round(),
    }
    return made[name].to(dtype).contiguous()


KINDS = [
    "puts",
    "calls",
    "heavy tails",
    "digitals",
    "nothing",
    "one path",
    "a cap",
    "from tiny to huge",
    "whole numbers",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("paths_", "size"), [(64, 8), (1000, 8), (4096, 256), (131_072, 1024)])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_of_payoffs_are_those_of_a_sort(kind: str, paths_: int, size: int, dtype: torch.dtype) -> None:
    payoffs = payoffs_of(kind, paths_, dtype)
    scale = torch.linspace(0.5, 2, 6, dtype=dtype)
    exact = payoffs.double().sort(dim=1).values.view(6, size, -1).mean(dim=2) * scale.double()[:, None]
    got = payoff_levels(payoffs.cuda(), scale.cuda(), size)
    torch.testing.assert_close(got.double().cpu(), exact, rtol=2e-6 if dtype is torch.float32 else 1e-12, atol=1e-30)
    assert torch.equal(got, payoff_levels(payoffs.cuda(), scale.cuda(), size))


def test_a_payoff_that_is_nan_shows() -> None:
    payoffs = torch.ones((1, 64), device="cuda")
    payoffs[0, 5] = torch.nan
    assert payoff_levels(payoffs, torch.ones(1, device="cuda"), 8).isnan().any()
