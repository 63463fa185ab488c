"""The scalar methods of a process or a product as source text that Numba compiles, for a CPU or for a GPU.

A method of plain Python becomes a function without `self`: settings of the instance are constants in it, other methods
are functions beside it. Numbers of Python are in double precision, and one of them makes everything that it meets so:
in single precision each number that takes part in arithmetic is wrapped in `real`, which is `float32`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import textwrap
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

from smc.errors import ConfigError
from smc.problem.conditional import Estimator
from smc.problem.problem import Problem
from smc.simulation.known import KnownBeforehand

__all__ = ["FUNCTIONS", "ScalarSource", "scalar_methods"]

FUNCTIONS = "\n".join(
    f"_math_{name} = _{name} = math.{name}"
    for name, value in vars(math).items()
    if callable(value) and not name.startswith("_")
)
"""Text that gives the functions of `math` their names in scalar functions: `_exp`, in double precision `_math_exp`."""

_Number = int | float | bool


class ScalarSource:
    """Collects functions, each with all that it calls, under names that no two of them share.

    `narrow`: arithmetic is to be in the precision named `real`, not in double.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, str, bool], str] = {}
        self._texts: list[str] = []
        self._origins: dict[str, str] = {}
        self._own_lines: dict[str, list[int]] = {}
        self._kept: list[object] = []  # so that an id stays one object's

    @property
    def text(self) -> str:
        """The functions, callees first."""
        return "\n\n".join(self._texts)

    def origin(self, text: str, number: int) -> str | None:
        """Where line `number`, from 1, of a module that holds `text` comes from; None if from no scalar function."""
        lines = text.splitlines()[:number]
        start = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith("def ")), 0)
        name = lines[start].removeprefix("def ").partition("(")[0] if lines else ""
        if name not in self._origins:
            return None
        where, own = self._origins[name], self._own_lines[name]
        return f"{where}, line {own[min(number - 2 - start, len(own) - 1)] if number - 2 >= start else own[0]}"

    def method(self, owner: object, name: str, *, narrow: bool) -> str:
        """Take in a method of an instance; -> the function's name. Raises: ConfigError saying where and why not."""
        function = getattr(type(owner), name, None)
        if not isinstance(function, FunctionType):
            raise ConfigError(f"{type(owner).__name__}.{name} is no method written in Python")
        return self._add(function, owner, narrow)

    def _add(self, function: FunctionType, owner: object | None, narrow: bool) -> str:
        key = (id(owner), function.__qualname__, narrow)
        if key in self._names:
            return self._names[key]
        self._kept.append(owner)
        name = f"{function.__name__}_{len(self._names)}"
        self._names[key] = name
        definition, file, line = _definition(function)
        known = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        rewritten = _Rewriting(self, known, owner, narrow, (function.__qualname__, file, line))
        definition = rewritten.function(definition, name)
        self._texts.append(f"@_njit(**_FAST)\n{ast.unparse(definition)}")
        self._origins[name] = f"{function.__qualname__} in {file}"
        self._own_lines[name] = [line - 1 + number for body in definition.body for number in _lines_of(body)]
        return name


def _definition(function: FunctionType) -> tuple[ast.FunctionDef, str, int]:
    try:
        lines, line = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise ConfigError(
            f"{function.__qualname__} has no source: a scalar function has to stand in a file, and be no lambda"
        ) from None
    parsed = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(parsed, ast.FunctionDef):
        raise ConfigError(f"{function.__qualname__} is no plain function (line {line})")
    if parsed.name != function.__name__:
        file = function.__code__.co_filename
        raise ConfigError(
            f"{function.__qualname__}: {file} is not what was imported, it has changed since: start again"
        )
    return parsed, function.__code__.co_filename, line


def _lines_of(statement: ast.stmt) -> list[int]:
    """For each line of a statement as it is written out again, about where it was."""
    count = len(ast.unparse(statement).splitlines())
    inner = sorted(node.lineno for node in ast.walk(statement) if isinstance(node, ast.stmt))
    return [inner[min(i, len(inner) - 1)] for i in range(count)]


def scalar_methods(problem: Problem, estimator: Estimator = "payoff") -> tuple[ScalarSource, dict[str, str]]:
    """The scalar methods of a problem, and the name of each one's function; a product's coefficients are `terms`.

    `estimator`: of "outer" and "bridge" those of the outer path stand in the place of the process's own.
    """
    process, product, source = problem.process, problem.product, ScalarSource()
    outer = "outer_" if estimator in ("outer", "bridge") else ""
    narrow: dict[str, object] = {f"{outer}step": process, "begin": product, "payoff": product}
    if estimator == "outer":
        narrow |= {"given": process, "on_log_normal": product}
    elif estimator == "bridge":
        narrow |= {"given": process, "along": process}
        narrow |= dict.fromkeys(("begin_bridge", "observe_bridge", "on_bridge"), product)
    else:
        narrow["spot"] = process
    if estimator == "path":
        narrow["expected_payoff"] = product
    if product.continuous:
        narrow |= {"variation": process, "between": product}
    elif product.dates:
        narrow["observe"] = product
    names = {name.removeprefix(outer): source.method(owner, name, narrow=True) for name, owner in narrow.items()}
    names |= {name: source.method(process, outer + name, narrow=False) for name in ("coefficients", "start")}
    names["terms"] = source.method(product, "coefficients", narrow=False)
    return source, names


# Python builds a tuple written out with more than thirty elements as a list, which Numba cannot read.
_MOST_WRITTEN_OUT = 24


def tuple_text(elements: Sequence[str]) -> str:
    """A tuple of so many expressions, as text that Numba compiles however many they are."""
    pieces = [elements[at : at + _MOST_WRITTEN_OUT] for at in range(0, len(elements), _MOST_WRITTEN_OUT)] or [()]
    return "(" + " + ".join("(" + "".join(f"{one}, " for one in piece) + ")" for piece in pieces) + ")"


def _tuple(elements: list[ast.expr]) -> ast.expr:
    """The same, as a tree."""
    joined: ast.expr = ast.Tuple(elements[:_MOST_WRITTEN_OUT], ast.Load())
    for at in range(_MOST_WRITTEN_OUT, len(elements), _MOST_WRITTEN_OUT):
        joined = ast.BinOp(joined, ast.Add(), ast.Tuple(elements[at : at + _MOST_WRITTEN_OUT], ast.Load()))
    return joined


# What may be taken of `... for i in range(n)`.
_OF_MANY = ("tuple", "sum", "min", "max")


class _Numbered(ast.NodeTransformer):
    """Puts a number in the place of a name."""

    def __init__(self, name: str, number: int) -> None:
        self._name, self._number = name, number

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(self._number), node) if node.id == self._name else node


def _combined(how: str, elements: list[ast.expr]) -> ast.expr:
    if how == "tuple":
        return _tuple(elements)
    if how == "sum":
        total: ast.expr = elements[0] if elements else ast.Constant(0.0)
        for element in elements[1:]:
            total = ast.BinOp(total, ast.Add(), element)
        return total
    return ast.Call(ast.Name(how, ast.Load()), elements, [])


class _Rewriting(KnownBeforehand, ast.NodeTransformer):
    """One function's tree, rewritten."""

    def __init__(
        self,
        source: ScalarSource,
        known: dict[str, Any],
        owner: object | None,
        narrow: bool,
        where: tuple[str, str, int],
    ) -> None:
        super().__init__(known, owner)
        self._source, self._narrow, self._where = source, narrow, where

    def function(self, node: ast.FunctionDef, name: str) -> ast.FunctionDef:
        node = copy.deepcopy(node)
        arguments = node.args.args
        if self._owner is not None:
            self._self = arguments.pop(0).arg
        for argument in arguments:
            argument.annotation = None
        if node.args.vararg or node.args.kwarg or node.args.kwonlyargs or node.args.defaults:
            raise self._error(node, "it takes arguments by position only, without defaults")
        if isinstance(first := node.body[0], ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:] or [ast.Pass()]
        self._local = {a.arg for a in arguments} | {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        visited = [self.visit(statement) for statement in node.body]
        node.body = [one for part in visited for one in (part if isinstance(part, list) else [part])]
        node.name, node.decorator_list, node.returns = name, [], None
        return ast.fix_missing_locations(node)

    # --- names that stand for numbers or functions ---------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            return self._constant(node, getattr(self._owner, node.attr, None))
        if isinstance(node.value, ast.Name) and node.value.id not in self._local:
            holder = self._known.get(node.value.id)
            if isinstance(holder, ModuleType) and hasattr(holder, node.attr):
                return self._constant(node, getattr(holder, node.attr))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._local or not isinstance(node.ctx, ast.Load):
            return node
        if node.id == self._self:
            raise self._error(node, f"{node.id} stands alone: only its settings and methods can be used")
        if node.id in self._known:
            return self._constant(node, self._known[node.id])
        return node  # a builtin

    def visit_Call(self, node: ast.Call) -> ast.AST:
        callee = node.func
        if isinstance(callee, ast.Name) and callee.id in _OF_MANY and len(node.args) == 1:
            (many,) = node.args
            if isinstance(many, ast.GeneratorExp):
                return self.visit(ast.copy_location(_combined(callee.id, self._unrolled(many)), node))
        if isinstance(callee, ast.Name) and callee.id == "getattr" and len(node.args) == 2:
            name = self.text(node.args[1])
            if name is None:
                raise self._error(node, "the name must be known beforehand: a setting, or one of a tuple of names")
            return ast.copy_location(ast.Attribute(self.visit(node.args[0]), name, ast.Load()), node)
        holder = self._holder(node)
        if holder is not None:
            assert isinstance(callee, ast.Attribute)
            method = getattr(holder, callee.attr, None)
            if not isinstance(method, FunctionType):
                raise self._error(node, f"self.{callee.attr} is no method written in Python")
            name = self._source._add(method, self._owner, self._narrow)
            if isinstance(callee.value, ast.Name) and callee.value.id != self._self:
                node.args = node.args[1:]
            return self._called(node, ast.Name(name, ast.Load()))
        return self._called(node, self.visit(callee))

    def _unrolled(self, node: ast.GeneratorExp) -> list[ast.expr]:
        """The elements of `... for i in range(n)`, where n is known beforehand, each with its own i."""
        loop, inner = node.generators[0], node.generators[1:]
        counted = isinstance(loop.iter, ast.Call) and ast.unparse(loop.iter.func) == "range"
        if loop.ifs or not counted or not isinstance(loop.target, ast.Name):
            raise self._error(node, "a tuple, sum, min or max of many is taken over ranges, without conditions")
        assert isinstance(loop.iter, ast.Call)
        bounds = [self.whole_number(bound) for bound in loop.iter.args]
        if None in bounds:
            raise self._error(node, "the range must be known beforehand: of numbers and settings")
        numbers = range(*bounds)  # type: ignore[arg-type]
        element = ast.GeneratorExp(node.elt, inner) if inner else node.elt
        elements = [_Numbered(loop.target.id, i).visit(copy.deepcopy(element)) for i in numbers]
        return [one for part in elements for one in self._unrolled(part)] if inner else elements

    def _holder(self, node: ast.Call) -> object | None:
        """The class whose method is called: the owner's by `self.f()`, another by `super().f()` or `Class.f(self)`.

        It is None where a plain function is called.
        """
        if not isinstance(node.func, ast.Attribute) or self._self is None:
            return None
        value = node.func.value
        if isinstance(value, ast.Name):
            if value.id == self._self:
                return type(self._owner)
            known = self._known.get(value.id)
            of_self = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == self._self
            return known if isinstance(known, type) and isinstance(self._owner, known) and of_self else None
        if isinstance(value, ast.Call) and ast.unparse(value) == "super()":
            return super(self._known["__class__"], type(self._owner))
        return None

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        if not any(isinstance(element, ast.Starred) for element in node.elts):
            if len(node.elts) > _MOST_WRITTEN_OUT:
                return self.visit(ast.copy_location(_tuple(node.elts), node))
            return self.generic_visit(node)
        parts: list[ast.expr] = []  # tuples that are joined, one for each element with a star and each row without
        row: list[ast.expr] = []
        for element in [*node.elts, None]:
            if row and (element is None or isinstance(element, ast.Starred)):
                parts.append(_tuple(row))
                row = []
            if isinstance(element, ast.Starred):
                parts.append(element.value)
            elif element is not None:
                row.append(element)
        joined = parts[0]
        for part in parts[1:]:
            joined = ast.BinOp(joined, ast.Add(), part)
        return self.visit(ast.copy_location(joined, node))

    def _called(self, node: ast.Call, callee: ast.AST) -> ast.AST:
        if node.keywords:
            raise self._error(node, "scalar functions are called with arguments by position")
        counts = isinstance(callee, ast.Name) and callee.id in ("range", "len", "int")
        arguments: list[Any] = [self._counted(a) if counts else self._real(a) for a in node.args]
        return ast.copy_location(ast.Call(callee, arguments, []), node)  # type: ignore[arg-type]

    def _counted(self, node: ast.expr) -> ast.AST:
        number = self.whole_number(node)
        return self.visit(node) if number is None else ast.copy_location(ast.Constant(number), node)

    def _constant(self, node: ast.AST, value: Any) -> ast.AST:
        made: ast.AST
        if isinstance(value, bool | int | float):
            made = ast.Constant(value)
        elif isinstance(value, tuple) and all(isinstance(v, _Number) for v in value):
            made = _tuple([self._wrapped(ast.Constant(v)) for v in value])
        elif isinstance(value, FunctionType):
            made = ast.Name(self._source._add(value, None, self._narrow), ast.Load())
        elif getattr(math, getattr(value, "__name__", ""), None) is value and callable(value):
            made = ast.Name(f"_{value.__name__}" if self._narrow else f"_math_{value.__name__}", ast.Load())
        elif (isinstance(value, type) and value in (int, float, bool, range)) or value in (abs, min, max, len, round):
            return node
        else:
            raise self._error(node, f"it is a {type(value).__name__}, and only numbers and scalar functions can be")
        return ast.copy_location(made, node)

    # --- numbers in arithmetic ------------------------------------------------------------------------

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return self._wrapped(node) if isinstance(node.value, float) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        left = self._real(node.left)
        right = self.visit(node.right) if isinstance(node.op, ast.Pow) else self._real(node.right)
        if isinstance(node.op, ast.FloorDiv | ast.Mod):
            left, right = self.visit(node.left), self.visit(node.right)
        return ast.copy_location(ast.BinOp(left, node.op, right), node)  # type: ignore[arg-type]

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        parts = [self._real(part) for part in node.comparators]
        return ast.copy_location(ast.Compare(self._real(node.left), node.ops, parts), node)  # type: ignore[arg-type]

    def visit_If(self, node: ast.If) -> Any:
        decided = self.decided(node.test)
        if decided is None:
            return self.generic_visit(node)
        taken = [self.visit(statement) for statement in (node.body if decided else node.orelse)]
        return [one for part in taken for one in (part if isinstance(part, list) else [part])]

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        decided = self.decided(node.test)
        if decided is not None:
            return self._real(node.body if decided else node.orelse)
        body, otherwise = self._real(node.body), self._real(node.orelse)
        return ast.copy_location(ast.IfExp(self.visit(node.test), body, otherwise), node)  # type: ignore[arg-type]

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        value = self.setting(node)
        if isinstance(value, int | float):
            return self._constant(node, value)
        node.value = self.visit(node.value)
        number = self.whole_number(node.slice)
        if number is not None:  # of a tuple whose elements differ in kind, only a number written out is an index
            node.slice = ast.Constant(number)
        return node

    def _real(self, node: ast.AST) -> ast.AST:
        """A part of arithmetic: a number that stands in it is one of the precision."""
        visited = self.visit(node)
        if isinstance(visited, ast.Constant) and isinstance(visited.value, int | float):
            return visited if isinstance(visited.value, bool) else self._wrapped(visited)
        if isinstance(visited, ast.UnaryOp) and isinstance(visited.operand, ast.Constant):
            visited.operand = self._wrapped(visited.operand)
        return visited

    def _wrapped(self, node: ast.Constant) -> ast.expr:
        if not self._narrow or isinstance(node.value, bool):
            return node
        number = ast.Constant(float(str(node.value)))
        return ast.copy_location(ast.Call(ast.Name("_real", ast.Load()), [number], []), node)

    def _error(self, node: ast.AST, why: str) -> ConfigError:
        name, file, first = self._where
        line = first + getattr(node, "lineno", 1) - 1
        return ConfigError(f"{name} in {file}, line {line}, cannot be compiled: `{ast.unparse(node)}`: {why}")
