"""Pictures of what a pricer learnt, each drawn into axes that the caller arranges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from smc import black_scholes
from smc.contracts import FIELDS

__all__ = ["draw_errors", "draw_learning", "draw_quantiles", "draw_spectrum", "in_words"]

Array = npt.NDArray[np.float64]

_LEARNT, _EXACT = "tab:red", "black"


def draw_errors(axes: Axes, contracts: Array, errors: Array, label: str) -> None:
    """Errors over log forward moneyness and total volatility, colours saturated at the 99th percentile.

    Shapes: (n, 6), (n,); NaN is left out.
    """
    X0, K, T, r, d, v = contracts.T
    limit = float(np.nanquantile(np.abs(errors), 0.99)) or 1.0
    shown = ~np.isnan(errors)
    moneyness, w = np.log(X0 / K) + (r - d) * T, v * np.sqrt(T)
    points = axes.scatter(
        moneyness[shown], w[shown], c=errors[shown], s=5, cmap="RdBu", vmin=-limit, vmax=limit, rasterized=True
    )
    assert axes.figure is not None
    axes.figure.colorbar(points, ax=axes, label=label)
    axes.set(xlabel="log forward moneyness ln(F / K)", ylabel=r"total volatility $v\sqrt{T}$")


def draw_quantiles(axes: Axes, contract: Array, levels: Array) -> None:
    """Quantile function of one put's discounted payoff, learnt and exact. Shapes: (6,), (N,)."""
    u = (np.arange(len(levels)) + 0.5) / len(levels)
    axes.plot(u, black_scholes.payoff_quantile(contract[None], u)[0], color=_EXACT, lw=4, alpha=0.25, label="exact")
    axes.plot(u, levels, color=_LEARNT, lw=1.4, label="learnt")
    axes.axhline(black_scholes.price(contract[None])[0], color=_EXACT, lw=0.8, ls=":", label="price")
    axes.set(xlabel="probability", ylabel="discounted put payoff", xlim=(0, 1))
    axes.set_title(in_words(contract), fontsize=9)
    axes.legend(frameon=False)


def draw_spectrum(axes: Axes, contract: Array, levels: Array) -> None:
    """Magnitude of every bin of one put's spectrum, learnt and exact, and of the error. Shapes: (6,), (N,)."""
    exact = np.fft.rfft(black_scholes.payoff_bin_averages(contract[None], len(levels))[0], norm="forward")
    learnt = np.fft.rfft(levels, norm="forward")
    bins = np.arange(len(exact)) + 1  # bin 0 has a place on a logarithmic axis
    axes.loglog(bins, np.abs(exact), color=_EXACT, lw=4, alpha=0.25, label="exact")
    axes.loglog(bins, np.abs(learnt), color=_LEARNT, lw=1.2, label="learnt")
    axes.loglog(bins, np.abs(learnt - exact), color="tab:blue", lw=0.8, label="difference")
    axes.set(xlabel="bin + 1", ylabel="magnitude, currency")
    axes.set_title(in_words(contract), fontsize=9)
    axes.legend(frameon=False)


def draw_learning(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    """A quantity by training step, one point a version."""
    axes.semilogy(steps, values, color=_LEARNT, marker="o", ms=4, lw=1.2)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3, which="both")


def in_words(contract: Array) -> str:
    """The parameters of a contract, on a line. Shapes: (6,)."""
    return ", ".join(f"{name}={value:.4g}" for name, value in zip(FIELDS, contract, strict=True))
