"""Where modules of earlier versions are now, so that scripts which import them by their old names go on working.

An old name is the same module as the new one, not a copy of it: what is set on one is set on the other.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Final

__all__ = ["MOVED", "go_on_working"]

_BY_PACKAGE: Final[Mapping[str, Mapping[str, str]]] = {
    "smc.checkpoint": {
        "smc.pricer_config": "state", "smc.snapshots": "ring", "smc.tensor_file": "tensor_file",
        "smc.tensor_header": "tensor_header",
    },
    "smc.learning": {
        "smc.examples": "labels", "smc.experiment": "experiment", "smc.guarded": "guarded", "smc.modules": "modules",
        "smc.optimizer": "optimizer", "smc.replay": "replay", "smc.scaling": "scale", "smc.soap": "soap",
        "smc.training": "plan", "smc.training_step": "step",
    },
    "smc.prediction": {"smc.evaluation": "evaluation"},
    "smc.problem": {"smc.contracts": "contracts", "smc.sobol_sampler": "sobol_sampler"},
    "smc.problem.oracles": {"smc.black_scholes": "black_scholes"},
    "smc.reporting": {
        "smc.command_line": "command_line", "smc.page": "page", "smc.pictures": "pictures",
        "smc.storage.commands": "commands", "smc.storage.history": "history", "smc.storage.report": "report",
        "smc.storage.tensorboard": "ledger_tensorboard", "smc.tensorboard": "training_tensorboard",
    },
    "smc.simulation": {
        "smc.cuda": "cuda", "smc.gbm_cuda": "skeleton", "smc.normals": "normals", "smc.spectrum": "levels",
        "smc.spectrum_cuda": "levels_cuda",
    },
    "smc.storage": {"smc.commits": "commits", "smc.spool": "spool"},
}  # fmt: skip

MOVED: Final[Mapping[str, str]] = {
    old: f"{package}.{new}" for package, modules in _BY_PACKAGE.items() for old, new in modules.items()
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def go_on_working() -> None:
    """Let the old names be imported. Called again, it does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
