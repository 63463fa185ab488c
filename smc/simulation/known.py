"""What a scalar method says that is known before it is compiled: numbers, texts and conditions of settings."""

from __future__ import annotations

import ast
import operator
from typing import Any

from pydantic import BaseModel

__all__ = ["KnownBeforehand"]

# Arithmetic on whole numbers.
_WHOLE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


class KnownBeforehand:
    """Reads them off a tree: `owner` is what `self` stands for, `known` has what the names of the module stand for."""

    def __init__(self, known: dict[str, Any], owner: object | None) -> None:
        self._known, self._owner = known, owner
        self._self: str | None = None
        self._local: set[str] = set()

    def setting(self, node: ast.AST) -> Any:
        """What stands for a value that is known beforehand: a constant, a setting, or one of a tuple; else None."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id == self._self:
                return self._owner
            return None if node.id in self._local else self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            holder = self.setting(node.value) if self._self is not None else None
            return getattr(holder, node.attr, None) if isinstance(holder, BaseModel) else None
        if isinstance(node, ast.Subscript):
            several, number = self.setting(node.value), self.whole_number(node.slice)
            fits = isinstance(several, tuple) and number is not None and -len(several) <= number < len(several)
            return several[number] if fits else None
        return None

    def whole_number(self, node: ast.AST) -> int | None:
        """The value of arithmetic on whole numbers that are known beforehand; None if it is anything else."""
        value: object = None
        if isinstance(node, ast.BinOp) and type(node.op) in _WHOLE:
            left, right = self.whole_number(node.left), self.whole_number(node.right)
            if left is not None and right is not None:
                value = _WHOLE[type(node.op)](left, right)
        elif not isinstance(node, ast.BinOp):
            value = self.setting(node)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, node: ast.expr) -> str | None:
        """The text that is known beforehand; None if it is anything else."""
        value = self.setting(node)
        return value if isinstance(value, str) else None

    def decided(self, node: ast.expr) -> bool | None:
        """What a condition on settings alone says; None of any other."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.decided(node.operand)
            return None if inner is None else not inner
        value = self.setting(node)
        return value if isinstance(value, bool) else None
