"""Paths of any process and product on a CPU: against closed forms and published values, and against themselves."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.special import ndtr

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.problem.oracles import black_scholes
from smc.problem.problem import Problem, process_of, product_of, register
from smc.problem.process import Process
from smc.problem.processes.gbm import GeometricBrownianMotion
from smc.problem.product import Product
from smc.problem.products.asian import ArithmeticAsianCall, ArithmeticAsianPut
from smc.problem.products.barrier import DownAndOutCall, UpAndOutCall
from smc.problem.products.digital import DigitalPut
from smc.problem.products.european import STRIKE, EuropeanCall, EuropeanPut
from smc.problem.products.terminal import TerminalPrice
from smc.problem.schema import EXPIRY, Field, Schema
from smc.simulation import paths, walk
from smc.simulation.normals import box_muller, bridge_increments, philox4x32
from tests.reference_normals import sobol_normals

GBM = GeometricBrownianMotion()
CONTRACTS = np.array([[100, 105, 1.0, 0.03, 0.01, 0.25], [80, 70, 0.5, 0.0, 0.04, 0.6], [150, 60, 2.0, 0.08, 0, 0.05]])
SAMPLINGS = ["pseudorandom", "sobol"]


def simulated(problem: Problem, table: np.ndarray, paths_: int = 1 << 12, **changes: Any) -> np.ndarray:
    chosen = {"seed": 7, "steps": 16, "precision": Precision.float64, "sampling": "pseudorandom", **changes}
    return paths.simulate(problem, table, chosen.pop("first", 3), paths=paths_, **chosen)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pairs_of_contracts_have_the_same_random_numbers(precision: Precision, sampling: str) -> None:
    for product in (EuropeanPut(), ArithmeticAsianPut(dates=8), UpAndOutCall(dates=4)):
        problem = Problem(GBM, product)
        table = np.insert(CONTRACTS, 2, 1.3, axis=1) if isinstance(product, UpAndOutCall) else CONTRACTS
        moved = table * 1.01
        sizes: dict[str, Any] = {"seed": 7, "paths": 1000, "steps": 16, "precision": precision, "sampling": sampling}
        pair = paths.simulate_pairs(problem, table, moved, 3, **sizes)
        for found, contracts in zip(pair, (table, moved), strict=True):
            np.testing.assert_array_equal(found, paths.simulate(problem, contracts, 3, **sizes))


# --- against what is known ---------------------------------------------------------------------------


def digital(table: np.ndarray) -> np.ndarray:
    X0, K, T, r, d, v = table.T
    return np.exp(-r * T) * ndtr(-(np.log(X0 / K) + (r - d - v * v / 2) * T) / (v * np.sqrt(T)))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("product", "exact"),
    [
        (EuropeanPut(), lambda t: black_scholes.price(t)),
        (EuropeanCall(), lambda t: black_scholes.price(t, "call")),
        (DigitalPut(), digital),
        (TerminalPrice(), lambda t: t[:, 0] * np.exp((t[:, 3] - t[:, 4]) * t[:, 2])),
    ],
)
def test_european_payoffs_have_their_closed_form(product: Product, exact: Any, sampling: str, precision: Any) -> None:
    problem = Problem(GBM, product)
    sample = simulated(problem, CONTRACTS, 1 << 16, sampling=sampling, precision=precision)
    error = sample.std(axis=1, dtype=np.float64) / 256
    apart = np.abs(sample.mean(axis=1, dtype=np.float64) - exact(CONTRACTS))
    assert (apart < 4 * error + 1e-6).all()
    if sampling == "sobol":
        assert (apart < error / 20 + 1e-6).all()


def reference_rows() -> list[Any]:
    rows = []
    for name, product, values in (
        ("asian monthly", ArithmeticAsianCall(dates=12), ([100, 100, 1.0, 0.05, 0, 0.3], 8.47428953699)),
        ("asian weekly", ArithmeticAsianCall(dates=52), ([100, 100, 1.0, 0.05, 0, 0.3], 8.06778245696)),
        ("down and out, 85", DownAndOutCall(dates=50), ([100, 100, 0.85, 0.2, 0.1, 0, 0.3], 6.3222401405)),
        ("down and out, 95", DownAndOutCall(dates=50), ([100, 100, 0.95, 0.2, 0.1, 0, 0.3], 4.9067890354)),
        ("down and out, 99", DownAndOutCall(dates=50), ([100, 100, 0.99, 0.2, 0.1, 0, 0.3], 2.3363868958)),
    ):
        rows.append(pytest.param(product, *values, id=name))
    return rows


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("product", "contract", "value"), reference_rows())
def test_path_dependent_payoffs_have_their_reference_value(
    product: Product, contract: list[float], value: float, sampling: str
) -> None:
    """Spectral and Gauss-Legendre recursions: rows 075, 076, 085, 087, 088 of the table of references."""
    sample = simulated(
        Problem(GBM, product),
        np.array([contract] * 8, dtype=np.float64),
        1 << 16,
        steps=product.dates,
        sampling=sampling,
        precision=Precision.float32,
    )
    means = sample.mean(axis=1, dtype=np.float64)
    assert abs(means.mean() - value) < 4 * sample.std(dtype=np.float64) / math.sqrt(sample.size)
    if sampling == "sobol":  # rows are scrambled independently
        assert abs(means.mean() - value) < 4 * means.std(ddof=1) / math.sqrt(8) + 1e-4


def test_an_up_and_out_call_is_a_call_where_the_barrier_is_far_and_nothing_where_it_is_near() -> None:
    table = np.array([[100, 105, 50.0, 1.0, 0.03, 0.01, 0.25], [100, 105, 1.000001, 1.0, 0.03, 0.01, 0.25]])
    far, near = simulated(Problem(GBM, UpAndOutCall(dates=16)), table)
    call = simulated(Problem(GBM, EuropeanCall()), np.delete(table, 2, axis=1))[0]
    np.testing.assert_allclose(far, call, rtol=1e-12)
    assert near.max() < 105


# --- the random numbers are those of their address ---------------------------------------------------


def walked(table: np.ndarray, increments: np.ndarray, euler: bool) -> np.ndarray:
    """A textbook's loop. Shapes: increments (n, steps, paths)."""
    X0, _, T, r, d, v = (column[:, None] for column in table.T)
    steps = increments.shape[1]
    dt, price = T / steps, X0 * np.ones((len(table), increments.shape[2]))
    for step in range(steps):
        z = increments[:, step]
        if euler:
            price = np.abs(price * (1 + (r - d) * dt + v * np.sqrt(dt) * z))
        else:
            price = price * np.exp((r - d - v * v / 2) * dt + v * np.sqrt(dt) * z)
    return price


def philox_increments(seed: int, first: int, rows: int, steps: int, paths_: int, precision: Precision) -> np.ndarray:
    per = 4 if precision is Precision.float32 else 2
    out = np.empty((rows, steps, paths_))
    for row in range(rows):
        for block in range(-(-steps // per)):
            words = philox4x32(seed, (np.arange(paths_), block, first + row, 0))
            for i, z in enumerate(box_muller(words, precision)[: steps - per * block]):
                out[row, per * block + i] = z
    return out


@pytest.mark.parametrize("scheme", ["log", "euler"])
@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.float32, 3e-6), (Precision.float64, 1e-12)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 33])
def test_pseudorandom_paths_are_a_textbooks(scheme: Any, precision: Precision, tolerance: float, steps: int) -> None:
    problem = Problem(GeometricBrownianMotion(scheme=scheme), TerminalPrice())
    got = simulated(problem, CONTRACTS, 1000, precision=precision, steps=steps, first=5, seed=2**40 + 17)
    z = philox_increments(2**40 + 17, 5, 3, steps, 1000, precision)
    np.testing.assert_allclose(got, walked(CONTRACTS, z, scheme == "euler"), rtol=tolerance * math.sqrt(steps))


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.float32, 3e-6), (Precision.float64, 1e-11)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 33])
def test_sobol_paths_are_a_textbooks(precision: Precision, tolerance: float, steps: int) -> None:
    problem = Problem(GeometricBrownianMotion(scheme="euler"), TerminalPrice())
    got = simulated(problem, CONTRACTS, 1000, precision=precision, steps=steps, first=2**33, sampling="sobol")
    streams = np.arange(2**33, 2**33 + 3, dtype=np.uint64)
    z = bridge_increments(steps) @ sobol_normals(7, streams, 1000, steps, Precision.float64)
    np.testing.assert_allclose(got, walked(CONTRACTS, z, True), rtol=tolerance * (steps + 4))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("paths_", [1, 15, 16, 513, 5000])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(sampling: str, precision: Any, paths_: int) -> None:
    problem = Problem(GBM, ArithmeticAsianPut(dates=8))
    table = np.tile(CONTRACTS, (20, 1))
    together = simulated(problem, table, paths_, sampling=sampling, precision=precision, rows_at_once=7)
    alone = [
        simulated(problem, table[i : i + 1], paths_, sampling=sampling, precision=precision, first=3 + i)[0]
        for i in range(60)
    ]
    np.testing.assert_array_equal(together, np.array(alone))
    assert len({row.tobytes() for row in together[::3]}) == 20 or paths_ == 1


@pytest.mark.parametrize("steps", [2, 16, 128])
def test_an_exact_process_without_dates_is_the_end_of_its_bridge(steps: int) -> None:
    put = simulated(Problem(GBM, EuropeanPut()), CONTRACTS, 4096, sampling="sobol", steps=steps)
    np.testing.assert_array_equal(
        put, simulated(Problem(GBM, EuropeanPut()), CONTRACTS, 4096, sampling="sobol", steps=1)
    )
    through = simulated(Problem(GBM, _LookingPut(dates=steps)), CONTRACTS, 4096, sampling="sobol", steps=steps)
    np.testing.assert_allclose(through, put, atol=1e-10)


def test_more_normals_than_fit_into_a_block_of_lanes_are_drawn_all_the_same() -> None:
    long = simulated(Problem(GBM, TerminalPrice()), CONTRACTS[:1], 50, steps=16384, precision=Precision.float32)
    assert np.isfinite(long).all()
    assert abs(np.log(long / 100).std() / 0.25 - 1) < 0.35


# --- a user's own ------------------------------------------------------------------------------------


class _LookingPut(EuropeanPut):
    kind: ClassVar[str] = "looking_put"

    def observe(self, seen: Any, spot: float, date: float, k: Any) -> tuple[float, ...]:
        return (seen[0] + date,)


LIMIT = 2.5


def clipped(x: float, limit: float) -> float:
    return min(max(x, -limit), limit)


class MeanReverting(Process):
    """An Ornstein-Uhlenbeck log price, with a setting, a helper, a loop, a branch and numbers of every kind."""

    kind: ClassVar[str] = "mean_reverting"
    fields: ClassVar[tuple[Field, ...]] = (
        Field("X0", "spot", "in currency", 50, 150, 0, True),
        Field("r", "rate", "per year", 0, 0.1),
        Field("a", "speed", "per year", 0.5, 3),
        Field("v", "volatility", "per sqrt(year)", 0.1, 0.5),
    )
    normals: ClassVar[int] = 3
    scale: float = 1.0
    halves: int = 2

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        return math.exp(-c.a * dt), c.v * math.sqrt((1 - math.exp(-2 * c.a * dt)) / (2 * c.a)), math.log(c.X0)

    def start(self, c: Any) -> tuple[float, ...]:
        return math.log(c.X0), 1

    def step(self, state: Any, normals: Any, k: Any) -> tuple[float, ...]:
        total = 0
        for i in range(3):
            total = total + normals[i] / math.sqrt(3)
        z = clipped(total, LIMIT) if self.scale > 0 else 0
        half = 1 / self.halves
        return k[2] + (state[0] - k[2]) * k[0] + self.scale * k[1] * z, self._damped(state[1]) + half - half

    def _damped(self, x: float) -> float:
        return 2 * x**2 / 2 if x > 0 else -x

    def spot(self, state: Any, k: Any) -> float:
        return math.exp(state[0])


class RangePayoff(Product):
    """Pays the distance of the highest and the lowest price on the dates, less a strike."""

    kind: ClassVar[str] = "range"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE,)
    dates: int = 4

    def coefficients(self, c: Any) -> tuple[float, ...]:
        return c.K / 10, math.exp(-c.r * c.T)

    def begin(self, k: Any) -> tuple[float, ...]:
        return 0.0, 1e9

    def observe(self, seen: Any, spot: float, date: float, k: Any) -> tuple[float, ...]:
        return max(seen[0], spot), min(seen[1], spot)

    def payoff(self, seen: Any, spot: float, k: Any) -> float:
        return k[1] * max(seen[0] - seen[1] - k[0], 0)


def in_python(problem: Problem, contract: dict[str, float], z: np.ndarray, steps: int) -> float:
    """One path by the methods as they stand. Shapes: z (steps x normals,)."""
    process, product = problem.process, problem.product
    c: Any = type("C", (), contract)
    k, q = process.coefficients(c, c.T / steps), product.coefficients(c)
    state, seen = process.start(c), product.begin(q)
    for step in range(1, steps + 1):
        at = process.normals * (step - 1)
        state = process.step(state, tuple(float(x) for x in z[at : at + process.normals]), k)
        if product.dates and step % (steps // product.dates) == 0:
            seen = product.observe(seen, process.spot(state, k), float(step * product.dates // steps), q)
    return product.payoff(seen, process.spot(state, k), q)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("changes", [{}, {"scale": 0.5}, {"scale": -1.0}, {"halves": 4}])
def test_compiled_methods_give_what_they_give_in_python(changes: Any, precision: Precision) -> None:
    problem = Problem(MeanReverting(**changes), RangePayoff())
    assert problem.schema.names == ("X0", "K", "T", "r", "a", "v")
    table = np.array([[100, 105, 1.0, 0.03, 1.5, 0.3], [80, 70, 0.5, 0.0, 3, 0.1]])
    got = simulated(problem, table, 64, steps=8, precision=precision)
    for row in range(2):
        z = philox_increments(7, 3 + row, 1, 24, 64, precision)[0]
        contract = dict(zip(problem.schema.names, table[row], strict=True))
        expected = [in_python(problem, contract, z[:, path], 8) for path in range(64)]
        tolerance = 2e-4 if precision is Precision.float32 else 1e-10
        np.testing.assert_allclose(got[row], expected, atol=tolerance)


def test_single_precision_stays_single() -> None:
    """One number in double precision would make the whole loop so, at half the speed or less."""
    text, _ = walk.walk_source(Problem(MeanReverting(), RangePayoff()), Precision.float32)
    step = text[text.index("def step_") :].split("\n\n")[0]
    assert "_real(3.0)" in step
    assert "_real(2.5)" in text
    assert "math." not in step
    scalar_code = text[text.index("def step_") : text.index("def walk(")]
    assert not re.search(r"(?<!_real\()\b\d+\.\d", scalar_code)


@pytest.mark.slow
def test_compiled_problems_are_kept_between_processes(tmp_path: Path) -> None:
    code = (
        "import time, numpy as np\n"
        "from smc.models.numerical import Precision\n"
        "from smc.problem.problem import Problem\n"
        "from smc.problem.processes.gbm import GeometricBrownianMotion\n"
        "from smc.problem.products.asian import ArithmeticAsianPut\n"
        "from smc.simulation import paths\n"
        "started = time.perf_counter()\n"
        "problem = Problem(GeometricBrownianMotion(), ArithmeticAsianPut(dates=2))\n"
        "table, sizes = np.array([[100, 100, 1, 0, 0, 0.2]]), {'seed': 1, 'paths': 64, 'steps': 4}\n"
        "x = paths.simulate(problem, table, 0, precision=Precision.float32, sampling='pseudorandom', **sizes)\n"
        "print(time.perf_counter() - started, float(x.sum()))\n"
    )
    environment = {**os.environ, "SMC_CACHE_DIR": str(tmp_path)}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        runs.append([float(x) for x in done.stdout.split()])
    assert runs[0][1] == runs[1][1]
    assert runs[1][0] < runs[0][0] / 3
    assert runs[0][0] < 60


# --- what is refused ---------------------------------------------------------------------------------


class NoTuple(MeanReverting):
    kind: ClassVar[str] = "no_tuple"

    def start(self, c: Any) -> Any:
        return 1.0


class Shrinking(MeanReverting):
    kind: ClassVar[str] = "shrinking"

    def step(self, state: Any, normals: Any, k: Any) -> tuple[float, ...]:
        return (state[0],)


class Failing(MeanReverting):
    kind: ClassVar[str] = "failing"

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        return (c.sigma,)


class NotANumber(RangePayoff):
    kind: ClassVar[str] = "not_a_number"

    def payoff(self, seen: Any, spot: float, k: Any) -> float:
        return math.nan


class UsesObjects(MeanReverting):
    kind: ClassVar[str] = "uses_objects"

    def step(self, state: Any, normals: Any, k: Any) -> tuple[float, ...]:
        return float(np.clip(state[0], 0, 1)), state[1]


class Uncompilable(MeanReverting):
    kind: ClassVar[str] = "uncompilable"

    def step(self, state: Any, normals: Any, k: Any) -> tuple[float, ...]:
        drift = state[0] * 2
        found = drift if state[1] > 0 else "none"
        return found, state[1]


class WithKeywords(MeanReverting):
    kind: ClassVar[str] = "with_keywords"

    def step(self, state: Any, normals: Any, k: Any) -> tuple[float, ...]:
        return clipped(x=state[0], limit=1.0), state[1]


class Twice(EuropeanPut):
    kind: ClassVar[str] = "twice"
    fields: ClassVar[tuple[Field, ...]] = (STRIKE, Field("v", "another v", "", 0, 1))


class OnTwo(EuropeanPut):
    kind: ClassVar[str] = "on_two"
    assets: ClassVar[int] = 2


@pytest.mark.parametrize(
    ("process", "product", "message"),
    [
        (NoTuple(), RangePayoff(), r"NoTuple.start gives 1.0: it must give a tuple of numbers"),
        (Shrinking(), RangePayoff(), r"Shrinking.step gives 1 numbers, and start 2"),
        (Failing(), RangePayoff(), r"Failing.coefficients fails for .*AttributeError.*sigma"),
        (MeanReverting(), NotANumber(), r"NotANumber.payoff gives nan: it must give a number"),
        (
            UsesObjects(),
            RangePayoff(),
            r"UsesObjects.step .*line \d+.*`np.clip`: it is a .*, and only numbers and scalar functions can be",
        ),
        (
            WithKeywords(),
            RangePayoff(),
            r"WithKeywords.step in .*, line \d+, cannot be compiled: .*arguments by position",
        ),
        (Uncompilable(), RangePayoff(), r"Uncompilable.step in .*test_paths.py, line \d+, cannot be compiled: "),
        (GBM, Twice(), r"the field 'v' is there twice"),
        (GBM, OnTwo(), r"gbm has 1 assets and on_two is on 2"),
    ],
)
def test_what_cannot_be_simulated_is_one_clear_error(process: Process, product: Product, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulated(Problem(process, product), np.ones((1, 6)), 16, steps=4)


def test_steps_that_do_not_fit_the_dates_are_refused() -> None:
    with pytest.raises(ConfigError, match="timesteps is 16, and arithmetic_asian_put looks at the price on 12 dates"):
        simulated(Problem(GBM, ArithmeticAsianPut(dates=12)), CONTRACTS)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SMC_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(walk, "_walks", {})
    with pytest.raises(ConfigError, match="set SMC_CACHE_DIR to a folder that can be written"):
        simulated(Problem(GBM, DigitalPut()), CONTRACTS)


# --- kinds and fields --------------------------------------------------------------------------------


def test_kinds_are_made_from_their_settings() -> None:
    assert process_of({"kind": "gbm", "scheme": "euler"}) == GeometricBrownianMotion(scheme="euler")
    assert product_of({"kind": "arithmetic_asian_put", "dates": 12}) == ArithmeticAsianPut(dates=12)
    with pytest.raises(ConfigError, match=r"no process of the kind 'os\.system': there are gbm.*register your own"):
        process_of({"kind": "os.system"})
    with pytest.raises(ConfigError, match="product arithmetic_asian_put: dates: Input should be"):
        product_of({"kind": "arithmetic_asian_put", "dates": 0})
    with pytest.raises(ConfigError, match="there is no product of the kind 'None'"):
        product_of({})
    with pytest.raises(ConfigError, match="strikes"):
        product_of({"kind": "european_put", "strikes": 3})


def test_a_users_kind_is_registered_once() -> None:
    register(MeanReverting)
    register(MeanReverting)
    assert process_of({"kind": "mean_reverting", "scale": 2.0}) == MeanReverting(scale=2.0)

    class Other(MeanReverting):
        pass

    with pytest.raises(ConfigError, match=r"the kind 'mean_reverting' is .*MeanReverting already"):
        register(Other)

    class Nameless(Product):
        pass

    with pytest.raises(ConfigError, match=r"Nameless\.kind is None"):
        register(Nameless)


def test_the_fields_of_the_first_problem_stand_where_they_always_did() -> None:
    assert Problem(GBM, EuropeanPut()).schema.names == ("X0", "K", "T", "r", "d", "v")
    assert Problem(GBM, UpAndOutCall()).schema.names == ("X0", "K", "H", "T", "r", "d", "v")
    schema = Schema([EXPIRY, STRIKE])
    assert schema.column("K") == 1
    assert schema[0].allowed == "finite and at least 0"
    assert schema[1].within(1, 2).upper == 2
    with pytest.raises(ConfigError, match="there is no field 'S'; the fields are T, K"):
        schema.column("S")
    with pytest.raises(ConfigError, match="'T 1' is no name"):
        Schema([Field("T 1", "", "", 0, 1)])
