"""When to exercise: a policy over a whole domain of contracts, as numbers that a product holds and a path reads.

A policy says how much more it is worth to wait than to exercise: at least what is certain to be had by waiting, for a
date or to the end, and more by a small network of a few ratios of prices on a
date, of the dates that are left, and of the contract's own numbers: one layer of hidden units z / (1 + |z|). A policy
need not be the best one: applied to paths that it was not learned on it gives a price that is at most the option's.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictBool, model_validator

from smc.numeric_fields import RealNumber

__all__ = ["Policy"]

Numbers = tuple[RealNumber, ...]


class Policy(BaseModel):
    """Weights of the network, and what its inputs are divided by.

    `fields` are numbers of the contract, by their logarithm where `logarithms` says so, less `centres` and over
    `spreads`. Ratios of prices enter as logarithms over exp(scale), a quadratic function of these: about their
    deviation; `growth` is one of the yearly growth of what is exercised. Shapes, of f fields, u hidden units and p
    ratios: scale and growth (1 + 2 f,), of_ratios (u p,), of_time (u,), of_fields (u f,), biases (u,), output (u + 1,).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fields: tuple[str, ...]
    logarithms: tuple[StrictBool, ...]
    centres: Numbers
    spreads: Numbers
    scale: Numbers
    growth: Numbers
    of_ratios: Numbers
    of_time: Numbers
    of_fields: Numbers
    biases: Numbers
    output: Numbers

    @model_validator(mode="after")
    def _shapes_fit(self) -> Policy:
        f, u = len(self.fields), len(self.biases)
        counts = {
            "logarithms": f, "centres": f, "spreads": f, "scale": 1 + 2 * f, "growth": 1 + 2 * f, "of_time": u,
            "of_fields": u * f, "output": u + 1,
        }  # fmt: skip
        for name, count in counts.items():
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"of {f} fields and {u} units {name} has {count} numbers, got {len(getattr(self, name))}"
                )
        if u == 0 or not self.of_ratios or len(self.of_ratios) % u:
            raise ValueError(f"of_ratios has a number for each of {u} units and each ratio, got {len(self.of_ratios)}")
        return self

    @property
    def units(self) -> int:
        """How many hidden units there are."""
        return len(self.biases)
