"""Any network that a user gives: asking it changes nothing, and what is loaded is what was trained."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smc.checkpoint.file import Snapshot, decode, encode, restore
from smc.errors import ConfigError
from smc.learning.modules import evaluating, training, unwrapped
from smc.learning.network import FEATURES, build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig
from smc.serving.client import load_predictor
from smc.storage import AsyncBlockchainModelStore, commit_snapshot
from smc.storage.objects import MemoryObjectStore
from tests.conftest import small_config, small_simulation, small_training

CONTRACTS = [[100, 105, 1.0, 0.03, 0.01, 0.25], [100, 90, 0.5, 0.01, 0.02, 0.3], [80, 90, 1.5, 0.0, 0.0, 0.4]]
BINS = small_simulation().bins


class Net(nn.Module):
    """A real network with a layer of the test's choice in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(FEATURES, 16), middle, nn.Linear(16, 2 * BINS)

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.middle(torch.tanh(self.first(real)))
        a, b = self.last(hidden).chunk(2, dim=-1)
        return a, b


class Counting(nn.Module):
    """Counts its calls in training, as quantisation's observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x[:, None])[0][:, 0]
        return out


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "batch norm": lambda: nn.BatchNorm1d(16),
    "batch norm without momentum": lambda: nn.BatchNorm1d(16, momentum=None),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    "randomized relu": lambda: nn.RReLU(),
    "counting": Counting,
    "noisy": Noisy,
    "nested": lambda: nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Dropout(0.2)),
    "recurrent": Recurrent,
}


def pricer_of(middle: nn.Module) -> GbmCVNNPricer:
    torch.manual_seed(1)
    return GbmCVNNPricer(replace(small_config(), cvnn=Net(middle)))


def everything(model: nn.Module) -> list[Any]:
    return [*(t.clone() for t in model.state_dict().values()), *(m.training for m in model.modules())]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MIDDLES)
def test_asking_gives_one_answer_and_changes_nothing(name: str) -> None:
    pricer = pricer_of(MIDDLES[name]())
    pricer.train(small_training(3))
    frozen = pricer.model.middle
    assert isinstance(frozen, nn.Module)
    frozen.eval()  # a part that its owner froze stays frozen
    before, random = everything(pricer.model), torch.get_rng_state()
    checkpoint = encode(Snapshot.of(pricer.snapshot()))
    prices = pricer.predict_price(CONTRACTS)
    for _ in range(2):
        assert np.array_equal(pricer.predict_price(CONTRACTS), prices)
        assert np.allclose([pricer.predict_price([c])[0] for c in CONTRACTS], prices, rtol=1e-5)
        pricer.predict_price(CONTRACTS, "call")
        pricer.predict_distribution(CONTRACTS)
        if name != "recurrent":  # its derivative has no derivative
            pricer.predict_greeks(CONTRACTS)
    assert same(everything(pricer.model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert encode(Snapshot.of(pricer.snapshot())) == checkpoint

    async def served() -> Any:
        async with AsyncBlockchainModelStore("memory", objects=MemoryObjectStore()) as store:
            version = await commit_snapshot(store, pricer.snapshot(), "m")
            template = Net(MIDDLES[name]())
            return (await load_predictor(store, version, model_template=template)).predict_price(CONTRACTS)

    assert np.allclose(asyncio.run(served()), prices, rtol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "batch norm", "counting"])
def test_a_model_in_evaluation_mode_is_trained_in_training_mode(name: str) -> None:
    states = []
    for mode in (True, False):
        pricer = pricer_of(MIDDLES[name]())
        pricer.model.train(mode)
        pricer.train(small_training(4))
        assert pricer.model.training is mode
        states.append(pricer.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_modes_are_put_back_part_by_part() -> None:
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Dropout())
    model[0].eval()
    model[0][1].train()
    before = [m.training for m in model.modules()]
    for mode in (evaluating, training):
        with pytest.raises(RuntimeError, match="inside"), mode(model):
            raise RuntimeError("inside")
        assert [m.training for m in model.modules()] == before
    with evaluating(model):
        assert not any(m.training for m in model.modules())


class Extra(Counting):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        del state


class Uncopyable(Counting):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize(
    ("middle", "differential", "message"),
    [
        (nn.BatchNorm1d(16), 0.3, "cannot be trained with derivatives as labels"),
        (Recurrent(), 0.3, "cannot be trained with derivatives as labels"),
        (Counting(), 0.3, "cannot be trained with derivatives as labels"),
        (Extra(), 0.0, "'middle._extra_state' of its state is a dict, and a checkpoint holds tensors alone"),
        (Uncopyable(), 0.0, "cannot be copied, as a snapshot has to be: cannot pickle a lock"),
        (nn.utils.spectral_norm(nn.Linear(16, 16)), 0.0, "spectral_norm, use those in torch.nn.utils.param"),
    ],
)
def test_what_cannot_be_trained_or_saved_is_refused_before_training(
    middle: nn.Module, differential: float, message: str
) -> None:
    pricer = GbmCVNNPricer(replace(small_config(), cvnn=Net(middle)))
    with pytest.raises(ConfigError, match=message):
        pricer.train(small_training(2, differential=differential))
    assert pricer.progress.step == 0


def test_a_frozen_or_complex_model_is_refused() -> None:
    pricer = GbmCVNNPricer(replace(small_config(), cvnn=Net(nn.Identity()).requires_grad_(False)))
    with pytest.raises(ConfigError, match="all its parameters are frozen"):
        pricer.train(small_training(2))
    with pytest.raises(ConfigError, match=r"complex64, which the optimisers do not take: hold real and imaginary"):
        GbmCVNNPricer(replace(small_config(), cvnn=Net(nn.Linear(16, 16, dtype=torch.complex64))))


# --- what is loaded is what was trained --------------------------------------------------------------


def hooked(model: nn.Module) -> nn.Module:
    model.get_submodule("layers.0").register_forward_hook(lambda module, given, out: out * 1.01)
    return model


def before_it(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, given: (given[0] * 1.01, given[1]))
    return model


def parametrized(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.get_submodule("layers.0"), "weight", dim=None)
    return model


class Another(type(build_cvnn(small_simulation()))):  # type: ignore[misc]
    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        a, b = super().forward(real, imag)
        return a * 1.01, b


def another(model: nn.Module) -> nn.Module:
    model.__class__ = Another
    return model


def replaced_part(model: nn.Module) -> nn.Module:
    model.activations[0] = nn.Identity()  # type: ignore[operator,index]
    return model


def replaced_function(model: nn.Module) -> nn.Module:
    model.get_submodule("activations.1")._function = torch.tanh  # type: ignore[assignment]
    return model


def bound_hook(model: nn.Module) -> nn.Module:
    model.get_submodule("layers.1").register_forward_pre_hook(lambda module, given: (given[0] * 1.01,))
    return model


def another_config(model: nn.Module) -> nn.Module:
    model.config = model.config.model_copy(update={"activation": "zrelu"})  # type: ignore[operator,union-attr,assignment]
    return model


CHANGES = [
    hooked,
    before_it,
    bound_hook,
    parametrized,
    another,
    replaced_part,
    replaced_function,
    another_config,
]


def round_trip(state: GbmCVNNPricerConfig, template: nn.Module | None = None) -> GbmCVNNPricerConfig:
    return restore(decode(encode(Snapshot.of(state))), template)


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_computes_something_else_is_not_rebuilt_as_a_plain_one(change: Any) -> None:
    config = small_config()
    pricer = GbmCVNNPricer(replace(config, cvnn=change(config.cvnn)))
    pricer.train(small_training(3))
    with pytest.raises(ConfigError, match="pass one as model_template"):
        round_trip(pricer.snapshot())
    template = change(small_config().cvnn)
    loaded = GbmCVNNPricer(round_trip(pricer.snapshot(), template))
    assert np.array_equal(loaded.predict_price(CONTRACTS), pricer.predict_price(CONTRACTS))
    assert next(iter(loaded.model.parameters())) is not next(iter(template.parameters()))


def halved(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    return real / 2, imag / 2


@pytest.mark.parametrize(
    ("part", "replacement"),
    [
        ("", lambda model: lambda real, imag: halved(*type(model).forward(model, real, imag))),
        ("layers.0", lambda model: lambda z: z),
        ("layers.1", lambda model: functools.partial(type(model).forward, model)),
        ("activations.0", lambda model: torch.tanh),
    ],
)
def test_a_method_replaced_on_an_instance_is_refused(part: str, replacement: Any) -> None:
    config = small_config()
    pricer = GbmCVNNPricer(config)
    state = Snapshot.of(pricer.snapshot())
    model = small_config().cvnn
    replaced = model.get_submodule(part)
    replaced.forward = replacement(replaced)  # type: ignore[method-assign]
    for use in (lambda: GbmCVNNPricer(replace(config, cvnn=model)), lambda: restore(state, model)):
        with pytest.raises(ConfigError, match=r"was replaced on the instance; .*: define a subclass"):
            use()


def test_a_method_that_an_instance_chose_among_its_own_goes_along() -> None:
    class Choosing(Net):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__(*parts)
            self.forward = self.other  # type: ignore[method-assign]

        def other(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
            return halved(*Net.forward(self, real, imag))

    pricer = GbmCVNNPricer(replace(small_config(), cvnn=Choosing(nn.Tanh())))
    pricer.train(small_training(3))
    copy = GbmCVNNPricer(pricer.snapshot())
    before = copy.predict_price(CONTRACTS)
    assert np.array_equal(before, pricer.predict_price(CONTRACTS))
    pricer.train(small_training(3))
    assert np.array_equal(copy.predict_price(CONTRACTS), before)


def test_a_template_of_another_class_is_refused() -> None:
    pricer = pricer_of(nn.Tanh())
    pricer.train(small_training(2))

    class Other(Net):
        pass

    with pytest.raises(ConfigError, match=r"model_template is a Other, the checkpoint's model a .*Net: another class"):
        round_trip(pricer.snapshot(), Other(nn.Tanh()))


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # on Python 3.13.0
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_wrapper_that_changes_nothing_is_looked_through(wrap: Any) -> None:
    plain = GbmCVNNPricer(small_config())
    plain.train(small_training(6))
    config = small_config()
    wrapped = GbmCVNNPricer(replace(config, cvnn=wrap(config.cvnn)))
    assert unwrapped(wrapped.model) is config.cvnn
    wrapped.train(small_training(6))
    assert encode(Snapshot.of(wrapped.snapshot())) == encode(Snapshot.of(plain.snapshot()))
    resumed = GbmCVNNPricer(round_trip(wrapped.snapshot()))
    through_template = GbmCVNNPricer(round_trip(wrapped.snapshot(), wrap(small_config().cvnn)))
    for pricer in (resumed, through_template):
        assert np.array_equal(pricer.predict_price(CONTRACTS), plain.predict_price(CONTRACTS))


def test_a_checkpoint_that_an_earlier_version_made_of_a_compiled_model_is_read() -> None:
    pricer = GbmCVNNPricer(small_config())
    pricer.train(small_training(3))
    snapshot = Snapshot.of(pricer.snapshot())

    def renamed(name: str) -> str:
        kinds = ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
        kind = next((k for k in kinds if name.startswith(k)), None)
        return name if kind is None else f"{kind}_orig_mod.{name.removeprefix(kind)}"

    earlier = Snapshot(
        {renamed(name): tensor for name, tensor in snapshot.tensors.items() if not name.startswith("optimizer.")},
        snapshot.metadata.model_copy(
            update={"model_class": "torch._dynamo.eval_frame.OptimizedModule", "optimizer": None}
        ),
    )
    for template in (None, small_config().cvnn):
        loaded = GbmCVNNPricer(restore(decode(encode(earlier)), template))
        assert np.array_equal(loaded.predict_price(CONTRACTS), pricer.predict_price(CONTRACTS))
