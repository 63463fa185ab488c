"""Paths of any problem on a GPU: the scalar methods, linked into a kernel that is written in CUDA C++.

Numba compiles the methods to the linker's intermediate form, NVRTC the skeleton around them, and nvJitLink joins the
two and optimises across: pointers in and out become registers, and a problem runs at the speed of a kernel written by
hand. What was linked is kept in a file, as `smc.simulation.walk` keeps its modules.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from smc.errors import ConfigError
from smc.models.numerical import Precision
from smc.problem.conditional import Estimator, estimator_of
from smc.problem.problem import Problem
from smc.simulation.cuda import Kernel
from smc.simulation.normals import bridge_increments, expiry_last, sobol_points
from smc.simulation.scalar import FUNCTIONS, ScalarSource, scalar_methods, tuple_text
from smc.simulation.sizes import KernelSizes, Sampling, Sizes, sizes_of, time_grid
from smc.simulation.skeleton import MOST_ROWS, NORMALS_SOURCE, PATHS_SOURCE, sobol_normals
from smc.simulation.walk import Calls, cache_folder, keep, numba_error

__all__ = ["LinkedKernel", "link", "simulate", "simulate_pairs", "simulate_priced"]

# Normals that a GPU holds at a time where a walk needs them in memory: 1 GiB in single precision.
_NORMALS = 1 << 28

# Threads of a block that kernels are compiled for.
_FEW_THREADS, _MOST_THREADS = 256, 1024

_WRAPPERS = """import math
from collections import namedtuple

from numba import {real} as _real

{functions}
_Contract = namedtuple("_Contract", {fields!r})


{scalar}


def prepare(c, steps, s, a, k, q):
    contract = _Contract({columns})
{prepare}


def step_once(s, z, k):
{step}


def look(a, s, date, k, q):
{look}


def between(a, b, s, z, share, k, q):
{between}


def pays(a, s, e, k, q, out):
{payoff}
"""


class LinkedKernel(Kernel):
    """A kernel that was linked already. `name` is 'pseudorandom' or 'walk'."""

    def __init__(self, cubin: str, name: str) -> None:
        super().__init__("", name)
        self.cubin = cubin

    @cached_property
    def raw(self) -> Any:
        """CuPy's function."""
        import cupy

        return cupy.RawModule(path=self.cubin).get_function(self.name)


def simulate(problem: Problem, table: Tensor, first: Tensor, **sizes: Unpack[KernelSizes]) -> Tensor:
    """Discounted payoffs, row 0 being stream `first`, which is read where it is, as the contracts are.

    A CUDA graph that holds this call may be replayed on new ones. Shapes: (n, fields) float64 and () int64, on the
    device -> (n, paths). Units: currency. Raises: ConfigError as `smc.simulation.paths.simulate`, or for want of
    numba-cuda.
    """
    return _simulated(problem, [table], first, **sizes)[0][:, 0]


def simulate_pairs(
    problem: Problem, table: Tensor, moved: Tensor, first: Tensor, **sizes: Unpack[KernelSizes]
) -> tuple[Tensor, Tensor]:
    """As `simulate`, and what a second contract for each row pays on the same random numbers, in one kernel.

    Shapes: two of (n, fields) float64 and () int64, on the device -> two of (n, paths). Units: currency.
    """
    payoffs, beside = _simulated(problem, [table, moved], first, **sizes)
    return payoffs[:, 0], beside[:, 0]


def simulate_priced(
    problem: Problem, tables: Sequence[Tensor], first: Tensor, **sizes: Unpack[KernelSizes]
) -> list[Tensor]:  # fmt: skip
    """As `smc.simulation.paths.simulate_priced`. Shapes: as there, on the device."""
    return _simulated(problem, tables, first, estimator=estimator_of(problem), **sizes)


def _simulated(
    problem: Problem,
    tables: Sequence[Tensor],
    first: Tensor,
    *,
    seed: int,
    paths: int,
    steps: int,
    precision: Precision,
    sampling: Sampling,
    threads: int = 256,
    estimator: Estimator = "payoff",
) -> list[Tensor]:
    of_path = sizes_of(problem, estimator)
    steps, stride = time_grid(problem, steps, sampling, of_path)
    rows_in_all, device = len(tables[0]), tables[0].device
    shape = (rows_in_all, of_path.outputs, paths)
    outs = [torch.empty(shape, dtype=precision.torch, device=device) for _ in tables]
    grid = -(-paths // threads)
    sizes = (np.int32(paths), np.int32(steps), np.int32(stride))
    linked: dict[str, Any] = {
        "every_step": stride == 1,
        "tables": len(tables),
        "estimator": estimator,
        "threads": threads,
    }
    if sampling == "pseudorandom":
        kernel = link(problem, precision, "pseudorandom", device, **linked)
        for start in range(0, rows_in_all, MOST_ROWS):
            parts = [table[start : start + MOST_ROWS] for table in tables]
            given = (first, np.uint64(start), np.uint64(seed), *sizes)
            kernel((grid, len(parts[0])), threads, (*parts, *given, *(out[start:] for out in outs)))
        return outs
    own = of_path.normals * steps
    kernel = link(problem, precision, "walk", device, **linked)
    points, bridge = _sobol_constants((own, of_path.extras), paths, steps, precision, device)
    rows = min(MOST_ROWS, max(1, _NORMALS // points.numel()))
    for start in range(0, rows_in_all, rows):
        parts = [table[start : start + rows] for table in tables]
        count = len(parts[0])
        z = sobol_normals(points, first, start, count, seed=seed, threads=threads, precision=precision)
        # Without normals of expiry nothing is read there.
        at_expiry, apart = z.view(-1)[own * paths :], np.uint64(z.stride(0))
        z = z[:, :own].reshape(count, steps, of_path.normals * paths).contiguous()
        if steps > 1:
            z = bridge @ z
        kernel((grid, count), threads, (*parts, z, at_expiry, apart, *sizes, *(out[start:] for out in outs)))
    return outs


# None is ever let go of, nor is a linked kernel below: captured graphs read them, and do not keep them.
_constants: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _sobol_constants(
    width: tuple[int, int], paths: int, steps: int, precision: Precision, device: torch.device
) -> tuple[Tensor, Tensor]:
    key = (width, paths, steps, precision, device)
    if key not in _constants:
        coordinates = expiry_last(sobol_points(sum(width), paths), width[1])
        points = torch.from_numpy(coordinates.view(np.int32)).to(device)
        _constants[key] = points, torch.from_numpy(bridge_increments(steps)).to(device, precision.torch)
    return _constants[key]


# --- linking ----------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()
_linked: dict[tuple[Any, ...], LinkedKernel] = {}


def link(
    problem: Problem,
    precision: Precision,
    name: str,
    device: torch.device,
    *,
    every_step: bool,
    tables: int = 1,
    estimator: Estimator = "payoff",
    threads: int = 256,
) -> LinkedKernel:
    """A kernel for a problem, or for pairs of its contracts, linked once in a process. Raises: ConfigError.

    Blocks have at most `threads` threads. A kernel is compiled for as many as there can be, and again for fewer, which
    have more registers each, where it would keep numbers in memory.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with _one_at_a_time:
        key = (problem, precision, name, every_step, tables, estimator, threads <= _FEW_THREADS, major, minor)
        if key not in _linked:
            which = _Which(problem, precision, every_step, tables, estimator, _MOST_THREADS)
            kernel = LinkedKernel(_cubin(which, f"sm_{major}{minor}"), name)
            with torch.cuda.device(device):
                in_memory = kernel.raw.local_size_bytes
            if threads <= _FEW_THREADS and in_memory:
                kernel = LinkedKernel(_cubin(which._replace(threads=_FEW_THREADS), f"sm_{major}{minor}"), name)
            _linked[key] = kernel
        return _linked[key]


class _Which(NamedTuple):
    problem: Problem
    precision: Precision
    every_step: bool
    tables: int
    estimator: Estimator
    threads: int


def _cubin(which: _Which, arch: str) -> str:
    """The path of the file that has both kernels of a problem."""
    problem, precision, _, _, estimator, _ = which
    sizes = sizes_of(problem, estimator)
    skeleton = _defines(which, sizes) + NORMALS_SOURCE + PATHS_SOURCE
    wrappers, source = _wrappers(problem, sizes, precision, estimator)
    try:
        import numba_cuda
        from numba import cuda
    except ImportError as error:
        raise ConfigError(
            f"numba-cuda is not installed, which links a problem into its kernel: pip install 'spectralmc[cuda13]' or "
            f"'spectralmc[cuda12]' ({error})"
        ) from None
    version = f"{numba_cuda.__version__} {arch}"
    digest = hashlib.sha256("\n".join((version, skeleton, wrappers)).encode()).hexdigest()[:24]
    path = cache_folder() / f"paths_{digest}.cubin"
    if not path.exists():
        modules = [_compiled_skeleton(skeleton, arch), *_compiled_wrappers(cuda, wrappers, source, precision, arch)]
        keep(path, _joined(modules, arch))
    return os.fspath(path)


def _defines(which: _Which, sizes: Sizes) -> str:
    problem, precision = which.problem, which.precision
    normals, per_block = sizes.normals, 4 if precision is Precision.float32 else 2
    group = math.lcm(normals, per_block) // normals
    values = {
        "DOUBLE": int(precision is Precision.float64),
        "STATE": sizes.state,
        "SEEN": sizes.seen,
        "PROCESS": sizes.process,
        "PRODUCT": sizes.product,
        "FIELDS": len(problem.schema),
        "NORMALS": normals,
        "EXTRAS": sizes.extras,
        "OUTPUTS": sizes.outputs,
        "GROUP": group,
        "BLOCKS": group * normals // per_block,
        "DATES": int(problem.product.dates > 0 and not problem.product.continuous),
        "BETWEEN": int(problem.product.continuous),
        "EVERY_STEP": int(which.every_step),
        "TABLES": which.tables,
        "THREADS": which.threads,
    }
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def _wrappers(
    problem: Problem, sizes: Sizes, precision: Precision, estimator: Estimator
) -> tuple[str, ScalarSource]:  # fmt: skip
    source, names = scalar_methods(problem, estimator)
    call = Calls(names, sizes, estimator)

    def values(name: str, count: int) -> str:
        return tuple_text([f"{name}[{i}]" for i in range(count)])

    def stored(name: str, count: int, what: str) -> str:
        lines = [f"_{name} = {what}", *(f"{name}[{i}] = _real(_{name}[{i}])" for i in range(count))]
        return "\n".join("    " + line for line in lines)

    k, q, s, a = (
        values(name, count)
        for name, count in (("k", sizes.process), ("q", sizes.product), ("s", sizes.state), ("a", sizes.seen))
    )
    z, given = [f"z[{i}]" for i in range(sizes.normals)], {"state": s, "seen": a, "k": k, "q": q}
    gives = call.gives(**given, drawn=[f"e[{i}]" for i in range(sizes.extras)])
    product, nothing = problem.product, "    pass"
    lines = gives.lines + [f"out[{i}] = _real({value})" for i, value in enumerate(gives.values)]
    text = _WRAPPERS.format(
        real=precision.value,
        functions=FUNCTIONS,
        fields=problem.schema.names,
        scalar="\n\n".join([source.text, *call.functions]),
        columns=", ".join(f"c[{i}]" for i in range(len(problem.schema))),
        prepare="\n".join(
            (
                stored("k", sizes.process, call.coefficients),
                stored("q", sizes.product, call.terms),
                stored("s", sizes.state, call.start),
                stored("a", sizes.seen, call.begin(q)),
            )
        ),
        step=stored("s", sizes.state, call.step(s, z, k)),
        look=stored("a", sizes.seen, call.look(**given)) if product.dates and not product.continuous else nothing,
        between=stored("a", sizes.seen, call.between(z=z, before=values("b", sizes.state), **given))
        if product.continuous
        else nothing,
        payoff="\n".join("    " + line for line in lines),
    )
    return text, source


def _compiled_skeleton(text: str, arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, link_time_optimization=True, std="c++17")
    return bytes(Program(text, "c++", options).compile("ltoir").code)


def _compiled_wrappers(
    cuda: Any, text: str, source: ScalarSource, precision: Precision, arch: str
) -> list[bytes]:  # fmt: skip
    from numba import core, types

    real = types.float32 if precision is Precision.float32 else types.float64
    pointer, doubles = types.CPointer(real), types.CPointer(types.float64)
    signatures = {
        "prepare": types.void(doubles, types.int32, pointer, pointer, pointer, pointer),
        "step_once": types.void(pointer, pointer, pointer),
        "look": types.void(pointer, pointer, real, pointer, pointer),
        "between": types.void(pointer, pointer, pointer, pointer, real, pointer, pointer),
        "pays": types.void(pointer, pointer, pointer, pointer, pointer, pointer),
    }
    fast = precision is Precision.float32
    module: dict[str, Any] = {"_njit": lambda **options: cuda.jit(device=True, fastmath=fast), "_FAST": {}}
    capability = (int(arch[3:-1]), int(arch[-1]))
    try:
        exec(compile(text, "walk_gpu.py", "exec"), module)  # noqa: S102  our own text, of the caller's own methods
        return [
            cuda.compile(
                module[name],
                signature,
                device=True,
                abi="c",
                abi_info={"abi_name": name},
                output="ltoir",
                fastmath=fast,
                cc=capability,
            )[0]
            for name, signature in signatures.items()
        ]
    except (core.errors.NumbaError, AssertionError) as error:  # it asserts what it has not thought of
        raise numba_error(error, text, source) from None


def _joined(modules: list[bytes], arch: str) -> bytes:
    from cuda.bindings import nvjitlink

    options = [f"-arch={arch}", "-lto", "-ftz=1", "-prec-div=0", "-prec-sqrt=0", "-fma=1"]
    handle = nvjitlink.create(len(options), options)
    try:
        for number, data in enumerate(modules):
            nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, data, len(data), f"part {number}")
        try:
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise ConfigError(f"the kernel cannot be linked: {log.decode(errors='replace').strip() or error}") from None
        linked = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, linked)
        return bytes(linked)
    finally:
        nvjitlink.destroy(handle)
