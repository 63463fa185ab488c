"""Optimisers of a pricer, and their state by parameter name: out of one, and back into a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from smc.errors import ConfigError
from smc.learning.soap import Soap

__all__ = [
    "Optimizer",
    "OptimizerName",
    "OptimizerState",
    "load_optimizer",
    "make_optimizer",
    "optimizer_name",
    "optimizer_state",
]

OptimizerName = Literal["soap", "adam"]
Optimizer = Soap | torch.optim.Adam


@dataclass(frozen=True)
class OptimizerState:
    """An optimiser's tensors by their kind and the parameter's name, like `exp_avg.layers.0.weight`, and its steps."""

    name: OptimizerName
    step: int
    tensors: Mapping[str, Tensor]


def make_optimizer(name: OptimizerName, model: nn.Module) -> Optimizer:
    """A fresh optimiser of a model's parameters, its state allocated, its learning rate still 0."""
    if name == "soap":
        return Soap(model.parameters(), lr=0.0)
    on_gpu = any(parameter.device.type == "cuda" for parameter in model.parameters())
    adam = torch.optim.Adam(model.parameters(), lr=0.0, fused=True, capturable=on_gpu)
    for parameter in model.parameters():  # what its first step would do, so that a graph can be captured before
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return adam


def optimizer_name(optimizer: Optimizer) -> OptimizerName:
    """What `make_optimizer` calls it."""
    return "soap" if isinstance(optimizer, Soap) else "adam"


def optimizer_state(optimizer: Optimizer, model: nn.Module, step: int) -> OptimizerState | None:
    """The state by reference, or None before the first step. Reads nothing from the device."""
    if step == 0:
        return None
    return OptimizerState(optimizer_name(optimizer), step, dict(_tensors(optimizer, model)))


def load_optimizer(model: nn.Module, state: OptimizerState) -> Optimizer:
    """An optimiser that goes on from a state. Raises: ConfigError naming a tensor that is missing or does not fit."""
    optimizer = make_optimizer(state.name, model)
    for name, own in _tensors(optimizer, model):
        given = state.tensors.get(name)
        if given is None or given.shape != own.shape:
            got = "missing" if given is None else f"of shape {tuple(given.shape)}"
            raise ConfigError(f"optimizer_state: {name} must have shape {tuple(own.shape)} for this model, it is {got}")
        own.copy_(given)
    for values in optimizer.state.values():
        values["step"].fill_(state.step)
    return optimizer


def _tensors(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            if kind != "step":
                yield f"{kind}.{name}", value
