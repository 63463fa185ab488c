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
from smc.problem.problem import Problem
from smc.simulation import elementary, lanes
from smc.simulation.scalar import FUNCTIONS, ScalarSource, scalar_methods
from smc.simulation.sizes import Sizes, sizes_of

__all__ = ["cache_folder", "compiled_walk", "keep", "numba_error", "path_gives", "walk_source"]

_one_at_a_time = threading.Lock()
# Compiled code stays loaded as long as the process, so that to forget it would free nothing.
_walks: dict[tuple[Problem, Precision, bool, bool], Callable[..., None]] = {}

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
                for lane in range(width):
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
    problem: Problem, precision: Precision, *, pairs: bool = False, conditional: bool = False
) -> Callable[..., None]:
    """The loop for a problem, compiled once in a process; of `pairs` of contracts it takes two tables and two outputs.

    `conditional`: that over outer paths.
    Raises: ConfigError saying which line cannot be compiled.
    """
    with _one_at_a_time:
        key = (problem, precision, pairs, conditional)
        if key not in _walks:
            text, source = walk_source(problem, precision, conditional=conditional)
            walk = getattr(_loaded(text), "walk_pairs" if pairs else "walk")
            _walks[key] = _typed(walk, precision, text, source, pairs=pairs)
        return _walks[key]


# --- the text ---------------------------------------------------------------------------------------------


def walk_source(problem: Problem, precision: Precision, *, conditional: bool = False) -> tuple[str, ScalarSource]:
    """The module's text, and where its scalar functions come from."""
    source, call = scalar_methods(problem, conditional=conditional)
    sizes = sizes_of(problem, conditional=conditional)
    head = _TEMPLATE.format(
        name=problem.name,
        real=precision.value,
        version=_version(),
        functions=_functions(precision),
        fields=problem.schema.names,
        scalar=source.text,
    )
    pairs = _walk("walk_pairs", ("", "m"), problem, precision, call, sizes)
    return head + _walk("walk", ("",), problem, precision, call, sizes) + pairs, source


def _walk(
    function: str, tags: tuple[str, ...], problem: Problem, precision: Precision, call: Mapping[str, str], sizes: Sizes
) -> str:  # fmt: skip
    """The loop over contracts whose numbers have these tags, "" for the first, on the same normals."""
    product, real = problem.product, precision.value
    z = "(" + "".join(f"z[{sizes.normals} * at + {i}, lane], " for i in range(sizes.normals)) + ")"
    contract, start, step, observed, payoff = [], [], [], [], []
    for tag in tags:
        k, q = _tuple(f"k{tag}", sizes.process), _tuple(f"q{tag}", sizes.product)
        state, seen = _tuple(f"s{tag}", sizes.state, "[lane]"), _tuple(f"a{tag}", sizes.seen, "[lane]")
        columns = ", ".join(f"table{tag}[row, {i}]" for i in range(len(problem.schema)))
        contract += [
            f"contract = _Contract({columns})",
            *_unpacked(f"k{tag}", sizes.process, f"{call['coefficients']}(contract, contract.T / steps)"),
            *_unpacked(f"q{tag}", sizes.product, f"{call['terms']}(contract)"),
            *_unpacked(f"first_s{tag}", sizes.state, f"{call['start']}(contract)"),
            *_unpacked(f"first_a{tag}", sizes.seen, f"{call['begin']}({q})"),
        ]
        start += [f"{n}{tag}{i}[lane] = first_{n}{tag}{i}" for n, count in sizes.arrays for i in range(count)]
        step += _stored(f"s{tag}", sizes.state, f"{call['step']}({state}, {z}, {k})")
        given = {"state": state, "seen": seen, "k": k, "q": q}
        if product.dates:
            spot = f"{call['spot']}({state}, {k})"
            observed += _stored(f"a{tag}", sizes.seen, f"{call['observe']}({seen}, {spot}, date, {q})")
        drawn = [f"z[{sizes.normals} * steps + {i}, lane]" for i in range(sizes.extras)]
        found = path_gives(call, sizes, **given, drawn=drawn)
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
        step=_indented(step, 5),
        look=_LOOK + _indented(observed, 6) if observed else "",
        payoff=_indented(payoff, 4),
    )


@dataclass(frozen=True)
class Given:
    """Text that computes what a path gives: lines, and then an expression for each number."""

    lines: list[str]
    values: list[str]


def path_gives(
    call: Mapping[str, str], sizes: Sizes, *, state: str, seen: str, k: str, q: str, drawn: Sequence[str]
) -> Given:
    """The payoff of a path; of an outer path one of its price at expiry, its expected payoff, and the controls.

    `drawn` are the normals of expiry: the first draws the price, the others belong to the process.
    """
    if not drawn:
        return Given([], [f"{call['payoff']}({seen}, {call['spot']}({state}, {k}), {q})"])
    finals = "(" + "".join(f"{normal}, " for normal in drawn[1:]) + ")"
    lines = [
        f"_given = {call['given']}({state}, {finals}, {k})",
        f"_spot = _exp(_given[0] + math.sqrt(_given[1]) * {drawn[0]})",
    ]
    payoff, expected = f"{call['payoff']}({seen}, _spot, {q})", f"{call['on_log_normal']}(_given[0], _given[1], {q})"
    return Given(lines, [payoff, expected, *(f"_given[{i}]" for i in range(2, sizes.outputs))])


def _tuple(name: str, count: int, index: str = "") -> str:
    return "(" + "".join(f"{name}{i}{index}, " for i in range(count)) + ")"


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
    except numba.core.errors.NumbaError as error:
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
