"""How far off an answer is likely to be: error bars from contracts that were held back from training.

Held-back contracts are simulated with many more paths than labels are. How much the network's price is off there is a
sample of its error, whose size is explained by what the network sees of a contract; the factor between explained sizes
and an interval that holds 95 of 100 errors is taken from contracts that the explanation was not fitted on. So an
interval is right on average over the domain whatever the error looks like, as long as contracts are drawn as they were.

Source: conformal prediction with a local scale, Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, "Distribution-free
predictive inference for regression" (Journal of the American Statistical Association, 2018), section 5.2; the folds,
Barber, Candes, Ramdas and Tibshirani, "Predictive inference with the jackknife+" (Annals of Statistics, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["LEVEL", "ErrorBars"]

LEVEL: Final = 0.95
"""The share of contracts whose exact price lies within their error bars."""

_FOLDS = 8
# Of the sum of squares that explains the logarithm of an error, for each unit of a coefficient: contracts are few.
_RIDGE = 4.0
# Errors that count as this share of the median one at least, because the logarithm of a lucky one says nothing.
_LEAST_ERROR = 0.05
# What is left of a factor at least when the noise of the simulation is taken off it.
_LEAST_LEFT = 0.3


@dataclass(frozen=True)
class ErrorBars:
    """The size of the error as a function of what the network sees of a contract.

    Shapes: centre and spread (features,); coefficients (1 + 2 features,), of 1, the standardised features and their
    squares, for the logarithm of the half-width in units of `Product.unit`. In double precision, on any device.
    """

    centre: Tensor
    spread: Tensor
    coefficients: Tensor

    @classmethod
    def of(cls, features: Tensor, errors: Tensor, noise: Tensor) -> ErrorBars:
        """Fitted on held-back contracts.

        Shapes: features (n, f); errors (n,), the simulated price less the network's, noise (n,), one estimate of the
        standard error of the simulated price, both in units of `Product.unit`.
        """
        features, size = features.double().cpu(), errors.double().cpu().abs()
        size = size.clamp(min=max(_LEAST_ERROR * float(size.median()), torch.finfo(torch.float64).tiny))
        bars = cls(features.mean(dim=0), features.std(dim=0).clamp(min=1e-12), torch.zeros(1, dtype=torch.float64))
        design, fold = bars._design(features), torch.arange(len(size)) % _FOLDS
        explained = torch.empty_like(size)
        for held in range(_FOLDS):
            rest = fold != held
            explained[~rest] = design[~rest] @ _ridge(design[rest], size[rest].log())
        ratios = size / explained.exp()
        rank = min(len(size) - 1, int(LEVEL * (len(size) + 1)))  # of n + 1 exchangeable ones, counted from 0
        factor = ratios.sort().values[rank]
        # A simulated price is off, too: what that adds to the ratios that an interval holds is taken off again.
        within = ratios <= factor
        added = (noise.double().cpu() / explained.exp())[within].square().sum() / ratios[within].square().sum()
        factor = factor * (1 - added).clamp(min=_LEAST_LEFT**2).sqrt()
        coefficients = _ridge(design, size.log())
        coefficients[0] += factor.log()
        return cls(bars.centre, bars.spread, coefficients)

    def to(self, device: torch.device) -> ErrorBars:
        """The same on another device."""
        return ErrorBars(*(part.to(device) for part in vars(self).values()))

    def half_width(self, features: Tensor) -> Tensor:
        """Of the interval around a price, in units of `Product.unit`. Shapes: (n, features) -> (n,)."""
        return (self._design(features.double()) @ self.coefficients).exp()

    @classmethod
    def unknown(cls, features: int, device: torch.device) -> ErrorBars:
        """Those of a network that is still being trained: NaN, in the place of what will be measured."""
        return cls(
            *(
                torch.full(shape, torch.nan, dtype=torch.float64, device=device)
                for shape in cls.shapes(features).values()
            )
        )

    @staticmethod
    def shapes(features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name, of a network that sees so many features."""
        return {"centre": (features,), "spread": (features,), "coefficients": (1 + 2 * features,)}

    @property
    def known(self) -> bool:
        """Whether they have been measured."""
        return not bool(self.coefficients.isnan().any())

    def _design(self, features: Tensor) -> Tensor:
        standard = (features - self.centre) / self.spread
        return torch.cat([torch.ones_like(standard[:, :1]), standard, standard.square() - 1], dim=1)


def _ridge(design: Tensor, values: Tensor) -> Tensor:
    """Coefficients of least squares, all but the constant drawn to 0. Shapes: (n, k), (n,) -> (k,)."""
    penalty = torch.full((design.shape[1],), _RIDGE, dtype=design.dtype)
    penalty[0] = 0.0
    return torch.linalg.solve(design.T @ design + penalty.diag(), design.T @ values)
