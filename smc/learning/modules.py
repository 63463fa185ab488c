"""What is done with any network that a user gives: it is asked unchanged, looked at through wrappers, and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smc.errors import ConfigError

__all__ = ["check_copyable", "check_trainable", "evaluating", "is_made_like", "training", "unwrapped"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)

_EVERY_MODULE_HAS = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_torch_compile"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that change nothing of what it computes: torch.compile's, those for several GPUs."""
    while True:
        inner = getattr(model, "_orig_mod", None) if hasattr(model, "_orig_mod") else None
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_made_like(model: nn.Module, other: nn.Module) -> bool:
    """Whether a module computes what another one does, apart from the values of its parameters.

    Its parts have the same names, classes and attributes; none has a hook, a parametrization or a replaced method.
    """
    parts, others = dict(model.named_modules()), dict(other.named_modules())
    return parts.keys() == others.keys() and all(
        type(part) is type(others[name])
        and _own(part) == _own(others[name])
        and not any(getattr(part, hooks, None) for hooks in _HOOKS)
        and not parametrize.is_parametrized(part)
        for name, part in parts.items()
    )


def check_copyable(model: nn.Module) -> None:
    """Raises: ConfigError for a method replaced on an instance: in a copy it would still read the original."""
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            replaced = callable(value) and callable(getattr(type(part), attribute, None))
            if replaced and not isinstance(getattr(value, "__self__", None), nn.Module):
                where = f"{type(part).__name__}.{attribute}" + (f" of {name}" if name else "")
                raise ConfigError(
                    f"{where} was replaced on the instance; snapshots and served models are copies, in which it would "
                    "still read the parameters of the original: define a subclass"
                )


def _own(module: nn.Module) -> dict[str, Any]:
    """What stands in an instance beside what every module has and what torch.compile adds."""
    return {name: value for name, value in vars(module).items() if name not in _EVERY_MODULE_HAS}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode: dropout drops nothing and no statistics move. Afterwards every part is in its mode again."""
    with _in_mode(model, model.training or any(module.training for module in model.modules()), False):
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """In training mode, if the module as a whole is not; a part that somebody froze in a training module stays so."""
    with _in_mode(model, not model.training, True):
        yield


@contextmanager
def _in_mode(model: nn.Module, change: bool, mode: bool) -> Iterator[None]:
    if not change:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, was in modes:  # parents come first, and what they set in their parts is set again after them
            if module.training != was:
                module.train(was)


def check_trainable(model: nn.Module, inputs: Tensor, differential: bool) -> None:
    """Check that a module can be trained and saved as asked, on a copy of it.

    Shapes: inputs (n, features). Raises: ConfigError saying what cannot be done and what would do.
    """
    name = type(unwrapped(model)).__name__
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{name} cannot be trained: all its parameters are frozen; set requires_grad on some")
    for key, value in unwrapped(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{name} cannot be saved: {key!r} of its state is a {type(value).__name__}, and a checkpoint holds "
                "tensors alone; let get_extra_state return a tensor, or leave it out"
            )
    probe = _copied(unwrapped(model), name).train(model.training)

    def outputs(values: Tensor) -> Tensor:
        return torch.stack(tuple(probe(values, torch.zeros_like(values))), dim=-1)

    def plain() -> Tensor:
        return outputs(inputs).square().sum()

    def with_slopes() -> Tensor:
        value, slope = torch.func.jvp(outputs, (inputs,), (torch.ones_like(inputs),))  # type: ignore[misc]
        return value.square().sum() + slope.square().sum()

    with torch.enable_grad(), torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        _tried(plain, f"{name} cannot be trained", "")
        _copied(probe, name)
        if differential:
            _tried(
                with_slopes,
                f"{name} cannot be trained with derivatives as labels (differential above 0)",
                ": they are taken in forward mode, in which buffers cannot be written and some layers have no rule. "
                "Train with differential=0, or use layers without state, like LayerNorm in place of BatchNorm",
            )


def _copied(model: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be copied, as a snapshot has to be: {_first_line(error)} (of weight_norm and "
            "spectral_norm, use those in torch.nn.utils.parametrizations)"
        ) from None


def _tried(loss: Callable[[], Tensor], what: str, why: str) -> None:
    try:
        torch.autograd.backward(loss())
    except Exception as error:
        raise ConfigError(f"{what} ({_first_line(error)}){why}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
