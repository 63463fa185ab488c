"""Calls from puts, where the logarithm of the price at expiry is normal.

It is as far above its median as below it with the same probability: in law S is median^2 / S, and a call pays
strike / S times what the put struck at median^2 / strike does.
Source: put-call symmetry, Carr and Bowie, "Static simplicity" (1994).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smc.problem.law import Law

__all__ = ["Reflection", "reflected_levels"]

# Of a call's level, in units of the discounted strike: below, it may well be none.
_LEAST_PAYOFF = 1e-4


class Reflection:
    """The distribution of a European call from that of a put with another strike."""

    def contracts(self, law: Law) -> Any:
        """The columns of the puts whose distributions give those of the calls. Shapes: -> (n,) each."""
        return law.c._replace(K=self._reflected(law))

    def levels(self, law: Law, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The calls' levels from those of `contracts`, and how far each may be off, as `valid_levels` takes it.

        Shapes: (n, N) -> two of (n, N).
        """
        strike, discount = law.c.K, law.discount
        call = reflected_levels(levels, strike, self._reflected(law), discount, law.deviation)
        # An error of the put's level is carried over by the square of the price there; nothing is known to be 0
        # better than where neither pays. From there on without a jump, or rounding would show.
        pays = call / (discount * strike)[:, None]
        return call, (1 + pays) ** 4 * pays / (pays + _LEAST_PAYOFF) + 1e-6

    def _reflected(self, law: Law) -> Tensor:
        return torch.exp(2 * law.log_median) / law.c.K


def reflected_levels(levels: Tensor, strike: Tensor, reflected: Tensor, discount: Tensor, deviation: Tensor) -> Tensor:
    """Levels of a call from those of the put struck at `reflected` = (median price at expiry)^2 / `strike`.

    The mean of 1 / S over a slice is that of S, inverted, times a factor that the slice has under the log-normal law of
    this standard deviation of the logarithm.
    Shapes: levels (n, N) of the discounted put, within its bounds; all others (n,) -> (n, N), ascending.
    """
    strike, reflected, discount, w = (values[:, None] for values in (strike, reflected, discount, deviation))
    size = levels.shape[1]
    # Slices of the put, lowest payoff and so highest price first.
    edges = torch.special.ndtri(torch.linspace(1, 0, size + 1, dtype=levels.dtype, device=levels.device))
    up, down = (torch.special.ndtr(edges - s * w).diff(dim=1).mul_(-size) for s in (1.0, -1.0))
    factor = up * down * torch.exp(w.square())
    price = torch.maximum(reflected - levels / discount, 1e-6 * reflected)
    pays = strike * (reflected / price - 1)
    # In a slice that is exercised throughout, the factor adds less than a quarter; where nothing or little of one is,
    # it must not add what is not there.
    call = pays + torch.minimum(strike * reflected / price * (factor - 1), pays / 4)
    return discount * call.cummax(dim=1).values
