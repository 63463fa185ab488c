"""Serving, under the name that users import."""

from smc.serving.client import (
    InferenceClient,
    ModelFollower,
    ServedModel,
    ServingStatus,
    load_predictor,
)

__all__ = [
    "InferenceClient",
    "ModelFollower",
    "ServedModel",
    "ServingStatus",
    "load_predictor",
]
