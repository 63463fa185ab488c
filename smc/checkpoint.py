"""A checkpoint: a pricer's whole state as one safetensors file, and back. No pickle anywhere.

Tensors are named `model.*`, `optimizer.KIND.*`, `scaling.*`, `rng.cpu`, `rng.cuda.N`;
everything else is JSON in the file's metadata. The bytes depend on the state alone, so equal states have
equal content hashes.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata as packages
from typing import Any, Literal

import numpy as np
import orjson
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from smc.contracts import BoundSpec
from smc.cvnn import CVNNConfig, build_cvnn
from smc.errors import ConfigError, Corrupt
from smc.gbm import BlackScholesConfig
from smc.optimizer import OptimizerName, OptimizerState
from smc.pricer_config import GbmCVNNPricerConfig
from smc.scaling import Scaling
from smc.tensor_file import tensor_from
from smc.tensor_header import TensorHeader, parse_header
from smc.training import TrainingPlan

__all__ = [
    "CheckpointMetadata",
    "Snapshot",
    "decode",
    "decode_parts",
    "encode",
    "first_difference",
    "metadata_fields",
    "metadata_of",
    "read_metadata",
    "restore",
    "tensors_of",
]

_METADATA_KEY = "spectralmc"


class CheckpointMetadata(BaseModel):
    """What a checkpoint says beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = 3
    simulation: BlackScholesConfig
    domain: dict[str, BoundSpec]
    network: CVNNConfig | None = Field(description="None for a model that build_cvnn did not make")
    model_class: str
    global_step: int = Field(ge=0)
    sobol_skip: int = Field(ge=0)
    optimizer: OptimizerName | None
    optimizer_step: int = Field(ge=0)
    plan: TrainingPlan | None
    libraries: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """Detached tensors and metadata of one step; nothing that training does later can change it."""

    tensors: Mapping[str, Tensor]
    metadata: CheckpointMetadata

    @classmethod
    def of(cls, config: GbmCVNNPricerConfig) -> Snapshot:
        """A copy of this state, tensors cloned where they live."""
        return cls({name: value.detach().clone() for name, value in tensors_of(config).items()}, metadata_of(config))


def tensors_of(config: GbmCVNNPricerConfig) -> dict[str, Tensor]:
    """A state's tensors by their names in a checkpoint, by reference: the next step changes them."""
    tensors = {f"model.{name}": value for name, value in config.cvnn.state_dict().items()}
    optimizer = config.optimizer_state
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.tensors.items()}
    if config.scaling is not None:
        tensors |= {f"scaling.{name}": value for name, value in vars(config.scaling).items()}
    if config.torch_cpu_rng_state is not None:
        tensors["rng.cpu"] = _bytes_tensor(config.torch_cpu_rng_state)
    for index, state in enumerate(config.torch_cuda_rng_states):
        tensors[f"rng.cuda.{index}"] = _bytes_tensor(state)
    return tensors


def metadata_of(config: GbmCVNNPricerConfig) -> CheckpointMetadata:
    """What a state's checkpoint says beside the tensors."""
    network = getattr(config.cvnn, "config", None)
    optimizer = config.optimizer_state
    return CheckpointMetadata(
        simulation=config.cfg,
        domain=dict(config.domain_bounds),
        network=network if isinstance(network, CVNNConfig) else None,
        model_class=f"{type(config.cvnn).__module__}.{type(config.cvnn).__qualname__}",
        global_step=config.global_step,
        sobol_skip=config.sobol_skip,
        optimizer=optimizer.name if optimizer is not None else None,
        optimizer_step=optimizer.step if optimizer is not None else 0,
        plan=config.plan,
        libraries=_libraries(),
    )


def metadata_fields(metadata: CheckpointMetadata) -> dict[str, str]:
    """The metadata as the file has it: one key, as safetensors keeps several in no fixed order."""
    text = orjson.dumps(metadata.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS).decode()
    return {_METADATA_KEY: text}


def encode(snapshot: Snapshot) -> bytes:
    """The checkpoint file. Equal snapshots give equal bytes."""
    on_cpu = {name: value.cpu().contiguous() for name, value in snapshot.tensors.items()}
    return safetensors.torch.save(on_cpu, metadata=metadata_fields(snapshot.metadata))


def decode(data: bytes | bytearray) -> Snapshot:
    """The snapshot in a checkpoint file.

    Raises: Corrupt if these bytes are no checkpoint, ConfigError if another version of the format wrote them.
    """
    metadata = read_metadata(parse_header(data, len(data)))
    try:
        tensors = safetensors.torch.load(data)  # type: ignore[arg-type]  # any buffer will do
    except safetensors.SafetensorError as error:
        raise Corrupt(f"not a checkpoint: {error!r}") from None
    return Snapshot(tensors, metadata)


def decode_parts(header: TensorHeader, parts: Mapping[str, memoryview]) -> Snapshot:
    """The snapshot of some of a file's tensors, given their bytes. Raises: as `decode`."""
    metadata = read_metadata(header)
    return Snapshot({name: tensor_from(header.places[name], data) for name, data in parts.items()}, metadata)


def read_metadata(header: TensorHeader) -> CheckpointMetadata:
    """What a checkpoint says beside its tensors.

    Raises: Corrupt if it does not say it, ConfigError if another version of the format wrote it.
    """
    text = header.metadata.get(_METADATA_KEY)
    if text is None:
        raise Corrupt(f"not a checkpoint: it has no {_METADATA_KEY!r} in its metadata")
    try:
        fields = orjson.loads(text)
        if isinstance(fields, dict) and (written := fields.get("format")) != 3:
            raise ConfigError(f"the checkpoint has format {written}, this version of spectralmc reads format 3")
        return CheckpointMetadata.model_validate_json(text)
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"checkpoint metadata is not JSON ({error})") from None
    except ValidationError as error:
        raise Corrupt(f"checkpoint metadata: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def restore(
    snapshot: Snapshot,
    model_template: nn.Module | None = None,
    config_template: GbmCVNNPricerConfig | None = None,
) -> GbmCVNNPricerConfig:
    """The state in a snapshot, ready for `GbmCVNNPricer(...)`.

    `model_template` gives the architecture and the device; it is not changed. Without it the network is
    built from the checkpoint, on the CPU. `config_template` must describe the same simulation and domain.
    Raises: ConfigError naming the first thing that does not fit.
    """
    metadata, tensors = snapshot.metadata, snapshot.tensors
    model = _model(metadata, model_template)
    _load(model, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    if config_template is not None:
        _check_same(metadata, config_template)
    device = next(model.parameters()).device
    scaling = _named(tensors, "scaling.", device)
    optimizer = None
    if metadata.optimizer is not None:
        moments = _named(tensors, "optimizer.", device)
        optimizer = OptimizerState(metadata.optimizer, metadata.optimizer_step, moments)
    cuda_states = sorted((n for n in tensors if n.startswith("rng.cuda.")), key=lambda n: int(n[9:]))
    return GbmCVNNPricerConfig(
        cfg=metadata.simulation,
        domain_bounds=metadata.domain,
        cvnn=model,
        optimizer_state=optimizer,
        global_step=metadata.global_step,
        sobol_skip=metadata.sobol_skip,
        torch_cpu_rng_state=_tensor_bytes(tensors["rng.cpu"]) if "rng.cpu" in tensors else None,
        torch_cuda_rng_states=[_tensor_bytes(tensors[name]) for name in cuda_states],
        scaling=Scaling(**scaling) if scaling else None,
        plan=metadata.plan,
    )


def _model(metadata: CheckpointMetadata, template: nn.Module | None) -> nn.Module:
    if template is not None:
        return copy.deepcopy(template)
    if metadata.network is None:
        raise ConfigError(
            f"the checkpoint's model is a {metadata.model_class}, which build_cvnn did not make: "
            "pass one as model_template"
        )
    return build_cvnn(metadata.simulation.sim_params, metadata.network)


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name in sorted(set(own) | set(state)):
        here, there = own.get(name), state.get(name)
        if here is None or there is None:
            where = "the checkpoint" if here is None else "model_template"
            raise ConfigError(f"model_template does not fit the checkpoint: {name!r} is only in {where}")
        if here.shape != there.shape or here.dtype != there.dtype:
            raise ConfigError(
                f"model_template does not fit the checkpoint: {name!r} is {tuple(here.shape)} {here.dtype} "
                f"in the template and {tuple(there.shape)} {there.dtype} in the checkpoint"
            )
    model.load_state_dict(state)


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Collection[str] = (), above: str = ""
) -> tuple[str, Any, Any] | None:
    """The first of nested settings, by its dotted name, that differs, with both values; None if there is none."""
    for name, value in ours.items():
        path, other = above + name, theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if (found := first_difference(value, other, ignored, f"{path}.")) is not None:
                return found
        elif path not in ignored and value != other:
            return path, value, other
    return None


def _check_same(metadata: CheckpointMetadata, template: GbmCVNNPricerConfig) -> None:
    ours, theirs = (config.model_dump(mode="json") for config in (template.cfg, metadata.simulation))
    if (found := first_difference(ours, theirs, {"sim_params.skip"})) is not None:
        name, value, other = found
        raise ConfigError(f"config_template.cfg.{name} is {value!r}, the checkpoint was trained with {other!r}")
    if template.domain_bounds and dict(template.domain_bounds) != metadata.domain:
        raise ConfigError("config_template.domain_bounds differ from those the checkpoint was trained with")


def _named(tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


@lru_cache(maxsize=1)
def _libraries() -> dict[str, str]:
    versions = {name: packages.version(name) for name in ("numpy", "scipy", "safetensors")}
    return {"python": platform.python_version(), "torch": torch.__version__, **versions}
