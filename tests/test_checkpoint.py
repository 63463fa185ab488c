from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.errors import Busy, ConfigError, Corrupt
from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.problem.contracts import BoundSpec
from tests.conftest import small_config, small_simulation, small_training


@pytest.fixture(scope="module")
def state() -> GbmCVNNPricerConfig:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(3))
    return pricer.snapshot()


def test_encoding_and_decoding_give_the_same_state(state: GbmCVNNPricerConfig) -> None:
    data = encode(Snapshot.of(state))
    restored = restore(decode(data))
    assert encode(Snapshot.of(restored)) == data
    assert restored.global_step == 3
    assert restored.optimizer_state is not None
    assert restored.optimizer_state.step == 3
    assert restored.plan == state.plan


def test_equal_states_have_equal_bytes(state: GbmCVNNPricerConfig) -> None:
    shuffled = replace(state, domain_bounds=dict(reversed(list(state.domain_bounds.items()))))
    assert encode(Snapshot.of(shuffled)) == encode(Snapshot.of(state))


def test_a_snapshot_is_a_copy(state: GbmCVNNPricerConfig) -> None:
    pricer = GbmCVNNPricer(state)
    snapshot = Snapshot.of(pricer.snapshot())
    before = encode(snapshot)
    pricer.train(small_training(2))
    assert encode(snapshot) == before


def test_other_software_reads_the_file(state: GbmCVNNPricerConfig, tmp_path: object) -> None:
    path = f"{tmp_path}/checkpoint.safetensors"
    with open(path, "wb") as file:
        file.write(encode(Snapshot.of(state)))
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["model.layers.0.weight"], state.cvnn.state_dict()["layers.0.weight"])
    assert tensors["rng.cpu"].dtype == torch.uint8


def test_a_template_gives_the_architecture_and_is_not_changed(state: GbmCVNNPricerConfig) -> None:
    template = small_config()
    before = {k: v.clone() for k, v in template.cvnn.state_dict().items()}
    restored = restore(decode(encode(Snapshot.of(state))), template.cvnn, template)
    assert all(torch.equal(v, template.cvnn.state_dict()[k]) for k, v in before.items())
    assert restored.cvnn is not template.cvnn


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ((16, 17), r"'layers.1.bias' is \(17, 2\) torch.float32 in the template and \(16, 2\)"),
        ((16, 16, 17), "'layers.3.bias' is only in model_template"),
        ((16,), "'layers.1.bias' is"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    state: GbmCVNNPricerConfig, hidden: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        restore(Snapshot.of(state), build_cvnn(small_simulation(), CVNNConfig(hidden=hidden)))


def test_a_config_template_of_another_simulation_is_refused(state: GbmCVNNPricerConfig) -> None:
    with pytest.raises(ConfigError, match=r"config_template.cfg.sim_params.timesteps is 5, .* with 4"):
        restore(Snapshot.of(state), None, small_config(timesteps=5))
    other = replace(small_config(), domain_bounds={"v": BoundSpec(lower=0.1, upper=0.2)})
    with pytest.raises(ConfigError, match="domain_bounds differ"):
        restore(Snapshot.of(state), None, other)


def test_a_model_of_ones_own_needs_its_template(state: GbmCVNNPricerConfig) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_cvnn(small_simulation(), CVNNConfig(hidden=(4,)))

        def forward(self, real: torch.Tensor, imag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out: tuple[torch.Tensor, torch.Tensor] = self.inner(real, imag)
            return out

    data = encode(Snapshot.of(replace(small_config(), cvnn=Own())))
    with pytest.raises(ConfigError, match=r"Own, which build_cvnn did not make: pass one as model_template"):
        restore(decode(data))
    restore(decode(data), Own())


@pytest.mark.parametrize("damage", ["empty", "short", "header", "length", "pickle", "metadata"])
def test_bytes_that_are_not_a_checkpoint_are_corrupt(state: GbmCVNNPricerConfig, damage: str) -> None:
    data = encode(Snapshot.of(state))
    damaged = {
        "empty": b"",
        "short": data[: len(data) // 2],
        "header": data[:8] + b"\xff" * 20 + data[28:],
        "length": (10 * 2**30).to_bytes(8, "little") + data[8:],
        "pickle": pickle.dumps({"weights": [1, 2]}),
        "metadata": safetensors.torch.save({"x": torch.zeros(1)}, metadata={"spectralmc": '{"format": 3}'}),
    }[damage]
    with pytest.raises(Corrupt):
        decode(damaged)


def test_errors_survive_pickling() -> None:
    busy = pickle.loads(pickle.dumps(Busy("full", 2.5)))
    assert (str(busy), busy.retry_after) == ("full", 2.5)
    corrupt = pickle.loads(pickle.dumps(Corrupt("bad", (("log/0", "why"),))))
    assert corrupt.problems == (("log/0", "why"),)


def test_a_checkpoint_of_another_format_is_refused_by_its_number(state: GbmCVNNPricerConfig) -> None:
    data = encode(Snapshot.of(state))
    assert data.count(b'\\"format\\":3') == 1
    with pytest.raises(ConfigError, match="has format 1, this version of spectralmc reads format 3"):
        decode(data.replace(b'\\"format\\":3', b'\\"format\\":1'))
