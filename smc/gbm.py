"""The simulation, under the name that users import."""

from smc.simulation.engine import (
    BlackScholes,
    BlackScholesConfig,
    Estimate,
    ProblemConfig,
    Simulation,
    SimulationParams,
)

__all__ = [
    "BlackScholes",
    "BlackScholesConfig",
    "Estimate",
    "ProblemConfig",
    "Simulation",
    "SimulationParams",
]
