"""Adam's state by parameter name: out of the optimiser, and back into a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smc.errors import ConfigError

__all__ = ["AdamState", "adam_state", "load_adam"]


@dataclass(frozen=True)
class AdamState:
    """Adam's moments by parameter name, and the number of steps taken."""

    step: int
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]


def adam_state(optimizer: torch.optim.Adam, model: nn.Module, step: int) -> AdamState | None:
    """The state by reference, or None before the first step. Reads nothing from the device."""
    state = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    if step == 0 or not state:
        return None
    return AdamState(
        step,
        {name: values["exp_avg"] for name, values in state.items()},
        {name: values["exp_avg_sq"] for name, values in state.items()},
    )


def load_adam(optimizer: torch.optim.Adam, model: nn.Module, adam: AdamState) -> None:
    """Copy a state into a fresh optimiser. Raises: ConfigError naming a moment that does not fit."""
    for name, parameter in model.named_parameters():
        if name not in adam.exp_avg:
            continue
        if adam.exp_avg[name].shape != parameter.shape:
            raise ConfigError(
                f"optimizer_state: moment of {name!r} has shape {tuple(adam.exp_avg[name].shape)}, "
                f"the parameter has {tuple(parameter.shape)}"
            )
        step_device = parameter.device if parameter.device.type == "cuda" else None
        optimizer.state[parameter] = {
            "step": torch.tensor(float(adam.step), dtype=torch.float32, device=step_device),
            "exp_avg": adam.exp_avg[name].to(parameter.device, copy=True),
            "exp_avg_sq": adam.exp_avg_sq[name].to(parameter.device, copy=True),
        }
