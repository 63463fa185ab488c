from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs import evaluate
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction import evaluation
from smc.problem.oracles import black_scholes
from smc.problem.oracles.quantlib import quantlib_values
from smc.problem.sobol_sampler import SobolSampler
from smc.storage import AsyncBlockchainModelStore
from smc.storage.chain import blob_key
from tests.conftest import small_config, small_training


@pytest.fixture
def pricer(on_seaweed: str) -> GbmCVNNPricer:
    """Committed three times to the ledger of `on_seaweed`, the last time as it is; a sketch follows it."""
    store = AsyncBlockchainModelStore(on_seaweed)
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(30), blockchain_store=store, auto_commit=True, commit_interval=10, experiment="main")
    sketch = GbmCVNNPricer(small_config(mc_seed=9))
    sketch.train(small_training(2), blockchain_store=store, auto_commit=True, experiment="sketch")
    return pricer


def run(ledger: str, out: Path, *arguments: str) -> int:
    return evaluate.main(["--ledger", ledger, "--out", str(out), "--contracts", "512", "--seed", "3", *arguments])


def test_a_version_is_measured_and_shown(
    pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(on_seaweed, tmp_path, "--experiment", "main") == 0
    contracts = SobolSampler({}, seed=3).sample(512)
    wanted = evaluation.evaluate(pricer, contracts)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["version"] == "v0000000002"
    for name, measure in wanted.items():
        row = found["measures"][name]
        assert row["rmse"] == measure.rmse
        assert list(row["worst"].values()) == contracts[measure.worst].tolist()
    assert [point["step"] for point in found["curve"]] == [10, 20, 30]
    assert found["curve"][-1]["price_rmse"] == wanted["price"].rmse
    # QuantLib is an oracle of its own, and agrees with ours.
    for name in ("price", "delta", "gamma", "vega", "theta", "rho"):
        assert found["measures"][name]["against_quantlib"] == pytest.approx(wanted[name].rmse, rel=1e-6)

    out = capsys.readouterr().out
    (price,) = (line for line in out.splitlines() if line.startswith("price "))
    assert f" {wanted['price'].rmse:.4g} " in price
    assert f"X0={contracts[wanted['price'].worst, 0]:.4g}" in price


def test_the_report_is_one_file_that_needs_no_other(pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path) -> None:
    assert run(on_seaweed, tmp_path, "--version", "v0000000001") == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "v0000000001: main, step 20" in page
    assert page.count("<tr>") == 1 + len(json.loads((tmp_path / "evaluation.json").read_text())["measures"])
    for name in ("errors", "quantiles", "spectrum", "learning"):
        png = (tmp_path / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 20_000


def test_without_a_version_it_is_the_newest(
    pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(on_seaweed, tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"v0000000003 of {on_seaweed}: sketch, step 2")


def test_bad_input_is_one_line_and_status_2(
    pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ledger, arguments, message in (
        (on_seaweed, ["--version", "v0000000009"], "has no version v0000000009: its newest is v0000000003"),
        (on_seaweed, ["--experiment", "mian"], "there is no experiment 'mian': there are main, sketch"),
        (on_seaweed + "-empty", [], "the ledger is empty"),
        ("s3://no-such-bucket-here", [], "bucket 'no-such-bucket-here' does not exist"),
    ):
        assert run(ledger, tmp_path, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_status_1(
    pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def damage() -> None:
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            key = blob_key((await store.get_version("v0000000002")).content_hash)
            data = bytearray(await store.objects.get(key))
            data[-1] ^= 1
            await store.objects.put(key, bytes(data))

    asyncio.run(damage())
    assert run(on_seaweed, tmp_path, "--version", "v0000000002") == 1
    assert "v0000000002" in capsys.readouterr().err


def test_it_works_without_quantlib(pricer: GbmCVNNPricer, on_seaweed: str, tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'QuantLib' else find(name, *rest)\n"
        f"from tests.test_jobs.test_evaluate import run; from pathlib import Path\n"
        f"sys.exit(run({on_seaweed!r}, Path({str(tmp_path)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "QuantLib" not in done.stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["measures"]["price"]["against_quantlib"] is None


def test_the_closed_form_is_that_of_quantlib() -> None:
    contracts = SobolSampler({}, seed=8).sample(512)
    price, greeks = quantlib_values(contracts)
    np.testing.assert_allclose(black_scholes.price(contracts), price, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(black_scholes.greeks(contracts), greeks, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
