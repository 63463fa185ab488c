"""What must hold of a pricer's answers for any contract, whatever it has learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from smc.prediction.evaluation import Measure, Predicts, evaluate
from smc.problem.schema import Schema
from smc.problem.sobol_sampler import SobolSampler

__all__ = ["Evaluated", "Soundness", "evaluated", "soundness"]

# Corners of a domain that are looked at, at most: of more fields than there are corners of, some.
_CORNERS = 4096
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
    """Over so many contracts of its domain, corners among them: no NaN, no bound broken, levels in order."""
    contracts = _contracts(pricer, count)
    law = pricer.problem.law(torch.from_numpy(contracts))
    limits, basis = pricer.problem.product.bounds(law), 1e4 / pricer.problem.product.notionals(law).numpy()
    price, levels = np.asarray(pricer.predict_price(contracts)), pricer.predict_distribution(contracts).host_levels
    slopes = pricer.predict_sensitivities(contracts)
    wrong = np.isnan(price).sum() + np.isnan(levels).sum() + sum(int(np.isnan(slope).sum()) for slope in slopes)
    beyond = np.maximum(limits.lower.numpy() - price, price - limits.upper.numpy()) * basis
    above = (levels.max(axis=1) - limits.payoff.numpy()) * basis
    return Soundness(
        count, int(wrong), max(0.0, float(beyond.max())), max(0.0, float(above.max()), float(-levels.min())),
        max(0.0, float(-np.diff(levels, axis=1).min())),
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """A pricer against its problem's reference, and what must hold of it."""

    measures: Mapping[str, Measure]
    soundness: Soundness


def evaluated(pricer: Predicts, contracts: int) -> Evaluated:
    """Every quantity over a sample of so many contracts of its domain, and what must hold."""
    sample = SobolSampler(pricer.domain, seed=_SEED, schema=pricer.problem.schema).sample(contracts)
    return Evaluated(evaluate(pricer, sample), soundness(pricer))


def _contracts(pricer: Predicts, count: int) -> np.ndarray:
    schema: Schema = pricer.problem.schema
    bounds = np.array([[pricer.domain[name].lower, pricer.domain[name].upper] for name in schema.names])
    generator = np.random.default_rng(1)
    if 2 ** len(schema) <= min(_CORNERS, count // 2):
        corners = np.array(np.meshgrid(*bounds)).reshape(len(schema), -1).T
    else:
        sides = generator.integers(0, 2, (min(_CORNERS, count // 2), len(schema)))
        corners = np.where(sides == 0, bounds[:, 0], bounds[:, 1])
    inside = generator.uniform(bounds[:, 0], bounds[:, 1], (count - len(corners), len(schema)))
    return np.concatenate([corners, inside])
