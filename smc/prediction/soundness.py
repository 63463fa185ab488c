"""What must hold of a pricer's answers for any contract, whatever it has learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from smc.prediction.evaluation import Coverage, Measure, Predicts, coverage, evaluate
from smc.problem.schema import Schema
from smc.problem.sobol_sampler import SobolSampler

__all__ = ["Evaluated", "Soundness", "evaluated", "soundness"]

# What a bound may be broken by, in basis points: rounding.
_ROUNDING = 1e-6
# Of the sample that what was learnt is compared on.
_SEED = 20_261_123


@dataclass(frozen=True)
class Soundness:
    """How many numbers were none; how far prices and levels lay beyond bounds, in basis points; how levels fell.

    `disorder` is the most that a level was below the one before it, in currency.
    """

    contracts: int
    wrong: int
    price_beyond: float
    level_beyond: float
    disorder: float

    @property
    def holds(self) -> bool:
        """Whether all is as it must be."""
        beyond = max(self.price_beyond, self.level_beyond)
        return self.wrong == 0 and beyond <= _ROUNDING and self.disorder <= 0


def soundness(pricer: Predicts, count: int = 20_000) -> Soundness:
    """Over so many contracts of its domain, corners among them: all numbers finite, no bound broken, levels in order.

    Every corner is looked at, if they are no more than half of the contracts. What follows by parity and reflection is
    looked at, too.
    """
    contracts = _contracts(pricer, count)
    law = pricer.problem.law(torch.from_numpy(contracts))
    limits, basis = pricer.problem.product.bounds(law), 1e4 / pricer.problem.product.notionals(law).numpy()
    slopes = pricer.predict_sensitivities(contracts)
    wrong, beyond, outside, disorder = sum(int((~np.isfinite(slope)).sum()) for slope in slopes), 0.0, 0.0, 0.0
    for kind in pricer.distribution_kinds:
        price = np.asarray(pricer.predict_price(contracts, kind))
        levels = pricer.predict_distribution(contracts, kind).host_levels
        wrong += sum(int((~np.isfinite(values)).sum()) for values in (price, levels))
        with np.errstate(invalid="ignore"):  # what is endless has been counted
            if kind == pricer.distribution_kinds[0]:  # what was learnt
                beyond = float((np.maximum(limits.lower.numpy() - price, price - limits.upper.numpy()) * basis).max())
                outside = float(((levels.max(axis=1) - limits.payoff.numpy()) * basis).max())
            outside = max(outside, float((-levels.min(axis=1) * basis).max()))
            disorder = max(disorder, float(-np.diff(levels, axis=1).min()))
    return Soundness(count, wrong, max(0.0, beyond), max(0.0, outside), max(0.0, disorder))


@dataclass(frozen=True)
class Evaluated:
    """A pricer against its problem's reference, and what must hold of it."""

    measures: Mapping[str, Measure]
    soundness: Soundness
    coverage: Coverage | None = None


def evaluated(pricer: Predicts, contracts: int) -> Evaluated:
    """Every quantity over a sample of so many contracts of its domain, and what must hold."""
    sample = SobolSampler(pricer.domain, seed=_SEED, schema=pricer.problem.schema).sample(contracts)
    return Evaluated(evaluate(pricer, sample), soundness(pricer), coverage(pricer, sample))


def _contracts(pricer: Predicts, count: int) -> np.ndarray:
    schema: Schema = pricer.problem.schema
    bounds = np.array([[pricer.domain[name].lower, pricer.domain[name].upper] for name in schema.names])
    generator = np.random.default_rng(1)
    if 2 ** len(schema) <= count // 2:
        corners = np.array(np.meshgrid(*bounds)).reshape(len(schema), -1).T
    else:
        sides = generator.integers(0, 2, (count // 2, len(schema)))
        corners = np.where(sides == 0, bounds[:, 0], bounds[:, 1])
    inside = generator.uniform(bounds[:, 0], bounds[:, 1], (count - len(corners), len(schema)))
    return np.concatenate([corners, inside])
