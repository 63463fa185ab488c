"""The networks, under the name that users import."""

from smc.learning.network import (
    CVNN,
    FEATURES,
    ComplexLinear,
    CVNNConfig,
    ModReLU,
    RealNetwork,
    build_cvnn,
    check_model,
)

__all__ = [
    "CVNN",
    "FEATURES",
    "CVNNConfig",
    "ComplexLinear",
    "ModReLU",
    "RealNetwork",
    "build_cvnn",
    "check_model",
]
