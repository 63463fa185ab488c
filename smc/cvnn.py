"""Complex-valued layers on pairs of real tensors, and the network the pricer uses by default.

Real and imaginary parts are separate real tensors throughout: fused Adam and CUDA graphs refuse complex
parameters. A model is any module with `model(real, imag) -> (real, imag)`.

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
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from smc.arrays import require_device
from smc.errors import ConfigError
from smc.gbm import SimulationParams

__all__ = ["CVNN", "FEATURES", "CVNNConfig", "ComplexLinear", "ModReLU", "build_cvnn", "check_model"]

FEATURES: Final = 7
"""Inputs of a model: the features of one contract, see `smc.scaling`."""

Activation = Literal["split_silu", "cardioid", "modrelu", "zrelu"]


class CVNNConfig(BaseModel):
    """Shape of the default network: widths of its complex hidden layers, and their activation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: tuple[int, ...] = Field(default=(64, 64, 64), min_length=1)
    activation: Activation = "split_silu"
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights")


class ComplexLinear(nn.Module):
    """y = W x + b over the complex numbers.

    Shapes: real and imag (..., in_features) -> two of (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        shape = (out_features, in_features)
        # Variance 1 / fan_in in all, shared by the two parts: what goes in comes out as large.
        scale = 1.0 / math.sqrt(2.0 * in_features)
        self.weight_real = nn.Parameter(torch.randn(shape, dtype=dtype) * scale)
        self.weight_imag = nn.Parameter(torch.randn(shape, dtype=dtype) * scale)
        self.bias_real = nn.Parameter(torch.zeros(out_features, dtype=dtype))
        self.bias_imag = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        # One real product of twice the size instead of four: launches and threads cost more than flops.
        weight = torch.cat(
            [
                torch.cat([self.weight_real, -self.weight_imag], dim=1),
                torch.cat([self.weight_imag, self.weight_real], dim=1),
            ]
        )
        bias = torch.cat([self.bias_real, self.bias_imag])
        out = functional.linear(torch.cat([real, imag], dim=-1), weight, bias)
        return out.tensor_split(2, dim=-1)  # type: ignore[return-value]


class ModReLU(nn.Module):
    """Shrinks the modulus by a learnt bias and keeps the phase. Shapes: two of (..., features) -> same."""

    def __init__(self, features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        modulus = torch.sqrt(real.square() + imag.square() + torch.finfo(real.dtype).tiny)
        gain = functional.relu(modulus + self.bias) / modulus
        return real * gain, imag * gain


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
        for layer, activation in zip(self.layers, self.activations, strict=False):
            real, imag = activation(*layer(real, imag))
        return self.layers[-1](real, imag)


def build_cvnn(sim_params: SimulationParams, config: CVNNConfig = CVNNConfig()) -> CVNN:
    """A network of the right shape for these simulations, initialised from `config.seed`.

    Shapes: two of (n, FEATURES) -> two of (n, sim_params.bins). On the CPU; move it with `.cuda()`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CVNN(FEATURES, sim_params.bins, config, dtype=sim_params.dtype.torch)


def check_model(model: nn.Module, bins: int, dtype: torch.dtype) -> torch.device:
    """Check that a model can serve, and return the device its parameters are on.

    Raises: ConfigError saying what is wrong with the model, the shape that is wanted, and how to get it.
    """
    wanted = (
        f"the model is called as model(real, imag) with two ({dtype}) tensors of shape (batch, {FEATURES}) and must "
        f"return two of shape (batch, {bins}); smc.cvnn.build_cvnn(sim_params) makes one"
    )
    parameters = list(model.parameters())
    if not parameters:
        raise ConfigError(f"{type(model).__name__} has no parameters to train: {wanted}")
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise ConfigError(f"the model's parameters are on several devices: {', '.join(devices)}; move it to one")
    device = require_device(devices[0])
    wrong = next((p.dtype for p in parameters if p.dtype != dtype), None)
    if wrong is not None:
        raise ConfigError(f"the model's parameters are {wrong}, the simulation is {dtype}: use one of them for both")
    probe = torch.zeros(2, FEATURES, dtype=dtype, device=device)
    training = model.training
    try:
        inspect.signature(model.forward).bind(probe, probe)
        with torch.no_grad():
            out = model.eval()(probe, probe)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{type(model).__name__} cannot serve ({str(error).splitlines()[0]}): {wanted}") from None
    finally:
        model.train(training)
    shapes = [tuple(part.shape) for part in out] if isinstance(out, tuple | list) else [tuple(out.shape)]
    if shapes != [(2, bins), (2, bins)]:
        raise ConfigError(f"{type(model).__name__} cannot serve (it returned {shapes} for a batch of 2): {wanted}")
    return device


class _Pointwise(nn.Module):
    def __init__(self, name: Activation) -> None:
        super().__init__()
        self._function = _POINTWISE[name]

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        return self._function(real, imag)


def _split_silu(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    return functional.silu(real), functional.silu(imag)


def _cardioid(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    modulus = torch.sqrt(real.square() + imag.square() + torch.finfo(real.dtype).tiny)
    gain = 0.5 * (1.0 + real / modulus)
    return real * gain, imag * gain


def _zrelu(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    open_quadrant = ((real > 0) & (imag > 0)).to(real.dtype)
    return real * open_quadrant, imag * open_quadrant


_POINTWISE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "split_silu": _split_silu,
    "cardioid": _cardioid,
    "zrelu": _zrelu,
}
