"""A checkpoint: a pricer's whole state as one safetensors file, and back. No pickle anywhere.

Tensors are named `model.*`, `optimizer.KIND.*`, `scaling.*`, `scaling.errors.*`, `rng.cpu`, `rng.cuda.N`;
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

from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.checkpoint.tensor_file import tensor_from
from smc.checkpoint.tensor_header import TensorHeader, parse_header
from smc.errors import ConfigError, Corrupt
from smc.learning.error_bars import ErrorBars
from smc.learning.modules import check_copyable, is_made_like, unwrapped
from smc.learning.network import CVNN, CVNNConfig, RealNetwork, build_cvnn
from smc.learning.optimizer import OptimizerName, OptimizerState
from smc.learning.plan import TrainingPlan
from smc.learning.scale import Scaling, input_count
from smc.problem.contracts import BoundSpec
from smc.problem.problem import Problem, process_of, product_of
from smc.simulation.config import CONFIG_TAGS, ProblemConfig, SimulationConfig, SimulationParams

__all__ = [
    "CheckpointMetadata",
    "Snapshot",
    "check_described",
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
_ERRORS = "scaling.errors."


class CheckpointMetadata(BaseModel):
    """What a checkpoint says beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = 3
    simulation: SimulationConfig
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
    tensors = {f"model.{name}": value for name, value in unwrapped(config.cvnn).state_dict().items()}
    optimizer = config.optimizer_state
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.tensors.items()}
    if config.scaling is not None:
        tensors |= {f"scaling.{name}": value for name, value in vars(config.scaling).items()}
    if config.error_bars is not None:  # under a name that a served model's hash has always been taken over
        tensors |= {f"{_ERRORS}{name}": value for name, value in vars(config.error_bars).items()}
    if config.torch_cpu_rng_state is not None:
        tensors["rng.cpu"] = _bytes_tensor(config.torch_cpu_rng_state)
    for index, state in enumerate(config.torch_cuda_rng_states):
        tensors[f"rng.cuda.{index}"] = _bytes_tensor(state)
    return tensors


def metadata_of(config: GbmCVNNPricerConfig) -> CheckpointMetadata:
    """What a state's checkpoint says beside the tensors."""
    model = unwrapped(config.cvnn)
    # What a hook or a replaced part does stands in no checkpoint: only a network as build_cvnn makes it is built again.
    network = model.config if isinstance(model, CVNN | RealNetwork) else None
    if network is not None and not is_made_like(model, _outline(config.cfg.sim_params, network, config.cfg.problem)):
        network = None
    optimizer = config.optimizer_state
    return CheckpointMetadata(
        simulation=config.cfg,
        domain=dict(config.domain_bounds),
        network=network,
        model_class=_class_name(type(model)),
        global_step=config.global_step,
        sobol_skip=config.sobol_skip,
        optimizer=optimizer.name if optimizer is not None else None,
        optimizer_step=optimizer.step if optimizer is not None else 0,
        plan=config.plan,
        libraries=_libraries(),
    )


def _class_name(kind: type[nn.Module]) -> str:
    """The name that users import; that of our own networks is the same wherever their code stands."""
    return f"{kind.__module__}.{kind.__qualname__}".replace("smc.learning.network.", "smc.cvnn.")


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
        _check_kinds(fields)
        return CheckpointMetadata.model_validate_json(text)
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"checkpoint metadata is not JSON ({error})") from None
    except ValidationError as error:
        where = tuple(part for part in error.errors()[0]["loc"] if part not in CONFIG_TAGS)
        raise Corrupt(f"checkpoint metadata: {where}: {error.errors()[0]['msg']}") from None


def _check_kinds(fields: Any) -> None:
    """Raises: ConfigError for a process or a product that is not known here: nothing that a file names is imported."""
    simulation = fields.get("simulation") if isinstance(fields, dict) else None
    for part, made in (("process", process_of), ("product", product_of)):
        if isinstance(simulation, dict) and isinstance(settings := simulation.get(part), dict):
            made(settings)


def restore(
    snapshot: Snapshot,
    model_template: nn.Module | None = None,
    config_template: GbmCVNNPricerConfig | None = None,
) -> GbmCVNNPricerConfig:
    """The state in a snapshot, ready for `GbmCVNNPricer(...)`.

    `model_template` gives the architecture and the device; it is not changed. Without it the network is
    built from the checkpoint, on the CPU. `config_template` must describe the same simulation and domain.
    Raises: ConfigError naming the first thing that does not fit; Corrupt if the checkpoint contradicts itself.
    """
    snapshot = _without_wrapper(snapshot)
    metadata, tensors = snapshot.metadata, snapshot.tensors
    state = _named(tensors, "model.", torch.device("cpu"))
    if model_template is not None:
        _check_class(metadata, unwrapped(model_template))
        check_copyable(unwrapped(model_template))
        model = copy.deepcopy(unwrapped(model_template))
        _check_fits(model, state, "model_template does not fit the checkpoint", ConfigError)
    else:
        model = _described(snapshot).to_empty(device="cpu")
    model.load_state_dict(state)
    if config_template is not None:
        _check_same(metadata, config_template)
    device = next(model.parameters()).device
    scaling = _scaling(snapshot, device)
    optimizer = None
    if metadata.optimizer is not None:
        moments = _named(tensors, "optimizer.", device)
        optimizer = OptimizerState(metadata.optimizer, metadata.optimizer_step, moments)
    cuda_states = [f"rng.cuda.{i}" for i in range(sum(name.startswith("rng.cuda.") for name in tensors))]
    if missing := [name for name in cuda_states if name not in tensors]:
        raise Corrupt(f"the checkpoint contradicts itself: it has no {missing[0]!r}, and other states of CUDA devices")
    return GbmCVNNPricerConfig(
        cfg=metadata.simulation,
        domain_bounds=metadata.domain,
        cvnn=model,
        optimizer_state=optimizer,
        global_step=metadata.global_step,
        sobol_skip=metadata.sobol_skip,
        torch_cpu_rng_state=_tensor_bytes(tensors["rng.cpu"]) if "rng.cpu" in tensors else None,
        torch_cuda_rng_states=[_tensor_bytes(tensors[name]) for name in cuda_states],
        scaling=scaling,
        error_bars=_error_bars(snapshot, device),
        plan=metadata.plan,
    )


def _scaling(snapshot: Snapshot, device: torch.device) -> Scaling | None:
    bins = snapshot.metadata.simulation.sim_params.bins
    found = _named(snapshot.tensors, "scaling.", device)
    found = {name: value for name, value in found.items() if not f"scaling.{name}".startswith(_ERRORS)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    # What a prediction allocates for each contract follows from the number of bins.
    if found and shapes != {"mean": (bins, 2), "spread": (bins,)}:
        raise Corrupt(f"the checkpoint contradicts itself: its spectrum has {bins} bins, its scaling is {shapes}")
    return Scaling(**found) if found else None


def _error_bars(snapshot: Snapshot, device: torch.device) -> ErrorBars | None:
    found = _named(snapshot.tensors, _ERRORS, device)
    if not found:
        return None
    inputs = input_count(snapshot.metadata.simulation.problem)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != ErrorBars.shapes(inputs) or any(tensor.dtype != torch.float64 for tensor in found.values()):
        raise Corrupt(f"the checkpoint contradicts itself: its network sees {inputs} features, its error bars {shapes}")
    return ErrorBars(**found)


def _without_wrapper(snapshot: Snapshot) -> Snapshot:
    """A snapshot as it would be without torch.compile, whose wrapper earlier versions left in the names."""
    wrapper = "_orig_mod."
    if not any(name.startswith(f"model.{wrapper}") for name in snapshot.tensors):
        return snapshot
    tensors = {name.replace(wrapper, "", 1): tensor for name, tensor in snapshot.tensors.items()}
    return Snapshot(tensors, snapshot.metadata)


def _check_class(metadata: CheckpointMetadata, template: nn.Module) -> None:
    """Raises: ConfigError if the template is of another class than what was trained, whatever file it is in today."""
    trained, given = metadata.model_class.rpartition(".")[2], type(template).__name__
    if trained not in (given, "OptimizedModule"):
        raise ConfigError(
            f"model_template is a {given}, the checkpoint's model a {metadata.model_class}: another class may compute "
            "something else from the same tensors"
        )


def check_described(snapshot: Snapshot) -> None:
    """Check that a checkpoint's tensors are those of the network that it describes, where it describes one.

    Raises: Corrupt naming the first that is not.
    """
    if snapshot.metadata.network is not None:
        _described(_without_wrapper(snapshot))


def _described(snapshot: Snapshot) -> nn.Module:
    """The network that a checkpoint describes, without memory for its parameters.

    The description is a few bytes and may ask for any size, so it is compared with the tensors that are there before
    anything is allocated on its word. Raises: Corrupt if they differ, ConfigError if it describes none.
    """
    metadata, shapes = snapshot.metadata, snapshot.tensors
    if metadata.network is None:
        ours = metadata.model_class in {_class_name(kind) for kind in (CVNN, RealNetwork)}
        why = "changed since build_cvnn made it, which no checkpoint holds" if ours else "which build_cvnn did not make"
        raise ConfigError(f"the checkpoint's model is a {metadata.model_class}, {why}: pass one as model_template")
    state = {name.removeprefix("model."): tensor for name, tensor in shapes.items() if name.startswith("model.")}
    if len(metadata.network.hidden) >= len(state):
        raise Corrupt(
            f"the checkpoint contradicts itself: its network has {len(metadata.network.hidden)} hidden layers, "
            f"its model {len(state)} tensors"
        )
    model = copy.deepcopy(_outline(metadata.simulation.sim_params, metadata.network, metadata.simulation.problem))
    _check_fits(model, state, "the checkpoint contradicts itself", Corrupt)
    return model


@lru_cache(maxsize=16)
def _outline(params: SimulationParams, network: CVNNConfig, problem: Problem) -> nn.Module:
    """The network that these settings describe, without memory for its parameters."""
    input_count(problem)  # is counted, once, on a contract that exists
    with torch.device("meta"):
        return build_cvnn(params, network, problem)


def _check_fits(
    model: nn.Module, state: Mapping[str, Tensor], what: str, error: type[ConfigError] | type[Corrupt]
) -> None:
    """Compare names, shapes and types of a model's state with those in a checkpoint. Raises: `error`."""
    own = model.state_dict()
    whose, short = ("model_template", "template") if error is ConfigError else ("its description", "description")
    for name in sorted(set(own) | set(state)):
        here, there = own.get(name), state.get(name)
        if here is None or there is None:
            raise error(f"{what}: {name!r} is only in {'the checkpoint' if here is None else whose}")
        if here.shape != there.shape or here.dtype != there.dtype:
            raise error(
                f"{what}: {name!r} is {tuple(here.shape)} {here.dtype} in the {short} and {tuple(there.shape)} "
                f"{there.dtype} in the checkpoint"
            )


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
    trained = metadata.simulation
    if isinstance(template.cfg, ProblemConfig):
        trained = template.cfg.compared_with(trained)
    if template.cfg.problem != trained.problem:
        raise ConfigError(
            f"config_template.cfg is about {template.cfg.problem}, the checkpoint was trained on "
            f"{metadata.simulation.problem}"
        )
    ours, theirs = (config.model_dump(mode="json") for config in (template.cfg, trained))
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
