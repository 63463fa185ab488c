"""Processes and products of one's own, in a file that the caller names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from smc.errors import ConfigError

__all__ = ["load_models"]


def load_models(path: Path) -> ModuleType:
    """Run a Python file that registers processes and products, as the module of its name.

    It is run for whoever asks, and never because a checkpoint or a sweep names it. Raises: ConfigError if there is no
    such file, or it cannot be run.
    """
    path = path.resolve()
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if path.suffix != ".py" or not name.isidentifier() or known is not None:
        raise ConfigError(f"{path}: models are a Python file, whose name is a name of Python's and no module's already")
    if not path.is_file():
        raise ConfigError(f"there is no file of models {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    return module
