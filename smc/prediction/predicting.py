"""Prices, distributions and Greeks of whoever has a predictor: a pricer, a model that is served, a client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from smc.prediction.distribution import PayoffDistribution
from smc.prediction.predictor import LEARNT, Array, Kind, Kinds, Outside, Predictor
from smc.problem.contracts import ContractsLike
from smc.problem.oracles.black_scholes import Greeks

__all__ = ["Predicting"]


class Predicting(ABC):
    """Predicts with the predictor of the moment."""

    @abstractmethod
    def asked(self) -> Predictor:
        """The predictor to ask now."""

    def predict_price(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Array | Tensor:
        """Present values, held within the no-arbitrage bounds. `kind`: of a European put, calls follow by parity.

        Shapes: n contracts, or an (n, fields) array or tensor -> (n,) float64, a tensor on its device if given one.
        What is certain (T = 0, v = 0) is exact, without the network.
        Raises: ConfigError for a contract outside the trained domain, unless outside='warn', and for a `kind` that does
        not follow from what was learnt.
        """
        return self.asked().predict_price(contracts, kind, outside=outside)

    def predict_error_bar(
        self, contracts: ContractsLike | Tensor, *, outside: Outside = "refuse"
    ) -> Array | Tensor:  # fmt: skip
        """Half-widths of the intervals around prices that hold the exact price for 95 % of contracts of the domain.

        They come from contracts that training held back (`TrainingConfig.held_back`), and are those of what follows by
        parity, too. What is certain has none. Shapes: n contracts -> (n,) float64. Units: currency.
        Raises: ConfigError for a pricer without them.
        """
        return self.asked().predict_error_bar(contracts, outside=outside)

    def predict_distribution(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> PayoffDistribution:
        """Distribution of the discounted payoff, its mean the price. Shapes: n contracts -> levels (n, N).

        What was learnt is what the network says. A call's distribution follows from a European put's by reflection,
        which holds for log-normal prices.
        """
        return self.asked().predict_distribution(contracts, kind, outside=outside)

    def predict_greeks(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Greeks:
        """Derivatives of the learnt price by automatic differentiation. Shapes: -> five of (n,)."""
        return self.asked().predict_greeks(contracts, kind, outside=outside)

    def predict_sensitivities(
        self, contracts: ContractsLike | Tensor, kind: Kind = LEARNT, *, outside: Outside = "refuse"
    ) -> Any:
        """Derivatives of the learnt price by every field of a contract, by name. Shapes: -> (n,) each."""
        return self.asked().predict_sensitivities(contracts, kind, outside=outside)
