"""Payoff samples <-> the quantile spectrum, and the distribution read back from it.

All M payoffs of a contract are sorted, consecutive runs of B = M / N are averaged (the quantile
function averaged over N equal slices of probability: its *levels*), and one real FFT of the levels,
divided by N, is the spectrum: N // 2 + 1 complex bins, bin 0 exactly the Monte Carlo price. By Parseval,
the bins' squared error (inner bins counted twice) is the squared Wasserstein-2 distance of the levels.

Source: Wasserstein distance as the L2 distance of quantile functions, Villani, "Topics in Optimal
Transportation" (2003), section 2.2.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch

from smc.errors import ConfigError
from smc.problem.reflection import reflected_levels
from smc.simulation.levels_cuda import MOST_PATHS, payoff_levels, payoff_levels_and_slopes, shortfall_levels

__all__ = [
    "bin_weights",
    "levels_from_spectrum",
    "payoff_spectrum",
    "payoff_spectrum_and_slope",
    "quantile_levels",
    "quantile_spectrum",
    "reflected_levels",
    "shortfall_spectrum",
    "shortfall_spectrum_and_slope",
    "valid_levels",
]

# Of the interval of shifts that may be needed: what is left is a 2^-32 of the payoff's range.
_HALVINGS = 32
# Of a number in single precision: the sign, and the bits of its magnitude.
_SIGN, _MAGNITUDE = -0x80000000, 0x7FFFFFFF


def quantile_levels(payoffs: torch.Tensor, network_size: int) -> torch.Tensor:
    """Sort and average: the quantile function over `network_size` equal slices.

    Shapes: (n, M), M a multiple of N -> (n, N), ascending.
    """
    n, samples = payoffs.shape
    _check_slices(samples, network_size)
    return _sorted(payoffs).view(n, network_size, -1).mean(dim=2)


def quantile_spectrum(payoffs: torch.Tensor, network_size: int) -> torch.Tensor:
    """The training target. Shapes: (n, M) -> complex (n, N // 2 + 1); bin 0 is the sample mean."""
    levels = quantile_levels(payoffs, network_size)
    if len(levels) == 1:
        # With several threads torch rounds a single row otherwise than the same row among others, and a target
        # must not depend on the batch it was simulated in.
        return torch.fft.rfft(levels.repeat(2, 1), norm="forward")[:1]
    return torch.fft.rfft(levels, norm="forward")


def payoff_spectrum(payoffs: torch.Tensor, scale: torch.Tensor, network_size: int) -> torch.Tensor:
    """Spectrum of scale x payoff. `payoffs` may be overwritten.

    Shapes: payoffs (n, M), none negative, scale (n,) -> complex (n, N // 2 + 1).
    """
    _check_slices(payoffs.shape[1], network_size)
    if payoffs.device.type == "cuda" and payoffs.shape[1] <= MOST_PATHS:
        return torch.fft.rfft(payoff_levels(payoffs, scale, network_size), norm="forward")
    return quantile_spectrum(payoffs.mul_(scale[:, None]), network_size)


def payoff_spectrum_and_slope(
    payoffs: torch.Tensor, slopes: torch.Tensor, scale: torch.Tensor, d_scale: torch.Tensor, network_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`payoff_spectrum`, and its derivative as `scale` moves by `d_scale` and each payoff by its slope.

    A slice keeps its probability as the payoffs move, so that the derivative of its mean is the mean of theirs.
    Payoffs and slopes may be overwritten.
    Shapes: payoffs and slopes (n, M), scale and d_scale (n,) -> two of complex (n, N // 2 + 1).
    """
    _check_slices(payoffs.shape[1], network_size)
    if payoffs.device.type == "cuda" and payoffs.shape[1] <= MOST_PATHS:
        levels = payoff_levels_and_slopes(payoffs, slopes, scale, d_scale, network_size)
        value, derivative = torch.fft.rfft(levels, norm="forward")
        return value, derivative
    levels = torch.stack(
        [part.view(len(payoffs), network_size, -1).mean(dim=2) for part in _sorted_with(payoffs, slopes)]
    )
    scaled = levels[0] * scale[:, None]
    motion = levels[0] * d_scale[:, None] + levels[1] * scale[:, None]
    value, derivative = torch.fft.rfft(torch.cat([scaled, motion]), norm="forward").chunk(2)
    return value, derivative


def shortfall_spectrum(
    terminal: torch.Tensor, ceiling: torch.Tensor, scale: torch.Tensor, network_size: int
) -> torch.Tensor:
    """Spectrum of the payoff scale x max(ceiling - terminal, 0). `terminal` may be overwritten.

    It is that of a payoff which falls as the price rises, so that prices are sorted and payoffs need not be.
    Shapes: terminal (n, M), none negative; ceiling and scale (n,) -> complex (n, N // 2 + 1).
    """
    _check_slices(terminal.shape[1], network_size)
    if terminal.device.type == "cuda" and terminal.shape[1] <= MOST_PATHS:
        levels = shortfall_levels(terminal, ceiling, scale, network_size)
        return torch.fft.rfft(levels[0], norm="forward")
    return quantile_spectrum((ceiling[:, None] - terminal).clamp_(min=0).mul_(scale[:, None]), network_size)


def shortfall_spectrum_and_slope(
    terminal: torch.Tensor,
    ceiling: torch.Tensor,
    scale: torch.Tensor,
    d_scale: torch.Tensor,
    d_log: tuple[torch.Tensor, torch.Tensor],
    network_size: int,
    *,
    normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`shortfall_spectrum`, and its derivative as `scale` moves by `d_scale`, ln S by a + b ln(S / ceiling).

    `d_log` are a and b. `normalized`: prices were rescaled to a mean, whose logarithm moves by a; then ln S moves by
    a and b times how far ln S is above its average under weights S.
    Shapes: terminal (n, M), all others (n,) -> two of complex (n, N // 2 + 1).
    """
    _check_slices(terminal.shape[1], network_size)
    a, b = d_log
    if terminal.device.type == "cuda" and terminal.shape[1] <= MOST_PATHS:
        motion = torch.stack([d_scale, a, b], dim=1)
        levels = shortfall_levels(terminal, ceiling, scale, network_size, motion, normalized=normalized)
        value, derivative = torch.fft.rfft(levels, norm="forward")
        return value, derivative
    ceiling, scale, d_scale, a, b = (values[:, None] for values in (ceiling, scale, d_scale, a, b))
    # Payoffs ascend where prices descend.
    ordered = _sorted(terminal).flip(1)
    payoff, log = (ceiling - ordered).clamp_(min=0), torch.log(ordered / ceiling)
    if normalized:
        a = a - b * (ordered * log).sum(dim=1, keepdim=True) / ordered.sum(dim=1, keepdim=True)
    slope = torch.where(payoff > 0, ordered * (a + b * log), 0.0)
    slope = payoff * d_scale - slope * scale
    levels = torch.stack([payoff * scale, slope]).view(2 * len(ceiling), network_size, -1).mean(dim=2)
    value, derivative = torch.fft.rfft(levels, norm="forward").chunk(2)
    return value, derivative


def levels_from_spectrum(spectrum: torch.Tensor, network_size: int) -> torch.Tensor:
    """Inverse of the transform. Shapes: complex (n, N // 2 + 1) -> (n, N)."""
    return torch.fft.irfft(spectrum, n=network_size, norm="forward")


def bin_weights(network_size: int) -> torch.Tensor:
    """How often each bin of the half spectrum counts in the full one. Shapes: -> (N // 2 + 1,)."""
    weights = torch.full((network_size // 2 + 1,), 2.0, dtype=torch.float64)
    weights[0] = 1
    if network_size % 2 == 0:
        weights[-1] = 1
    return weights


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    if rows.device.type == "cpu":  # NumPy's vectorised sort is five times torch's on one core
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values


def _sorted_with(rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in ascending order, and what belongs to each number; equal numbers stand in the order of the others."""
    if rows.dtype != torch.float32:
        by_others = others.argsort(dim=1, stable=True)
        order = by_others.gather(1, rows.gather(1, by_others).argsort(dim=1, stable=True))
        return rows.gather(1, order), others.gather(1, order)
    # Both in one whole number of 64 bits, the others below, so that one sort of numbers does it.
    keys = torch.empty((*rows.shape, 2), dtype=torch.int32, device=rows.device)
    keys[..., 0] = _ordered(others) ^ _SIGN
    keys[..., 1] = _ordered(rows)
    both = _sorted(keys.view(torch.int64)[..., 0]).view(torch.int32).view(*rows.shape, 2)
    return _ordered(both[..., 1]).view(torch.float32), _ordered(both[..., 0] ^ _SIGN).view(torch.float32)


def _ordered(numbers: torch.Tensor) -> torch.Tensor:
    """The bits of numbers as whole numbers in the same order, or back."""
    bits = numbers.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & _MAGNITUDE)


def _check_slices(samples: int, network_size: int) -> None:
    if samples % network_size:
        raise ConfigError(f"{samples} payoffs cannot be averaged into {network_size} equal slices")


def valid_levels(
    levels: torch.Tensor, price: torch.Tensor, upper: torch.Tensor, variances: torch.Tensor | None = None
) -> torch.Tensor:
    """The levels in order, shifted and held within the payoff's bounds, so that the price is their mean.

    Of all levels in the same order within the bounds and with this mean, these are the nearest in W2: the
    projection onto a box and a sum is one shift, clipped. To scale them instead would move the tail. Where some
    levels are known better than others, `variances` says how far each is shifted for one of 1.
    Shapes: (n, N), (n,), (n,) payoff maximum, which may be infinite, (n, N) positive -> (n, N).
    """
    size = levels.shape[1]
    ordered, upper = levels.sort(dim=1).values, upper[:, None]
    shift = torch.ones_like(upper) if variances is None else variances
    wanted = torch.minimum(price.clamp(min=0)[:, None], upper)
    # The mean after a shift rises with it, from 0 at `low` to the price or more at `high`: halve the interval.
    low = -(ordered / shift).amax(dim=1, keepdim=True)
    high = (wanted - ordered[:, :1]) / shift.mean(dim=1, keepdim=True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        moved = torch.minimum((ordered + middle * shift).clamp_(min=0), upper)
        above = moved.mean(dim=1, keepdim=True) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    held = torch.minimum((ordered + low * shift).clamp_(min=0), upper)
    if variances is not None:  # one shift for all keeps the order, several need not
        held = held.sort(dim=1).values
    # What halving left open goes to the levels that are free to move, in proportion to their room; no level need
    # more than double where the payoff has no bound.
    room = torch.minimum(upper, 2 * (held[:, -1:] + wanted)) - held
    missing = (wanted - held.mean(dim=1, keepdim=True)) * size
    total = room.sum(dim=1, keepdim=True)
    return torch.minimum(held + room * torch.where(total > 0, missing / total, 0.0).clamp_(min=0), upper)


def __getattr__(name: str) -> Any:
    # Where it was before; it stands above the simulation, and is imported when it is asked for.
    if name == "PayoffDistribution":
        return import_module("smc.prediction.distribution").PayoffDistribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
