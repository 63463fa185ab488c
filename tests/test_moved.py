"""Names that modules had in earlier versions."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from smc.moved import MOVED, go_on_working


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_same_module(old: str) -> None:
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])
    assert importlib.import_module(MOVED[old]).__spec__.name == MOVED[old]  # type: ignore[union-attr]


@pytest.mark.slow
def test_they_are_found_in_every_form_of_an_import() -> None:
    code = (
        "import smc.commits, smc.storage.report\n"
        "from smc import black_scholes, checkpoint, prediction\n"
        "from smc.checkpoint import Snapshot, decode, encode\n"
        "from smc.contracts import contract_array\n"
        "from smc.prediction import Predictor\n"
        "from smc.storage.history import runs_of\n"
        "import smc.storage.commits as now\n"
        "assert smc.commits is now\n"
        "assert checkpoint.encode is encode and prediction.Predictor is Predictor\n"
        "print(black_scholes.price([100, 105, 1, 0.03, 0.01, 0.25]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[11.50")


def test_what_never_was_is_still_not_there() -> None:
    go_on_working()
    assert sum(type(finder).__module__ == "smc.moved" for finder in sys.meta_path) == 1
    for name in ("smc.nothing", "smc.storage.nothing", "smc.contracts.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(ImportError):
        from smc.checkpoint import nothing  # noqa: F401
