"""What a trained network says of a contract, and how good that is."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    # What was in this module when it was one file. It is imported when it is asked for, for it needs torch.
    module = import_module("smc.prediction.predictor")
    if name.startswith("__") or not hasattr(module, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
