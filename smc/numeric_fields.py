"""Fields of configurations that take numbers and nothing that could pass for one: no truth value, text or fraction."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

__all__ = ["RealNumber", "WholeNumber", "is_whole"]


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or of NumPy. `True` is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(value: Any) -> int:
    if not is_whole(value):
        raise ValueError(f"must be a whole number, not the {type(value).__name__} {value!r}")
    return int(value)


def _real(value: Any) -> float:
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise ValueError(f"must be a number, not the {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a number that a double can hold") from None


WholeNumber = Annotated[int, BeforeValidator(_whole)]
RealNumber = Annotated[float, BeforeValidator(_real)]
