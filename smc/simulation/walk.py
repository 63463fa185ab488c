"""The loop over the paths of one problem: a module of generated Python, which Numba compiles and keeps.

What is generated is a module's text, because Numba keeps what it compiled beside a file: another process that simulates
the same problem reads it back in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.problem.conditional import LEAST_VARIANCE, Estimator
from smc.problem.problem import Problem
from smc.simulation import elementary, lanes
from smc.simulation.scalar import FUNCTIONS, ScalarSource, scalar_methods, tuple_text
from smc.simulation.sizes import Sizes, sizes_of

__all__ = ["Calls", "cache_folder", "compiled_walk", "keep", "numba_error", "walk_source"]

_one_at_a_time = threading.Lock()
# Compiled code stays loaded as long as the process, so that to forget it would free nothing.
_walks: dict[tuple[Problem, Precision, bool, Estimator], Callable[..., None]] = {}

_TEMPLATE = """# {name}, {real}. Made by smc.simulation.walk, {version}.
import math
from collections import namedtuple

import numpy as np
from numba import {real} as _real
from numba import njit as _njit

from smc.simulation.elementary import FAST as _FAST
from smc.simulation.lanes import bridge_{real} as _bridge
from smc.simulation.lanes import pseudorandom_{real} as _pseudorandom
from smc.simulation.lanes import sobol_{real} as _sobol

{functions}
_Contract = namedtuple("_Contract", {fields!r})


{scalar}

"""
# A function of the module: of contracts, or of pairs of contracts on the same normals.
_WALK = """

@_njit(fastmath=True, nogil=True, error_model="numpy", cache=True)
def {function}({tables}, first, seed, steps, stride, lanes, points, plan, weights, {outs}):
    rows, _, paths = out.shape
    z = np.empty(({normals} * steps + {extras}, lanes), dtype=np.{real})
    path = np.empty((steps + 1, lanes), dtype=np.{real})
{arrays}
    for row in range(rows):
{contract}
        for begin in range(0, paths, lanes):
            width = min(lanes, paths - begin)
            if points.shape[0]:
                _sobol(points, seed, first + np.uint64(row), begin, width, z)
                if steps > 1:
                    _bridge(z, {normals}, steps, plan, weights, width, path)
            else:
                _pseudorandom(seed, first + np.uint64(row), begin, width, z)
            for lane in range(width):
{start}
            for at in range(steps):
{share}                for lane in range(width):
{step}
{look}
            for lane in range(width):
{payoff}
"""
_LOOK = """                if (at + 1) % stride == 0:
                    date = _real((at + 1) // stride)
                    for lane in range(width):
"""


def compiled_walk(
    problem: Problem, precision: Precision, *, pairs: bool = False, estimator: Estimator = "payoff"
) -> Callable[..., None]:
    """The loop for a problem, compiled once in a process; of `pairs` of contracts it takes two tables and two outputs.

    `estimator`: what is expected of a path, beside its payoff.
    Raises: ConfigError saying which line cannot be compiled.
    """
    with _one_at_a_time:
        key = (problem, precision, pairs, estimator)
        if key not in _walks:
            text, source = walk_source(problem, precision, estimator)
            walk = getattr(_loaded(text), "walk_pairs" if pairs else "walk")
            _walks[key] = _typed(walk, precision, text, source, pairs=pairs)
        return _walks[key]


# --- the text ---------------------------------------------------------------------------------------------


def walk_source(
    problem: Problem, precision: Precision, estimator: Estimator = "payoff"
) -> tuple[str, ScalarSource]:  # fmt: skip
    """The module's text, and where its scalar functions come from."""
    source, names = scalar_methods(problem, estimator)
    sizes = sizes_of(problem, estimator)
    call = Calls(names, sizes, estimator)
    head = _TEMPLATE.format(
        name=problem.name,
        real=precision.value,
        version=_version(),
        functions=_functions(precision),
        fields=problem.schema.names,
        scalar="\n\n".join([source.text, *call.functions]),
    )
    pairs = _walk("walk_pairs", ("", "m"), problem, precision, call, sizes)
    return head + _walk("walk", ("",), problem, precision, call, sizes) + pairs, source


def _walk(
    function: str, tags: tuple[str, ...], problem: Problem, precision: Precision, call: Calls, sizes: Sizes
) -> str:  # fmt: skip
    """The loop over contracts whose numbers have these tags, "" for the first, on the same normals."""
    product, real = problem.product, precision.value
    z = [f"z[{sizes.normals} * at + {i}, lane]" for i in range(sizes.normals)]
    contract, start, step, observed, payoff = [], [], [], [], []
    for tag in tags:
        k, q = _tuple(f"k{tag}", sizes.process), _tuple(f"q{tag}", sizes.product)
        state, seen = _tuple(f"s{tag}", sizes.state, "[lane]"), _tuple(f"a{tag}", sizes.seen, "[lane]")
        columns = ", ".join(f"table{tag}[row, {i}]" for i in range(len(problem.schema)))
        contract += [
            f"contract = _Contract({columns})",
            *_unpacked(f"k{tag}", sizes.process, call.coefficients),
            *_unpacked(f"q{tag}", sizes.product, call.terms),
            *_unpacked(f"first_s{tag}", sizes.state, call.start),
            *_unpacked(f"first_a{tag}", sizes.seen, call.begin(q)),
        ]
        start += [f"{n}{tag}{i}[lane] = first_{n}{tag}{i}" for n, count in sizes.arrays for i in range(count)]
        if product.continuous:
            step.append(f"_before = {state}")
        step += _stored(f"s{tag}", sizes.state, call.step(state, z, k))
        given = {"state": state, "seen": seen, "k": k, "q": q}
        if product.continuous:
            step += _stored(f"a{tag}", sizes.seen, call.between(z=z, before="_before", **given))
        elif product.dates:
            observed += _stored(f"a{tag}", sizes.seen, call.look(**given))
        drawn = [f"z[{sizes.normals} * steps + {i}, lane]" for i in range(sizes.extras)]
        found = call.gives(**given, drawn=drawn)
        payoff += found.lines + [f"out{tag}[row, {i}, begin + lane] = {value}" for i, value in enumerate(found.values)]
    return _WALK.format(
        function=function,
        tables=", ".join(f"table{tag}" for tag in tags),
        outs=", ".join(f"out{tag}" for tag in tags),
        real=real,
        normals=sizes.normals,
        extras=sizes.extras,
        arrays=_indented([line for tag in tags for line in _arrays(sizes, real, tag)], 1),
        contract=_indented(contract, 2),
        start=_indented(start, 4),
        share=_indented(["share = (_real(at) + _real(0.5)) / _real(steps)\n"], 4) if product.continuous else "",
        step=_indented(step, 5),
        look=_LOOK + _indented(observed, 6) if observed else "",
        payoff=_indented(payoff, 4),
    )


@dataclass(frozen=True)
class Given:
    """Text that computes what a path gives: lines, and then an expression for each number."""

    lines: list[str]
    values: list[str]


class Calls:
    """Text that calls the scalar functions of a problem; and the functions, in `functions`, that join them on a bridge.

    Arguments are text: tuples of a path's numbers, or a list of normals.
    """

    def __init__(self, names: Mapping[str, str], sizes: Sizes, estimator: Estimator) -> None:
        self._names, self._sizes, self._estimator = names, sizes, estimator
        self._bridge = estimator == "bridge"
        self.functions = [_bridge_functions(names, sizes)] if self._bridge else []
        self.coefficients = f"{names['coefficients']}(contract, contract.T / steps)"
        self.terms = f"{names['terms']}(contract)"
        self.start = "_bridge_start(contract, steps)" if self._bridge else f"{names['start']}(contract)"

    def begin(self, q: str) -> str:
        """What is known of a path at its beginning."""
        return f"_bridge_begin({q})" if self._bridge else f"{self._names['begin']}({q})"

    def step(self, state: str, z: Sequence[str], k: str) -> str:
        """The state one step later."""
        own = z[: self._sizes.normals - self._sizes.draws]
        return f"{'_bridge_step' if self._bridge else self._names['step']}({state}, {tuple_text(own)}, {k})"

    def look(self, state: str, seen: str, k: str, q: str) -> str:
        """What is known of a path after a date."""
        if self._bridge:
            return f"_bridge_look({state}, {seen}, date, {k}, {q})"
        return f"{self._names['observe']}({seen}, {self._names['spot']}({state}, {k}), date, {q})"

    def between(self, state: str, seen: str, k: str, q: str, *, z: Sequence[str], before: str) -> str:
        """What is known of a path after a step, of a product that looks between."""
        spot, variation = f"{self._names['spot']}({state}, {k})", f"{self._names['variation']}({before}, {state}, {k})"
        draws = tuple_text(z[self._sizes.normals - self._sizes.draws :])
        return f"{self._names['between']}({seen}, {spot}, {variation}, {draws}, share, {q})"

    def gives(self, state: str, seen: str, k: str, q: str, *, drawn: Sequence[str]) -> Given:
        """The payoff of a path; and where something is expected of it, that, and the controls.

        `drawn` are the normals of expiry of an outer path: the first draws the price, the others are the process's.
        """
        names, controls = self._names, [f"_given[{i}]" for i in range(2, self._sizes.outputs)]
        if self._bridge:
            outer, own = _part("s", 0, self._sizes.outer), f"_s[{self._sizes.outer}]"
            seen_count = self._sizes.seen - self._sizes.kept
            lines = [
                f"_s, _a = {state}, {seen}",
                f"_given = {names['given']}({outer}, (), {k})",
                f"_log_price = _given[0] + {own}",
            ]
            payoff = f"{names['payoff']}({_part('a', 0, seen_count)}, _exp(_log_price), {q})"
            kept = _part("a", seen_count, self._sizes.seen)
            expected = f"{names['on_bridge']}({kept}, _log_price, {own}, max(_given[1], {_LEAST}), {q})"
            return Given(lines, [payoff, expected, *controls])
        if self._estimator == "outer":
            finals = tuple_text(drawn[1:])
            lines = [
                f"_given = {names['given']}({state}, {finals}, {k})",
                f"_spot = _exp(_given[0] + math.sqrt(_given[1]) * {drawn[0]})",
            ]
            payoff = f"{names['payoff']}({seen}, _spot, {q})"
            return Given(lines, [payoff, f"{names['on_log_normal']}(_given[0], _given[1], {q})", *controls])
        lines = [f"_spot = {names['spot']}({state}, {k})"]
        values = [f"{names['payoff']}({seen}, _spot, {q})"]
        if self._estimator == "path":
            values.append(f"{names['expected_payoff']}({seen}, _spot, {q})")
        return Given(lines, values)


_LEAST = f"_real({LEAST_VARIANCE})"


def _bridge_functions(names: Mapping[str, str], sizes: Sizes) -> str:
    """Functions of a path whose outer part is stepped, and beside it the price's own part.

    The state has three numbers more than that of the outer path: the own part, its variance, and how many steps are
    left. What is kept of the bridge stands behind what the product sees.
    """
    n, m, seen = sizes.outer, sizes.normals - 1, sizes.seen - sizes.kept
    return f"""@_njit(**_FAST)
def _bridge_start(contract, steps):
    _s = {names["start"]}(contract)
    return {_part("s", 0, n)} + (0.0, 0.0, float(steps))


@_njit(**_FAST)
def _bridge_begin(q):
    _a, _b = {names["begin"]}(q), {names["begin_bridge"]}(q)
    return {_part("a", 0, seen)} + {_part("b", 0, sizes.kept)}


@_njit(**_FAST)
def _bridge_step(_s, _z, k):
    _after = {names["step"]}({_part("s", 0, n)}, {_part("z", 0, m)}, k)
    left = _s[{n + 2}] - _real(1.0)
    _law = {names["along"]}(_after, left, k)
    own = _s[{n}] + math.sqrt(max(_law[1] - _s[{n + 1}], _real(0.0))) * _z[{m}]
    return {_part("after", 0, n)} + (own, _law[1], left)


@_njit(**_FAST)
def _bridge_look(_s, _a, date, k, q):
    _law = {names["along"]}({_part("s", 0, n)}, _s[{n + 2}], k)
    log_price = _law[0] + _s[{n}]
    _seen = {names["observe"]}({_part("a", 0, seen)}, _exp(log_price), date, q)
    _kept = {names["observe_bridge"]}({_part("a", seen, sizes.seen)}, log_price, max(_law[1], {_LEAST}), date, q)
    return {_part("seen", 0, seen)} + {_part("kept", 0, sizes.kept)}"""


def _part(name: str, start: int, stop: int) -> str:
    return tuple_text([f"_{name}[{i}]" for i in range(start, stop)])


def _tuple(name: str, count: int, index: str = "") -> str:
    return tuple_text([f"{name}{i}{index}" for i in range(count)])


def _unpacked(name: str, count: int, call: str) -> list[str]:
    return [f"_{name} = {call}", *(f"{name}{i} = _real(_{name}[{i}])" for i in range(count))]


def _stored(name: str, count: int, call: str) -> list[str]:
    return [f"_{name} = {call}", *(f"{name}{i}[lane] = _{name}[{i}]" for i in range(count))]


def _arrays(sizes: Sizes, real: str, tag: str) -> list[str]:
    return [f"{n}{tag}{i} = np.empty(lanes, dtype=np.{real})" for n, count in sizes.arrays for i in range(count)]


def _indented(lines: Iterable[str], depth: int) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _functions(precision: Precision) -> str:
    ours = [f"from smc.simulation.elementary import {name} as _{name}" for name in ("exp", "log")]
    return "\n".join([FUNCTIONS, *(ours if precision is Precision.float32 else ())])


def _version() -> str:
    """What a module that was compiled depends on, beside its own text."""
    ours = (Path(str(module.__file__)).read_bytes() for module in (elementary, lanes))
    return f"numba {numba.__version__}, {hashlib.sha256(b''.join(ours)).hexdigest()[:16]}"


# --- the module -------------------------------------------------------------------------------------------


def _loaded(text: str) -> Any:
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_folder() / f"walk_{digest}.py"
    keep(path, text.encode())
    spec = importlib.util.spec_from_file_location(f"_smc_walk_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    """Where compiled problems are kept: `SMC_CACHE_DIR`, or the user's cache, or a temporary folder."""
    if given := os.environ.get("SMC_CACHE_DIR"):
        return Path(given)
    with suppress(RuntimeError, OSError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectralmc"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir()) / f"spectralmc-{os.getuid()}"


def keep(path: Path, data: bytes) -> None:
    """Have a file with these bytes, written beside and renamed, in a folder of nobody else. Raises: ConfigError."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder} belongs to somebody else: set SMC_CACHE_DIR to a folder of your own")
        if not path.exists() or path.read_bytes() != data:
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(data)
            os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{folder}: {error}: set SMC_CACHE_DIR to a folder that can be written") from None


def _typed(
    walk: Any, precision: Precision, text: str, source: ScalarSource, *, pairs: bool
) -> Callable[..., None]:  # fmt: skip
    """Compile at once, for the arguments that `simulate` gives, so that an error names its line."""
    real = numba.float32 if precision is Precision.float32 else numba.float64
    whole, stream = numba.int64, numba.uint64
    points, plan = numba.uint32[:, ::1], numba.int64[:, ::1]
    count = 2 if pairs else 1
    tables, outs = (numba.float64[:, ::1],) * count, (real[:, :, ::1],) * count
    arguments = (*tables, stream, stream, whole, whole, whole, points, plan, real[:, ::1], *outs)
    try:
        walk.compile(arguments)
    except (numba.core.errors.NumbaError, AssertionError) as error:  # it asserts what it has not thought of
        raise numba_error(error, text, source) from None
    compiled: Callable[..., None] = walk
    return compiled


def numba_error(error: Exception, text: str, source: ScalarSource) -> ConfigError:
    """What Numba says of a module of ours, with the line of the user's own that it means."""
    lines = re.findall(r"walk_\w+\.py\"?(?:, line |:? ?\()(\d+)", str(error))
    origins = [origin for line in lines if (origin := source.origin(text, int(line))) is not None]
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = next((line for line in said if "pipeline" not in line), "")
    return ConfigError(f"{origins[-1] if origins else 'a scalar function'}, cannot be compiled: {why}")
