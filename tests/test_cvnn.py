from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from smc.learning.network import FEATURES, ComplexLinear, CVNNConfig, ModReLU, build_cvnn
from tests.conftest import small_simulation


def test_a_complex_layer_is_complex_linear_algebra() -> None:
    layer = ComplexLinear(5, 3, dtype=torch.float64)
    z = torch.complex(torch.randn(4, 5).double(), torch.randn(4, 5).double())
    weight = layer.weight[..., 0] + 1j * layer.weight[..., 1]
    bias = layer.bias[..., 0] + 1j * layer.bias[..., 1]
    torch.testing.assert_close(layer(z), z @ weight.T + bias)


def test_initial_layers_keep_the_size_of_what_goes_in() -> None:
    layer = ComplexLinear(512, 512)
    x = torch.complex(torch.randn(256, 512), torch.randn(256, 512))
    with torch.no_grad():
        out = layer(x)
    assert float(out.abs().square().mean()) == pytest.approx(2.0, rel=0.1)


def test_modrelu_keeps_the_phase() -> None:
    layer = ModReLU(3)
    layer.bias.data = torch.tensor([-0.5, 0.0, 0.5])
    z = torch.complex(torch.tensor([[3.0, -1.0, 0.1]]), torch.tensor([[4.0, 1.0, 0.0]]))
    out = layer(z)
    torch.testing.assert_close(out.angle(), z.angle())
    torch.testing.assert_close(out.abs(), torch.tensor([[4.5, 2**0.5, 0.6]]))


@pytest.mark.parametrize("activation", ["split_silu", "cardioid", "modrelu", "zrelu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_built_network_has_the_shape_of_the_simulation(activation: str, dtype: str) -> None:
    params = small_simulation(dtype=dtype, network_size=33)
    model = build_cvnn(params, CVNNConfig(hidden=(8, 9), activation=activation))
    x = torch.randn(6, FEATURES, dtype=params.dtype.torch)
    real, imag = model(x, torch.zeros_like(x))
    assert real.shape == imag.shape == (6, 17)
    assert real.dtype == params.dtype.torch
    (real.sum() + imag.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_activations_follow_their_definitions() -> None:
    z = torch.complex(torch.tensor([1.0, -1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, 0.0]))

    def apply(name: str) -> np.ndarray:
        from smc.learning.network import _POINTWISE

        return np.array(_POINTWISE[name](z))

    zn = np.array(z)
    np.testing.assert_allclose(apply("zrelu"), [1 + 1j, 0, 0, 0])
    np.testing.assert_allclose(apply("cardioid"), zn * 0.5 * (1 + np.cos(np.angle(zn))), atol=1e-6)
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(apply("split_silu"), silu(zn.real) + 1j * silu(zn.imag), rtol=1e-6)


def test_the_same_config_builds_the_same_network_and_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = (build_cvnn(small_simulation()).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_cvnn(small_simulation(), CVNNConfig(seed=1)).state_dict()
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValidationError, match="activation"):
        CVNNConfig(activation="gelu")  # type: ignore[arg-type]
