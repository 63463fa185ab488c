"""The pricer, under the name that users import."""

from smc.learning.pricer import (
    GbmCVNNPricer,
    GbmCVNNPricerConfig,
    Progress,
    StepReport,
    TrainingConfig,
    TrainingResult,
)

__all__ = [
    "GbmCVNNPricer",
    "GbmCVNNPricerConfig",
    "Progress",
    "StepReport",
    "TrainingConfig",
    "TrainingResult",
]
