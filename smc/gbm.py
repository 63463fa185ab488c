"""The simulation, under the name that users import."""

from smc.simulation.engine import (
    BlackScholes,
    BlackScholesConfig,
    SimulationParams,
)

__all__ = [
    "BlackScholes",
    "BlackScholesConfig",
    "SimulationParams",
]
