"""Several prices by geometric Brownian motion, dS_i = (r - d_i) S_i dt + v_i S_i dW_i, the W_i correlated.

Correlations come from one factor, corr(W_i, W_j) = b_i b_j, or from a full matrix that is given by its partial
correlations: p_ij is the correlation of W_i and W_j once W_1 ... W_(i-1) are known. Whatever numbers between -1 and 1
they are, the matrix is one of correlations, so that a domain of them is a box.
Source: partial correlations, Lewandowski, Kurowicka and Joe, "Generating random correlation matrices based on vines and
extended onion method" (Journal of Multivariate Analysis, 2009).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field as Setting
from torch import Tensor

from smc.numeric_fields import WholeNumber
from smc.problem.process import Process
from smc.problem.processes.gbm import DIVIDEND, RATE, SPOT, VOLATILITY
from smc.problem.schema import Field

__all__ = ["CorrelatedGBM", "OneFactorGBM", "SeveralAssets"]

_MOST_ASSETS = 16
# What a correlation leaves of a variance is taken to be at least so much, so that it has a logarithm.
_LEAST_LEFT = 1e-12


class SeveralAssets(Process):
    """Log-normal prices of 2 to 16 assets, whose logarithms are stepped exactly. A subclass says how they correlate.

    The fields are X1, X2, ..., r, d1, d2, ..., v1, v2, ..., and those of the correlations.
    """

    volatility: ClassVar[str | None] = None

    n_assets: WholeNumber = Setting(default=2, ge=2, le=_MOST_ASSETS)

    @classmethod
    def largest(cls) -> SeveralAssets:
        """With as many assets as there may be, whose fields have the names of all others."""
        return cls(n_assets=_MOST_ASSETS)

    @property
    def assets(self) -> int:  # type: ignore[override]  # a setting decides
        """How many."""
        return self.n_assets

    @property
    def exact(self) -> bool:
        """One step is as good as many."""
        return True

    @property
    def normals(self) -> int:  # type: ignore[override]
        """One for each asset."""
        return self.n_assets

    @cached_property
    def spots(self) -> tuple[str, ...]:
        """Names of the prices today."""
        return tuple(f"X{i}" for i in range(1, self.n_assets + 1))

    @cached_property
    def dividends(self) -> tuple[str, ...]:
        """Names of the dividend yields."""
        return tuple(f"d{i}" for i in range(1, self.n_assets + 1))

    @cached_property
    def volatilities(self) -> tuple[str, ...]:
        """Names of the volatilities."""
        return tuple(f"v{i}" for i in range(1, self.n_assets + 1))

    @property
    @abstractmethod
    def correlations(self) -> tuple[Field, ...]:
        """The fields that say how the assets correlate."""

    @cached_property
    def rhos(self) -> tuple[str, ...]:
        """The names of those fields."""
        return tuple(field.name for field in self.correlations)

    @cached_property
    def fields(self) -> tuple[Field, ...]:  # type: ignore[override]
        """The spots first."""
        spots = (SPOT.of(name, f"of asset {name[1:]}") for name in self.spots)
        dividends = (DIVIDEND.of(name, f"of asset {name[1:]}") for name in self.dividends)
        volatilities = (VOLATILITY.of(name, f"of asset {name[1:]}") for name in self.volatilities)
        return (*spots, RATE, *dividends, *volatilities, *self.correlations)

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """All but the spots, whose ratios are features."""
        return tuple(field.name for field in self.fields[self.n_assets :])

    def restarted(self, c: Any, prices: Any) -> Any:
        """From other spots."""
        return dict(zip(self.spots, prices.T, strict=True))

    # --- scalar methods ------------------------------------------------------------------------------

    @abstractmethod
    def mixing(self, c: Any) -> tuple[float, ...]:
        """The Cholesky factor of the correlations: its rows without the diagonal, from the second on; the diagonal."""

    def coefficients(self, c: Any, dt: float) -> tuple[float, ...]:
        """Of a step: what each asset has of each normal, as `mixing`; drifts; and the spots."""
        root, mixing = math.sqrt(dt), self.mixing(c)
        return (
            *tuple(
                root * getattr(c, self.volatilities[i]) * mixing[i * (i - 1) // 2 + j]
                for i in range(self.n_assets)
                for j in range(i)
            ),
            *tuple(root * getattr(c, self.volatilities[i]) * mixing[self.pairs + i] for i in range(self.n_assets)),
            *tuple(
                (c.r - getattr(c, self.dividends[i]) - 0.5 * getattr(c, self.volatilities[i]) ** 2) * dt
                for i in range(self.n_assets)
            ),
            *tuple(getattr(c, self.spots[i]) for i in range(self.n_assets)),
        )

    @property
    def pairs(self) -> int:
        """How many pairs of assets there are."""
        return self.n_assets * (self.n_assets - 1) // 2

    def start(self, c: Any) -> tuple[float, ...]:
        """The logarithms of the prices over those today."""
        return tuple(0.0 for i in range(self.n_assets))

    def step(self, state: tuple[float, ...], normals: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """One normal for each asset."""
        return tuple(
            state[i]
            + k[self.pairs + self.n_assets + i]
            + k[self.pairs + i] * normals[i]
            + sum(k[i * (i - 1) // 2 + j] * normals[j] for j in range(i))
            for i in range(self.n_assets)
        )

    def spot(self, state: tuple[float, ...], k: tuple[float, ...]) -> tuple[float, ...]:
        """The prices."""
        return tuple(k[self.pairs + 2 * self.n_assets + i] * math.exp(state[i]) for i in range(self.n_assets))

    # --- what is known of prices ---------------------------------------------------------------------

    def growth(self, c: Any, t: Any) -> Any:
        """Of the mean of the prices."""
        spots = [getattr(c, name) for name in self.spots]
        grown = sum(
            spot * ((c.r - getattr(c, name)) * t).exp() for spot, name in zip(spots, self.dividends, strict=True)
        )
        return (grown / sum(spots)).log()

    def deviation(self, c: Any, t: Any) -> Any:
        """The root of the mean of the variances."""
        squares = sum(getattr(c, name) ** 2 for name in self.volatilities) / self.n_assets
        return (squares * t).sqrt()

    def growths(self, c: Any, t: Any) -> Tensor:
        """Of each asset. Shapes: columns of (n,), t (n,) -> (n, assets)."""
        return torch.stack([(c.r - getattr(c, name)) * t for name in self.dividends], dim=-1)

    def covariances(self, c: Any, t: Any) -> Tensor:
        """Of the logarithms of the prices after t years. Shapes: columns of (n,), t (n,) -> (n, assets, assets)."""
        deviations = torch.stack([getattr(c, name) * t.sqrt() for name in self.volatilities], dim=-1)
        factor = deviations[..., None] * self.factor(c)
        return factor @ factor.transpose(-1, -2)

    @abstractmethod
    def factor(self, c: Any) -> Tensor:
        """The Cholesky factor of the correlations. Shapes: columns of (n,) -> (n, assets, assets)."""

    def features(self, c: Any) -> tuple[Any, ...]:
        """How each price stands to their mean. No units."""
        spots = torch.stack([getattr(c, name) for name in self.spots], dim=-1)
        return torch.log(spots / spots.mean(dim=-1, keepdim=True)).unbind(dim=-1)


class CorrelatedGBM(SeveralAssets):
    """Any correlations, by the fields p1_2, p1_3, p2_3, p1_4, ... of partial correlations."""

    kind: ClassVar[str] = "correlated_gbm"

    @property
    def title(self) -> str:
        """In full."""
        return f"geometric Brownian motion of {self.n_assets} correlated assets"

    @cached_property
    def correlations(self) -> tuple[Field, ...]:
        """The partial correlations, in the order (1, 2), (1, 3), (2, 3), (1, 4), ..."""
        names = [f"p{j + 1}_{i + 1}" for i in range(self.n_assets) for j in range(i)]
        unit = "between -1 and 1, of two assets given those before the first of them"
        return tuple(Field(name, "partial correlation", unit, -0.3, 0.8, least=-1.0, most=1.0) for name in names)

    def mixing(self, c: Any) -> tuple[float, ...]:
        """A row is a point on the sphere, its polar angles the arc cosines of the row's partial correlations."""
        return (
            *tuple(
                getattr(c, self.rhos[i * (i - 1) // 2 + j])
                * math.exp(0.5 * sum(self.log_left(getattr(c, self.rhos[i * (i - 1) // 2 + m])) for m in range(j)))
                for i in range(self.n_assets)
                for j in range(i)
            ),
            *tuple(
                math.exp(0.5 * sum(self.log_left(getattr(c, self.rhos[i * (i - 1) // 2 + m])) for m in range(i)))
                for i in range(self.n_assets)
            ),
        )

    def log_left(self, correlation: float) -> float:
        """Logarithm of the share of a variance that a correlation leaves."""
        return math.log(max(1.0 - correlation * correlation, _LEAST_LEFT))

    def factor(self, c: Any) -> Tensor:
        """As `mixing`. Shapes: columns of (n,) -> (n, assets, assets)."""
        one, rows = torch.ones_like(c.r), []
        for i in range(self.n_assets):
            row, left = [], one
            for j in range(i):
                partial = getattr(c, self.rhos[i * (i - 1) // 2 + j])
                row.append(partial * left)
                left = left * (1 - partial * partial).clamp(min=_LEAST_LEFT).sqrt()
            rows.append(torch.stack([*row, left, *[0 * one] * (self.n_assets - i - 1)], dim=-1))
        return torch.stack(rows, dim=-2)


class OneFactorGBM(SeveralAssets):
    """Correlations by what all assets have in common: the loadings b1, b2, ..., corr(W_i, W_j) = b_i b_j."""

    kind: ClassVar[str] = "one_factor_gbm"

    @property
    def title(self) -> str:
        """In full."""
        return f"geometric Brownian motion of {self.n_assets} assets with one factor"

    @cached_property
    def correlations(self) -> tuple[Field, ...]:
        """The loadings."""
        unit = "between -1 and 1, the correlation of an asset with what all have in common"
        loading = Field("b", "loading", unit, 0.0, 0.9, least=-1.0, most=1.0)
        return tuple(loading.of(f"b{i}", f"of asset {i}") for i in range(1, self.n_assets + 1))

    def mixing(self, c: Any) -> tuple[float, ...]:
        """By the variance of the factor given the assets before: 1 over the sum of what each tells of it."""
        return (
            *tuple(
                getattr(c, self.rhos[i])
                * getattr(c, self.rhos[j])
                * self.unknown(sum(self.told(getattr(c, self.rhos[m])) for m in range(j)))
                / self.diagonal(
                    getattr(c, self.rhos[j]),
                    sum(self.told(getattr(c, self.rhos[m])) for m in range(j)),
                )
                for i in range(self.n_assets)
                for j in range(i)
            ),
            *tuple(
                self.diagonal(
                    getattr(c, self.rhos[i]),
                    sum(self.told(getattr(c, self.rhos[m])) for m in range(i)),
                )
                for i in range(self.n_assets)
            ),
        )

    def told(self, loading: float) -> float:
        """What one asset tells of the factor."""
        return loading * loading / max(1.0 - loading * loading, _LEAST_LEFT)

    def unknown(self, told: float) -> float:
        """The factor's variance, given assets that tell so much of it."""
        return 1.0 / (1.0 + told)

    def diagonal(self, loading: float, told: float) -> float:
        """What an asset has of its own normal."""
        return math.sqrt(max(1.0 - loading * loading * (1.0 - self.unknown(told)), _LEAST_LEFT))

    def factor(self, c: Any) -> Tensor:
        """As `mixing`. Shapes: columns of (n,) -> (n, assets, assets)."""
        b = torch.stack([getattr(c, name) for name in self.rhos], dim=-1)
        square = b * b
        told = (square / (1 - square).clamp(min=_LEAST_LEFT)).cumsum(dim=-1)
        unknown = 1 / (1 + torch.cat([0 * told[..., :1], told[..., :-1]], dim=-1))
        diagonal = (1 - square * (1 - unknown)).clamp(min=_LEAST_LEFT).sqrt()
        below = (b[..., :, None] * (b * unknown / diagonal)[..., None, :]).tril(-1)
        return below + torch.diag_embed(diagonal)
