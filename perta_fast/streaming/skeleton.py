"""A causal language model without its weights, which are read when their turn comes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoint import Checkpoint, conversion_command
from perta_fast.dtypes import KERNEL_CODES
from perta_fast.errors import InputError
from perta_fast.importance.stored_names import as_stored
from perta_fast.ops.backends import DTYPE_CODES


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and the checkpoint that holds its weights.

    ``stored`` maps parameters to tensors of the checkpoint, in the order that an importance lists them.
    ``by_layer`` names the parameters of each decoder layer, ``embedding`` and ``head`` the two matrices of
    vocabulary size (one name if they are tied; None if there is no head), ``resident`` all others: small, so
    always in memory.
    """

    model: nn.Module
    checkpoint: Checkpoint
    device: torch.device
    layers: nn.ModuleList
    stored: dict[str, str]
    by_layer: list[list[str]]
    embedding: str
    head: str | None
    resident: list[str]

    @classmethod
    def open(cls, path: Path, device: torch.device, dtype: torch.dtype | None) -> "Skeleton":
        """Build the model that ``config.json`` describes, with no memory for its weights.

        dtype: what it is run in; None takes the checkpoint's own. Raises InputError for a model whose decoder
        layers or tensors cannot be told apart, naming what was looked for.
        """
        checkpoint = Checkpoint.open(path)
        model = _build(checkpoint, dtype)
        _compute_buffers(model, device, path)
        layers, prefix = _decoder_layers(model, path)
        stored = _stored_names(model, checkpoint)
        by_layer: list[list[str]] = [[] for _ in layers]
        outside = []
        for name in stored:
            if name.startswith(prefix):
                by_layer[int(name[len(prefix) :].split(".")[0])].append(name)
            else:
                outside.append(name)
        names = {parameter: name for name, parameter in model.named_parameters()}
        embedding = names[_weight(model.get_input_embeddings(), "input embedding", path)]
        output = model.get_output_embeddings()
        head = None if output is None else names[_weight(output, "output head", path)]
        resident = [name for name in outside if name not in (embedding, head)]
        return cls(model, checkpoint, device, layers, stored, by_layer, embedding, head, resident)

    @property
    def tied(self) -> bool:
        """Whether input embedding and output head are one matrix."""
        return self.embedding == self.head

    @property
    def vocabulary(self) -> list[str]:
        """The matrices of vocabulary size, each once."""
        return list(dict.fromkeys(filter(None, [self.embedding, self.head])))

    @property
    def embedding_part(self) -> nn.Module:
        """The module that looks tokens up."""
        part: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return part

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint that an importance covers, in its order."""
        return {tensor: self.checkpoint.tensors[tensor].shape for tensor in self.stored.values()}

    def as_stored(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means of whole parts, by parameter name, under the names of the stored tensors."""
        return {self.stored[name]: mean for name, mean in means.items()}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The values of parameters, from the shards."""
        dtype = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        return {name: self.checkpoint.tensor(self.stored[name]).to(dtype[name]) for name in names}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters have these values while the context lasts."""
        places: dict[Any, list[tuple[nn.Module, str]]] = {}
        before = {p: name for name, p in self.model.named_parameters() if name in values}
        for part in self.model.modules():
            for key, parameter in part._parameters.items():
                if parameter in before:
                    places.setdefault(parameter, []).append((part, key))
        try:
            for parameter, uses in places.items():
                value = nn.Parameter(values[before[parameter]].to(self.device))
                for part, key in uses:
                    part._parameters[key] = value
            yield
        finally:
            for parameter, uses in places.items():
                for part, key in uses:
                    part._parameters[key] = parameter

    @contextmanager
    def in_memory(self, names: Sequence[str]) -> Iterator[None]:
        """The parameters ``names`` have their values while the context lasts."""
        with self.holding(self.read(names)):
            yield


def _build(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint.path
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        dtype = dtype or config.dtype or _first_type(checkpoint)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a damaged configuration shows in many ways
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise InputError(f"{path}: transformers cannot build this model: {reason}") from error
    if dtype not in DTYPE_CODES:
        raise InputError(f"{path}: would run in {dtype}; it must be float32, bfloat16 or float16")
    if config.is_encoder_decoder:
        raise InputError(f"{path}: has an encoder and a decoder; streaming walks through a decoder alone")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{path}: is quantized; streaming needs float32, bfloat16 or float16 weights")
    apart = [
        *(model._keep_in_fp32_modules if dtype == torch.float16 else ()),
        *(model._keep_in_fp32_modules_strict if dtype != torch.float32 else ()),
    ]
    if apart:
        raise InputError(
            f"{path}: keeps {min(apart)} in float32; streaming runs a model in one type: use float32"
        )
    return model.eval()


def _first_type(checkpoint: Checkpoint) -> torch.dtype | None:
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((types[entry.dtype] for entry in checkpoint.tensors.values() if entry.dtype in types), None)


def _compute_buffers(model: nn.Module, device: torch.device, path: Path) -> None:
    """Let the model's own code fill the buffers that no checkpoint stores (rotary frequencies and the like)."""
    persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    if persistent:
        raise InputError(
            f"{path}: keeps {min(persistent)} beside its parameters, which streaming does not read"
        )
    for part in model.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                unset = float("nan") if buffer.is_floating_point() else 0
                part._buffers[key] = torch.full_like(buffer, unset, device=device)
        part.__dict__.pop("_is_hf_initialized", None)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise InputError(f"{path}: nothing gives buffer {name} a value without the weights")


def _decoder_layers(model: nn.Module, path: Path) -> tuple[nn.ModuleList, str]:
    """The list of decoder layers and the prefix of their parameters."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(part, nn.ModuleList) and len(part) == count and not inside:
            found[name] = part
    if len(found) != 1 or len({type(layer) for layer in next(iter(found.values()))}) != 1:
        raise InputError(
            f"{path}: looked for one list of {count} equal decoder layers in {type(model).__name__}, "
            f"found {', '.join(found) or 'none'}; streaming does not understand this model"
        )
    ((name, layers),) = found.items()
    return layers, f"{name}."


def _stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Which tensor of the checkpoint is which parameter. Raises InputError unless it is one for one."""
    from transformers.core_model_loading import dot_natural_key

    path = checkpoint.path
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = {id(tensor): name for name, tensor in parameters.items()}
    stored = {names.get(id(tensor)): name for name, tensor in as_stored(model, dict(parameters)).items()}
    joined = parameters.keys() - stored.keys()
    if joined:
        raise InputError(
            f"{path}: {min(joined)} is cut or joined with others when it is stored; "
            "streaming reads parameters that are stored one for one"
        )
    result = {name: stored[name] for name in sorted(parameters, key=dot_natural_key)}  # as from a loaded model
    absent = set(result.values()) - checkpoint.tensors.keys()
    if absent:
        raise InputError(
            f"{path}: lacks tensor {min(absent)}, the name that transformers now gives to one of its own; "
            f"save it anew with: {conversion_command(path)}"
        )
    for name, tensor in result.items():
        entry = checkpoint.tensors[tensor]
        if entry.shape != tuple(parameters[name].shape):
            raise InputError(
                f"{path}: tensor {tensor} is {list(entry.shape)}, config.json calls for "
                f"{list(parameters[name].shape)}"
            )
        if entry.dtype not in KERNEL_CODES:
            raise InputError(f"{path}: tensor {tensor} is {entry.dtype}, not floating point")
    first = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = result[first[parameter]]
        if name not in result and name in checkpoint.tensors and not checkpoint.equal(name, tensor):
            raise InputError(f"{path}: {name} and {tensor} differ, but config.json ties them")
    return result


def _weight(part: nn.Module, what: str, path: Path) -> Any:
    weight = getattr(part, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise InputError(f"{path}: looked for the weight of its {what}, found none")
    return weight
