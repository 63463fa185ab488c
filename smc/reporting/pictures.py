"""Pictures of what a pricer learnt, each drawn into axes that the caller arranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smc.errors import ConfigError
from smc.prediction.reference import Known, reference_of
from smc.problem.problem import EUROPEAN_PUT, Problem
from smc.reporting.command_line import replace_file

if TYPE_CHECKING:
    from smc.prediction.evaluation import Predicts
    from smc.reporting.history import Run
    from smc.storage.chain import ModelVersion

__all__ = [
    "check_picture",
    "draw_errors",
    "draw_learning",
    "draw_quantiles",
    "draw_runs",
    "draw_smile",
    "draw_spectrum",
    "in_words",
    "plain",
    "save_lineage",
    "smile",
    "typical",
]

Array = npt.NDArray[np.float64]

# Of stochastic volatility on an equity index.
_AS_IN_MARKETS = {"v0": 0.04, "theta": 0.06, "rho": -0.7}
# Deviations from the forward to the lowest strike of a smile and to the highest, where the price of a put is hardly
# anything but intrinsic value.
_AROUND = (-2.0, 1.2)
_LEARNT, _EXACT = "tab:red", "black"


def draw_errors(axes: Axes, contracts: Array, errors: Array, label: str, problem: Problem = EUROPEAN_PUT) -> None:
    """Errors over moneyness and total volatility, colours saturated at the 99th percentile.

    A problem without a strike or a known volatility is drawn over its first two fields.
    Shapes: (n, fields), (n,); NaN is left out.
    """
    limit = float(np.nanquantile(np.abs(errors), 0.99)) or 1.0
    shown = ~np.isnan(errors)
    table = torch.from_numpy(contracts)
    law = problem.law(table)
    distances = problem.product.distances(law)
    if distances and law.known:
        places = distances[0].numpy(), law.deviation.numpy()
        names = "log forward moneyness ln(F / K)", r"total volatility $v\sqrt{T}$"
    else:
        places = contracts[:, 0], contracts[:, 1]
        names = tuple(f"{field.about} {plain(field.name)}" for field in problem.schema)[:2]  # type: ignore[assignment]
    points = axes.scatter(
        places[0][shown], places[1][shown], c=errors[shown], s=5, cmap="RdBu", vmin=-limit, vmax=limit, rasterized=True
    )
    assert axes.figure is not None
    axes.figure.colorbar(points, ax=axes, label=label)
    axes.set(xlabel=names[0], ylabel=names[1])


def draw_quantiles(axes: Axes, contract: Array, levels: Array, problem: Problem = EUROPEAN_PUT) -> None:
    """Quantile function of one contract's discounted payoff, learnt and as it is known. Shapes: (fields,), (N,)."""
    u = (np.arange(len(levels)) + 0.5) / len(levels)
    reference = reference_of(problem)
    known = reference.levels(contract[None], len(levels))
    axes.plot(u, known.values[0], color=_EXACT, lw=4, alpha=0.25, label=_short(known))
    axes.plot(u, levels, color=_LEARNT, lw=1.4, label="learnt")
    axes.axhline(reference.price(contract[None]).values[0], color=_EXACT, lw=0.8, ls=":", label="price")
    axes.set(xlabel="probability", ylabel=f"discounted payoff, {problem.product.title}", xlim=(0, 1))
    axes.set_title(in_words(contract, problem), fontsize=9)
    axes.legend(frameon=False)


def smile(
    predicts: Predicts, contract: Array, expiry: float, strikes: int
) -> tuple[Array, Array, Array] | None:  # fmt: skip
    """Implied volatility over strike, learnt and exact, of options like this contract that expire then.

    Strikes are around the forward and in the domain. None where no oracle tells implied volatilities.
    Shapes: (fields,) -> three of (strikes,). Units: currency, and per square root of a year.
    """
    problem, oracle = predicts.problem, reference_of(predicts.problem).oracle
    if oracle is None or oracle.implied_volatility is None:
        return None
    schema, bound = problem.schema, predicts.domain["K"]
    table = np.tile(contract, (strikes, 1))
    table[:, schema.column("T")] = expiry
    law = problem.law(torch.from_numpy(table[:1]))
    forward, width = float(law.forward), float(law.deviation)
    low, high = (float(np.clip(forward * np.exp(way * width), bound.lower, bound.upper)) for way in _AROUND)
    table[:, schema.column("K")] = np.linspace(low, high, strikes)
    learnt = oracle.implied_volatility(table, np.asarray(predicts.predict_price(table)))
    return table[:, schema.column("K")], learnt, oracle.implied_volatility(table, oracle.price(table))


def typical(predicts: Predicts) -> Array:
    """A contract in the middle of the domain, but with a correlation as markets have it. Shapes: -> (fields,)."""
    domain = predicts.domain
    middle = {name: (domain[name].lower + domain[name].upper) / 2 for name in predicts.problem.schema.names}
    for name, value in _AS_IN_MARKETS.items():
        if name in middle:
            middle[name] = float(np.clip(value, domain[name].lower, domain[name].upper))
    return np.array(list(middle.values()))


def draw_smile(axes: Axes, predicts: Predicts, contract: Array) -> None:
    """Implied volatility over strike for three expiries of the domain, learnt and exact. Shapes: (fields,)."""
    bound = predicts.domain["T"]
    for share, colour in ((0.1, "tab:green"), (0.4, "tab:blue"), (1.0, "tab:red")):
        expiry = bound.lower + share * (bound.upper - bound.lower)
        curve = smile(predicts, contract, expiry, 41)
        assert curve is not None
        strikes, learnt, exact = curve
        axes.plot(strikes, 100 * exact, color=colour, lw=4, alpha=0.25)
        axes.plot(strikes, 100 * learnt, color=colour, lw=1.2, label=f"T = {expiry:.2g}")
    axes.set(xlabel="strike", ylabel="implied volatility, %; exact as a broad line")
    named = zip(predicts.problem.schema.names, contract, strict=True)
    fixed = [f"{name}={value:.4g}" for name, value in named if name not in ("K", "T")]
    half = (len(fixed) + 1) // 2
    axes.set_title(", ".join(fixed[:half]) + "\n" + ", ".join(fixed[half:]), fontsize=8)
    axes.legend(frameon=False)


def draw_spectrum(axes: Axes, contract: Array, levels: Array, problem: Problem = EUROPEAN_PUT) -> None:
    """Magnitude of every bin of one contract's spectrum, learnt, known, and of the error. Shapes: (fields,), (N,)."""
    known = reference_of(problem).levels(contract[None], len(levels))
    exact = np.fft.rfft(known.values[0], norm="forward")
    learnt = np.fft.rfft(levels, norm="forward")
    bins = np.arange(len(exact)) + 1  # bin 0 has a place on a logarithmic axis
    axes.loglog(bins, np.abs(exact), color=_EXACT, lw=4, alpha=0.25, label=_short(known))
    axes.loglog(bins, np.abs(learnt), color=_LEARNT, lw=1.2, label="learnt")
    axes.loglog(bins, np.abs(learnt - exact), color="tab:blue", lw=0.8, label="difference")
    axes.set(xlabel="bin + 1", ylabel="magnitude, currency")
    axes.set_title(in_words(contract, problem), fontsize=9)
    axes.legend(frameon=False)


def _short(known: Known) -> str:
    return "exact" if known.noise is None else known.about


def draw_learning(
    axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, *, name: str | None = None
) -> None:
    """A quantity by training step, one point a version; of several experiments each has a colour and a name."""
    colour, label_of_line = (_LEARNT, None) if name is None else (None, plain(name))
    axes.semilogy(steps, values, color=colour, marker="o", ms=4 if name is None else 2.5, lw=1.2, label=label_of_line)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3, which="both")


def draw_runs(
    axes: Axes, runs: Sequence[Run], aliases: Mapping[str, ModelVersion], *, by: Literal["time", "version"]
) -> None:
    """Versions as dots, by when they were committed (a lane an experiment) or by their number (a lane a run).

    Lines lead from a version to the run that was resumed from it; aliases stand at the versions they name.
    """
    lanes: dict[str, int] = {}
    places: dict[int, tuple[Any, int]] = {}
    colours: dict[str, Any] = {}
    for number, run in enumerate(runs):
        lane = number if by == "version" else lanes.setdefault(run.experiment, len(lanes))
        at: list[Any] = [v.counter if by == "version" else v.timestamp for v in run.versions]
        places |= {v.counter: (x, lane) for v, x in zip(run.versions, at, strict=True)}
        (line,) = axes.plot(at, [lane] * len(at), marker="o", ms=4, lw=1.2, color=colours.get(run.experiment))
        colours[run.experiment] = line.get_color()
        if run.origin is not None and run.origin.counter in places and by == "version":
            x, origin = places[run.origin.counter]
            axes.annotate(
                "",
                (at[0], lane),
                (x, origin),
                arrowprops={"arrowstyle": "->", "color": "0.5", "connectionstyle": "arc3,rad=0.1"},
            )
    # Aliases of one version share a label; neighbours' stand at different heights.
    named: dict[int, list[str]] = {}
    for alias, version in aliases.items():
        if version.counter in places:
            named.setdefault(version.counter, []).append(alias)
    for row, (counter, names) in enumerate(sorted(named.items())):
        axes.annotate(
            ", ".join(names),
            places[counter],
            (0, 9 + 11 * (row % 2)),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "fc": "lightyellow", "ec": "0.6", "lw": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5},
        )
    labels = [run.experiment for run in runs] if by == "version" else list(lanes)
    axes.set_yticks(range(len(labels)), [plain(label or "(no experiment)") for label in labels], fontsize=8)
    axes.set(xlabel="version" if by == "version" else "committed (UTC)", ylim=(len(labels) - 0.4, -0.9))
    axes.grid(axis="x", alpha=0.3)


def check_picture(path: Path) -> None:
    """Raises: ConfigError if the file's name says no format of a picture."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: a picture is a .png, .svg or .pdf")


def save_lineage(path: Path, runs: Sequence[Run], aliases: Mapping[str, ModelVersion]) -> None:
    """A picture of what was resumed from what, in the format that the file's name says. Raises: ConfigError."""
    check_picture(path)
    figure = Figure(figsize=(12.5, 1.6 + 0.3 * len(runs)), layout="constrained")
    draw_runs(figure.subplots(), runs, aliases, by="version")
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=110)
    replace_file(path, drawn.getvalue())


def plain(text: str) -> str:
    """A name as a label: matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def in_words(contract: Array, problem: Problem = EUROPEAN_PUT) -> str:
    """The parameters of a contract, on a line. Shapes: (fields,)."""
    return ", ".join(f"{name}={value:.4g}" for name, value in zip(problem.schema.names, contract, strict=True))
