"""The whole path on one machine: a sweep into a ledger, the ledger verified, its best model compared.

    make demo

Starts a development S3 server and a local Ray, trains the experiments of sweeps/demo.yaml, and shows what
came of it. Run again, it trains the same experiments further, in the same ledger.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jobs.recipes import read_sweep
from jobs.running import RunOptions
from jobs.session import run_job, use_models
from jobs.sweep import report, run_experiments
from smc.errors import ConfigError
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.distribution import PayoffDistribution
from smc.prediction.evaluation import distance, evaluate, price_error
from smc.prediction.reference import reference_of
from smc.problem.problem import EUROPEAN_PUT
from smc.problem.sobol_sampler import SobolSampler
from smc.reporting.command_line import add_models, replace_file, say
from smc.reporting.page import png
from smc.reporting.pictures import draw_errors, draw_quantiles, draw_smile, smile, typical
from smc.storage import AsyncBlockchainModelStore, ModelVersion, load_snapshot_from_checkpoint
from smc.storage.dev_server import DevServer

Array = npt.NDArray[np.float64]

_SHOWN = np.array(
    [
        # X0, K, T, r, d, v
        [100, 100, 1.0, 0.03, 0.01, 0.20],
        [100, 80, 0.5, 0.02, 0.00, 0.30],
        [100, 120, 0.5, 0.02, 0.00, 0.30],
        [70, 100, 1.5, 0.05, 0.02, 0.45],
        [140, 100, 2.0, 0.01, 0.03, 0.55],
        [100, 105, 0.1, 0.04, 0.00, 0.10],
    ]
)


# Of the smile that is printed, in years.
_EXPIRY = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(".smc"), help="data, credentials and the picture")
    parser.add_argument("--sweep", type=Path, default=Path("sweeps/demo.yaml"))
    add_models(parser)
    options = parser.parse_args(arguments)

    async def run() -> int:
        use_models(options.models)
        _, experiments = read_sweep(options.sweep)
        if not experiments:
            raise ConfigError(f"{options.sweep}: a search alone; the demo runs experiments, a grid or random draws")
        ledger = "s3://spectralmc/demo"
        started = time.perf_counter()
        with DevServer(options.dir / "s3") as server:
            print(f"S3 at {server.endpoint_url} (data in {options.dir / 's3'}), ledger {ledger}")
            os.environ.update(server.environment)
            status = report(await run_experiments(experiments, ledger, RunOptions(extend=True)))
            async with AsyncBlockchainModelStore(ledger) as store:
                status = max(status, await _show_ledger(store))
                best, pricers = await _best(store, [e.name for e in experiments])
            _show_prices(pricers[best.experiment])
            smiling = next((name for name, pricer in pricers.items() if _smiles(pricer)), None)
            if smiling is not None:
                _show_smile(smiling, pricers[smiling])
            picture = options.dir / "demo.png"
            _draw(pricers[best.experiment], best, picture, None if smiling is None else pricers[smiling])
            print(f"\nPicture: {picture}   ({time.perf_counter() - started:.0f} s in all)")
            print(f"The ledger stays: make s3, then . {options.dir}/s3/s3.env and python -m smc.storage --help")
        return status

    return run_job(run)


async def _show_ledger(store: AsyncBlockchainModelStore) -> int:
    verification = await store.verify(blobs=True)
    for key, reason in verification.problems:
        print(f"{key}: {reason}")
    print(
        f"\nLedger {'verified' if verification.ok else 'CORRUPT'}: {verification.versions} versions in "
        f"{verification.blocks} blocks, {verification.blobs} checkpoints hashed"
    )
    versions = await store.list_versions()
    for v in versions[-12:]:
        say(f"  {v.version_id}  {v.experiment:<12} {v.content_hash[:8]}  {v.commit_message}")
    return 0 if verification.ok else 1


async def _best(
    store: AsyncBlockchainModelStore, names: Sequence[str]
) -> tuple[ModelVersion, dict[str, GbmCVNNPricer]]:  # fmt: skip
    """Each experiment's newest version, loaded back and measured on fresh contracts; and which is the best."""
    newest = (await store.catalog()).heads
    seed = int.from_bytes(b"fresh")
    print("\nAgainst the closed form or a simulation, 4,096 fresh contracts, in bp of spot or of what is paid:")
    print(f"  {'experiment':<14}{'version':<13}{'price RMSE':>11}{'max':>8}{'W2':>8}{'CVaR97.5':>10}  compared with")
    errors, pricers = {}, {}
    for name in names:
        if name not in newest:
            continue
        pricer = GbmCVNNPricer(await load_snapshot_from_checkpoint(store, newest[name]))
        found = evaluate(pricer, SobolSampler(pricer.domain, seed=seed, schema=pricer.problem.schema).sample(4096))
        price, w2 = found["price"], distance(found)
        tail = next(measure for name, measure in found.items() if name.startswith("CVaR"))
        print(
            f"  {name:<14}{newest[name].version_id:<13}{price.rmse:>11.3f}{price.maximum:>8.2f}"
            f"{w2.rmse:>8.2f}{tail.rmse:>10.2f}  {price.compared}"
        )
        errors[name], pricers[name] = price.rmse, pricer
    if not errors:
        raise ConfigError("no experiment has a version: see the errors above")
    name = min(errors, key=lambda name: errors[name])
    print(f"  best: {name}, {newest[name].version_id}")
    return newest[name], pricers


def _shown(pricer: GbmCVNNPricer) -> Array:
    """Some contracts to look at."""
    if pricer.problem == EUROPEAN_PUT:
        return _SHOWN
    return SobolSampler(pricer.domain, seed=6, schema=pricer.problem.schema).sample(len(_SHOWN))


def _show_prices(pricer: GbmCVNNPricer) -> None:
    problem, contracts = pricer.problem, _shown(pricer)
    reference, oracle = reference_of(problem), reference_of(problem).oracle
    distribution = pricer.predict_distribution(contracts)
    price, levels = reference.price(contracts), reference.levels(contracts, distribution.levels.shape[1])
    columns = [("price", pricer.predict_price(contracts), price.values, price.noise)]
    if oracle is not None and oracle.greeks is not None:
        columns.append(("delta", pricer.predict_greeks(contracts).delta, oracle.greeks(contracts).delta, None))
    if oracle is not None and oracle.tail is not None:
        tail = oracle.tail(contracts, 0.975, oracle.kinds[0])
    else:
        tail = PayoffDistribution(levels.values).cvar(0.975)
    columns.append(("CVaR97.5", distribution.cvar(0.975), tail, levels.noise))
    print(f"\n{problem.title}")
    heads = "".join(f"{name:>12}{'exact' if noise is None else 'simulated':>11}" for name, _, _, noise in columns)
    print("".join(f"{name:>10}" for name in problem.schema.names) + heads)
    for row, contract in enumerate(contracts):
        cells = "".join(f"{learnt[row]:>12.4f}{known[row]:>11.4f}" for _, learnt, known, _ in columns)
        print("".join(f"{value:>10.4g}" for value in contract) + cells)


def _smiles(pricer: GbmCVNNPricer) -> bool:
    """Whether implied volatilities differ from strike to strike, and are known exactly."""
    oracle = reference_of(pricer.problem).oracle
    return oracle is not None and oracle.implied_volatility is not None and not pricer.problem.process.log_normal


def _show_smile(name: str, pricer: GbmCVNNPricer) -> None:
    contract, expiry = typical(pricer), _EXPIRY
    curve = smile(pricer, contract, expiry, 7)
    assert curve is not None
    print(f"\n{name}: implied volatility of {pricer.problem.title}, T = {expiry:g}, in %")
    for what, values, scale in (("strike", curve[0], 1), ("learnt", curve[1], 100), ("exact", curve[2], 100)):
        print(f"{what:>10}" + "".join(f"{scale * value:>10.2f}" for value in values))


def _draw(pricer: GbmCVNNPricer, version: ModelVersion, path: Path, smiling: GbmCVNNPricer | None) -> None:
    figure = Figure(figsize=(12.5 if smiling is None else 18, 5), layout="constrained")
    left, right, *more = figure.subplots(1, 2 if smiling is None else 3)
    if smiling is not None:
        draw_smile(more[0], smiling, typical(smiling))
        more[0].set_title(f"The smile of {smiling.problem.title}\n{more[0].get_title()}", fontsize=9)
    problem, one = pricer.problem, _shown(pricer)[:1]
    contracts = SobolSampler(pricer.domain, seed=7, schema=problem.schema).sample(8192)
    error = price_error(pricer, contracts)
    draw_errors(left, contracts, error.errors, f"learnt minus {error.known} price, {error.unit}", problem)
    left.set_title(f"Price error over the domain: RMSE {error.rmse:.2f} bp")
    draw_quantiles(right, one[0], pricer.predict_distribution(one).host_levels[0], problem)
    right.set_title(f"Payoff distribution of one contract\n{right.get_title()}", fontsize=10)
    figure.suptitle(
        f"{problem.title}: {version.experiment}, {version.version_id}, step {version.step}; "
        f"domain of {len(problem.schema)} parameters"
    )
    replace_file(path, png(figure))


if __name__ == "__main__":
    sys.exit(main())
