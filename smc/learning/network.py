"""Complex-valued layers, and the network the pricer uses by default.

Parameters are real tensors, viewed as complex without a copy: fused Adam refuses complex ones, and one
complex product is half the launches of a real block product. A model is any module with
`model(real, imag) -> (real, imag)`.

Sources: complex layers and initialisation, Trabelsi et al., "Deep complex networks" (ICLR 2018);
modReLU, Arjovsky, Shah and Bengio (2016); zReLU, Guberman (2016); cardioid, Virtue, Yu and Lustig (2017).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from smc.errors import ConfigError
from smc.learning.modules import check_copyable, evaluating, unwrapped
from smc.learning.scale import input_count
from smc.numeric_fields import WholeNumber
from smc.problem.problem import EUROPEAN_PUT, Problem
from smc.simulation.cuda import require_device
from smc.simulation.engine import SimulationParams

__all__ = ["CVNN", "FEATURES", "CVNNConfig", "ComplexLinear", "ModReLU", "RealNetwork", "build_cvnn", "check_model"]

FEATURES: Final = input_count(EUROPEAN_PUT)
"""Inputs of a model of European puts: the features of one contract, see `smc.learning.scale`."""

Activation = Literal["split_silu", "cardioid", "modrelu", "zrelu"]


class CVNNConfig(BaseModel):
    """Shape of the default network: widths of its hidden layers, their activation, and whether they are complex.

    The real one is the baseline to compare with: of the same size in parameters, not in widths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: tuple[WholeNumber, ...] = Field(default=(64, 64, 64), min_length=1)
    activation: Activation = "split_silu"
    numbers: Literal["complex", "real"] = "complex"
    seed: WholeNumber = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights")

    @model_validator(mode="after")
    def _real_activation(self) -> CVNNConfig:
        if self.numbers == "real" and self.activation != "split_silu":
            raise ValueError(f"numbers='real' has activation='split_silu', which is SiLU, got {self.activation!r}")
        return self


class ComplexLinear(nn.Module):
    """y = W x + b over the complex numbers, W and b kept as pairs (real, imaginary) in a last dimension.

    Shapes: complex (..., in_features) -> complex (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # Variance 1 / fan_in in all, shared by the two parts: what goes in comes out as large.
        scale = 1.0 / math.sqrt(2.0 * in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features, 2, dtype=dtype) * scale)
        self.bias = nn.Parameter(torch.zeros(out_features, 2, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        return functional.linear(z, torch.view_as_complex(self.weight), torch.view_as_complex(self.bias))


class ModReLU(nn.Module):
    """Shrinks the modulus by a learnt bias and keeps the phase. Shapes: complex (..., features) -> same."""

    def __init__(self, features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        modulus = _modulus(z)
        return z * (functional.relu(modulus + self.bias) / modulus)


class CVNN(nn.Module):
    """A complex multilayer perceptron. Shapes: two of (n, in_features) -> two of (n, out_features)."""

    def __init__(
        self, in_features: int, out_features: int, config: CVNNConfig, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        widths = (in_features, *config.hidden, out_features)
        self.layers = nn.ModuleList(ComplexLinear(a, b, dtype=dtype) for a, b in pairwise(widths))
        self.activations = nn.ModuleList(
            ModReLU(width, dtype=dtype) if config.activation == "modrelu" else _Pointwise(config.activation)
            for width in config.hidden
        )

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.complex(real, imag)
        for layer, activation in zip(self.layers, self.activations, strict=False):
            z = activation(layer(z))
        # One copy on the way back, where .real and .imag would cost four.
        return torch.view_as_real(self.layers[-1](z)).unbind(dim=-1)  # type: ignore[return-value]


class RealNetwork(nn.Module):
    """A real multilayer perceptron that says real and imaginary parts side by side. Its imaginary input is not read.

    Shapes: two of (n, in_features) -> two of (n, out_features).
    """

    def __init__(
        self, in_features: int, out_features: int, config: CVNNConfig, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        widths = (in_features, *config.hidden, 2 * out_features)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths))

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        x = real
        for layer in self.layers[:-1]:
            x = functional.silu(layer(x))
        return self.layers[-1](x).chunk(2, dim=-1)


def build_cvnn(
    sim_params: SimulationParams, config: CVNNConfig = CVNNConfig(), problem: Problem = EUROPEAN_PUT
) -> CVNN | RealNetwork:
    """A network of the right shape for these simulations of a problem, initialised from `config.seed`.

    Shapes: two of (n, inputs of the problem) -> two of (n, sim_params.bins). On the CPU; move it with `.cuda()`.
    """
    inputs = input_count(problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = CVNN if config.numbers == "complex" else RealNetwork
        return network(inputs, sim_params.bins, config, dtype=sim_params.dtype.torch)


def check_model(model: nn.Module, bins: int, dtype: torch.dtype, inputs: int = FEATURES) -> torch.device:
    """Check that a model can serve, and return the device its parameters are on.

    Raises: ConfigError saying what is wrong with the model, the shape that is wanted, and how to get it.
    """
    wanted = (
        f"the model is called as model(real, imag) with two ({dtype}) tensors of shape (batch, {inputs}) and must "
        f"return two of shape (batch, {bins}); smc.learning.network.build_cvnn(sim_params) makes one, with the problem "
        "as a third argument where it is none of European puts"
    )
    check_copyable(unwrapped(model))
    parameters = list(model.parameters())
    if not parameters:
        raise ConfigError(f"{type(model).__name__} has no parameters to train: {wanted}")
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise ConfigError(f"the model's parameters are on several devices: {', '.join(devices)}; move it to one")
    device = require_device(devices[0])
    wrong = next((p.dtype for p in parameters if p.dtype != dtype), None)
    if wrong is not None and wrong.is_complex:
        raise ConfigError(
            f"the model's parameters are {wrong}, which the optimisers do not take: hold real and imaginary parts in a "
            "last dimension and use torch.view_as_complex, as smc.learning.network.ComplexLinear does"
        )
    if wrong is not None:
        raise ConfigError(f"the model's parameters are {wrong}, the simulation is {dtype}: use one of them for both")
    probe = torch.zeros(2, inputs, dtype=dtype, device=device)
    try:
        inspect.signature(model.forward).bind(probe, probe)
        with torch.no_grad(), evaluating(model):
            out = model(probe, probe)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{type(model).__name__} cannot serve ({str(error).splitlines()[0]}): {wanted}") from None
    shapes = [tuple(part.shape) for part in out] if isinstance(out, tuple | list) else [tuple(out.shape)]
    if shapes != [(2, bins), (2, bins)]:
        raise ConfigError(f"{type(model).__name__} cannot serve (it returned {shapes} for a batch of 2): {wanted}")
    return device


class _Pointwise(nn.Module):
    def __init__(self, name: Activation) -> None:
        super().__init__()
        self._function = _POINTWISE[name]

    def forward(self, z: Tensor) -> Tensor:
        return self._function(z)


def _modulus(z: Tensor) -> Tensor:
    # Not z.abs(): its derivative at 0 is none.
    return torch.sqrt(z.real.square() + z.imag.square() + torch.finfo(z.real.dtype).tiny)


def _split_silu(z: Tensor) -> Tensor:
    return torch.view_as_complex(functional.silu(torch.view_as_real(z)))


def _cardioid(z: Tensor) -> Tensor:
    return z * (0.5 * (1.0 + z.real / _modulus(z)))


def _zrelu(z: Tensor) -> Tensor:
    return z * ((z.real > 0) & (z.imag > 0)).to(z.real.dtype)


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "split_silu": _split_silu,
    "cardioid": _cardioid,
    "zrelu": _zrelu,
}
