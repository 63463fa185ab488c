"""A version of a ledger against its problem's reference on a fresh sample: a table, pictures, one HTML file.

    python -m jobs.evaluate --ledger my-bucket [--version v0000000042 | --experiment baseline] [--out evaluation]

Without a version it is the ledger's newest, or the experiment's. The contracts are drawn from the domain that the
version was trained on, with a seed that training does not use. What has no closed form is compared with a simulation,
which says its standard error. Where QuantLib is installed, European prices and Greeks are compared with QuantLib's too.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jobs.session import run_job, use_models
from smc.learning.pricer import GbmCVNNPricer
from smc.prediction.evaluation import Coverage, Measure, coverage, distance, evaluate, price_error
from smc.problem.contracts import columns
from smc.problem.oracles.quantlib import quantlib_values
from smc.problem.problem import EUROPEAN_PUT
from smc.problem.sobol_sampler import SobolSampler
from smc.reporting.command_line import add_models, replace_file, say
from smc.reporting.page import facts, figure, page, png, table
from smc.reporting.pictures import (
    draw_errors,
    draw_learning,
    draw_quantiles,
    draw_smile,
    draw_spectrum,
    in_words,
    typical,
)
from smc.storage import AsyncBlockchainModelStore, ModelVersion, load_snapshot_from_checkpoint

__all__ = ["main"]

Array = npt.NDArray[np.float64]

_LEGEND = (
    "Prices and distributions in basis points of each contract's {notional}; Greeks are those of what was learnt, "
    "{title}, per unit of spot, of volatility and of rate, and per year."
)
_COLUMNS = (
    "quantity", "unit", "RMSE", "of mean", "99 %", "maximum", "against QuantLib", "contracts", "compared with",
    "worst contract",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a version, and of the versions on the way to it."""

    ledger: str
    version: ModelVersion
    pricer: GbmCVNNPricer
    contracts: Array
    measures: Mapping[str, Measure]
    quantlib: Mapping[str, float]  # RMSE by name; empty where it is not installed
    history: Sequence[ModelVersion]
    curve: Sequence[tuple[int, float]]  # step and price RMSE of some of them
    coverage: Coverage | None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ledger", required=True, help="bucket or s3://bucket/prefix")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", help="a version, hash or alias (default: the newest)")
    which.add_argument("--experiment", help="the newest version of this experiment")
    parser.add_argument("--contracts", type=_at_least(64), default=8192, help="how many are drawn")
    parser.add_argument("--seed", type=_at_least(0), default=20_261_123, help="of the sample")
    parser.add_argument("--curve", type=int, default=12, help="versions loaded back for the learning curve, at most")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for report.html, PNGs and JSON")
    add_models(parser)
    options = parser.parse_args(arguments)

    async def run() -> int:
        use_models(options.models)
        async with AsyncBlockchainModelStore(options.ledger) as store:
            evaluation = await _evaluation(store, options)
        rows = _rows(evaluation)
        _print_table(rows)
        if evaluation.coverage is not None:
            print(evaluation.coverage.line)
        options.out.mkdir(parents=True, exist_ok=True)
        pictures = _pictures(evaluation)
        for name, (_, image) in pictures.items():
            replace_file(options.out / f"{name}.png", image)
        replace_file(options.out / "report.html", _page(evaluation, rows, pictures).encode())
        replace_file(options.out / "evaluation.json", json.dumps(_as_json(evaluation), indent=1).encode())
        print(f"\n{options.out / 'report.html'}, with its pictures and evaluation.json beside it")
        return 0

    return run_job(run)


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole


# --- what is measured -----------------------------------------------------------------------------


async def _evaluation(store: AsyncBlockchainModelStore, options: argparse.Namespace) -> Evaluation:
    reference = options.version or (f"head:{options.experiment}" if options.experiment else "head")
    catalog = await store.catalog()
    versions, version = catalog.versions, catalog.resolve(reference)
    pricer = GbmCVNNPricer(await load_snapshot_from_checkpoint(store, version))
    contracts = SobolSampler(pricer.domain, seed=options.seed, schema=pricer.problem.schema).sample(options.contracts)
    say(f"{version.version_id} of {store.uri}: {version.experiment}, step {version.step}, {version.commit_message}")
    print(f"{len(contracts):,} contracts of its domain, seed {options.seed}\n")
    measures = evaluate(pricer, contracts)
    history = [v for v in versions if v.experiment == version.experiment and v.counter <= version.counter]
    curve = []
    for i in sorted({*np.linspace(0, len(history) - 1, max(1, options.curve)).astype(int).tolist(), len(history) - 1}):
        earlier = history[i]
        if earlier is version:
            curve.append((version.step, measures["price"].rmse))
        elif options.curve > 1:
            then = GbmCVNNPricer(await load_snapshot_from_checkpoint(store, earlier))
            inside = SobolSampler(then.domain, seed=options.seed, schema=then.problem.schema).sample(options.contracts)
            curve.append((earlier.step, price_error(then, inside).rmse))
    known = importlib.util.find_spec("QuantLib") and pricer.problem == EUROPEAN_PUT
    quantlib = _against_quantlib(pricer, contracts) if known else {}
    held = coverage(pricer, contracts)
    return Evaluation(store.uri, version, pricer, contracts, measures, quantlib, history, curve, held)


def _against_quantlib(pricer: GbmCVNNPricer, contracts: Array) -> Mapping[str, float]:
    """RMSE of prices, in bp of spot, and of Greeks."""
    price, greeks = quantlib_values(contracts)
    errors = {"price": (np.asarray(pricer.predict_price(contracts)) - price) / columns(contracts).X0 * 1e4}
    learnt = pricer.predict_greeks(contracts)
    errors |= {n: ours - theirs for n, ours, theirs in zip(learnt._fields, learnt, greeks, strict=True)}
    return {name: Measure(name, "", values).rmse for name, values in errors.items()}


# --- what is shown --------------------------------------------------------------------------------


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for m in evaluation.measures.values():
        relative = "" if m.relative is None else f"{100 * m.relative:.3g} %"
        other = evaluation.quantlib.get(m.name)
        numbers = (
            f"{m.rmse:.4g}",
            relative,
            f"{m.p99:.4g}",
            f"{m.maximum:.4g}",
            "" if other is None else f"{other:.4g}",
        )
        worst = in_words(evaluation.contracts[m.worst], evaluation.pricer.problem)
        rows.append((m.name, m.unit, *numbers, f"{m.count:,}", m.compared, worst))
    return rows


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    shown = [row for row in zip(_COLUMNS, *rows, strict=True) if any(row[1:])]
    widths = [max(map(len, column)) for column in shown]
    for row in zip(*shown, strict=True):
        cells = [
            f"{c:<{w}}" if i in (0, 1, len(row) - 2, len(row) - 1) else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _pictures(evaluation: Evaluation) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG, by name."""
    pricer, contracts, measures = evaluation.pricer, evaluation.contracts, evaluation.measures
    pictures = {}
    problem = pricer.problem
    drawn = Figure(figsize=(12.5, 5), layout="constrained")
    shown = [name for name in ("price", "implied volatility", "delta") if name in measures][:2]
    for axes, name in zip(drawn.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        label = f"learnt minus {measures[name].known} {name}, {measures[name].unit}".removesuffix(", ")
        draw_errors(axes, contracts, measures[name].errors, label, problem)
    pictures["errors"] = (f"Where the errors lie: contracts of the sample, {problem.title}.", png(drawn))

    if "implied volatility" in measures and not problem.process.log_normal:
        drawn = Figure(figsize=(7, 5), layout="constrained")
        draw_smile(drawn.subplots(), pricer, typical(pricer))
        pictures["smile"] = ("Implied volatility over strike, learnt and exact, of one contract.", png(drawn))

    # From what is typical to the worst, by the distance of the whole distribution.
    ranks = distance(measures).ranks
    chosen = contracts[list(ranks.values())]
    levels = pricer.predict_distribution(chosen).host_levels
    for name, draw, caption in (
        ("quantiles", draw_quantiles, "Payoff distributions, as quantile functions"),
        ("spectrum", draw_spectrum, "The same as spectra, the training target"),
    ):
        drawn = Figure(figsize=(12.5, 9), layout="constrained")
        for axes, rank, contract, row in zip(drawn.subplots(2, 2).flat, ranks, chosen, levels, strict=True):
            draw(axes, contract, row, problem)
            axes.set_title(f"{rank} W2 error\n{axes.get_title()}", fontsize=9)
        pictures[name] = (f"{caption}: contracts by the rank of their W2 error.", png(drawn))

    drawn = Figure(figsize=(12.5, 4.5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    losses = [(v.step, v.loss) for v in evaluation.history if v.loss]
    draw_learning(left, [step for step, _ in losses], [loss for _, loss in losses], "loss of the step")
    steps, errors = zip(*evaluation.curve, strict=True)
    draw_learning(right, steps, errors, "price RMSE, bp of spot")
    pictures["learning"] = (
        f"The {len(evaluation.history)} versions of {evaluation.version.experiment!r} in the ledger up to this one: "
        f"their losses, and {len(evaluation.curve)} of them loaded back and measured.",
        png(drawn),
    )
    return pictures


def _page(evaluation: Evaluation, rows: Sequence[Sequence[str]], pictures: Mapping[str, tuple[str, bytes]]) -> str:
    version, pricer = evaluation.version, evaluation.pricer
    bounds = ((name, pricer.domain[name]) for name in pricer.problem.schema.names)
    domain = ", ".join(f"{name} {bound.lower:g} to {bound.upper:g}" for name, bound in bounds)
    about = {
        "ledger": evaluation.ledger,
        "message": version.commit_message,
        "committed": f"{version.timestamp:%Y-%m-%d %H:%M:%S} UTC",
        "checkpoint, SHA-256": version.content_hash,
        "entry, SHA-256": version.entry_hash,
        "problem": pricer.problem.title,
        "network": f"{sum(p.numel() for p in pricer.model.parameters()):,} real parameters",
        "domain": domain,
        "sample": f"{len(evaluation.contracts):,} contracts, scrambled Sobol",
    }
    legend = html.escape(_LEGEND.format(notional=pricer.problem.product.notional, title=pricer.problem.title))
    title = f"{version.version_id}: {version.experiment}, step {version.step}"
    styles = dict.fromkeys(_COLUMNS, "") | {"quantity": "text", "unit": "text", "worst contract": "text small"}
    figures = [figure(name, caption, image) for name, (caption, image) in pictures.items()]
    bars = "" if evaluation.coverage is None else f"<p>{html.escape(evaluation.coverage.line.capitalize())}.</p>"
    return page(title, facts(about), f"<h2>Learnt minus known</h2><p>{legend}</p>", table(styles, rows), bars, *figures)


def _as_json(evaluation: Evaluation) -> dict[str, object]:
    names = evaluation.pricer.problem.schema.names
    return {
        "ledger": evaluation.ledger,
        "version": evaluation.version.version_id,
        "content_hash": evaluation.version.content_hash,
        "problem": evaluation.pricer.problem.name,
        "contracts": len(evaluation.contracts),
        "measures": {
            m.name: {
                "unit": m.unit,
                "rmse": m.rmse,
                "p99": m.p99,
                "maximum": m.maximum,
                "of_mean": m.relative,
                "against_quantlib": evaluation.quantlib.get(m.name),
                "compared_with": m.reference,
                "standard_error": m.noise,
                "contracts": m.count,
                "worst": dict(zip(names, evaluation.contracts[m.worst].tolist(), strict=True)),
            }
            for m in evaluation.measures.values()
        },
        "error_bars": None if evaluation.coverage is None else asdict(evaluation.coverage),
        "curve": [{"step": step, "price_rmse": rmse} for step, rmse in evaluation.curve],
    }


if __name__ == "__main__":
    sys.exit(main())
