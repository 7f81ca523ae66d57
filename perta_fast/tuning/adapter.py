"""A plain LoRA adapter: its task vector is scale · B A of each adapted matrix."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.tuning.saving import disk_errors

# Parts of an expert. In a model whose experts are joined into one parameter, peft takes a linear map of such a name
# as all experts, and adapts that parameter with ranks of its own.
_EXPERT_PARTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def linear_maps(model: Any, adapted: bool = True) -> dict[str, Any]:
    """All linear maps except the output head, by name.

    adapted: those that get an adapter, so not those that peft takes for parts of joined experts.
    """
    from transformers.pytorch_utils import Conv1D

    joined = any(
        parameter.ndim > 2
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not model.get_output_embeddings()
        and not (adapted and joined and name.rpartition(".")[2] in _EXPERT_PARTS)
    }


def share_left_out(model: Any, adapted: bool = True) -> float:
    """The share of the parameters in matrices outside ``linear_maps``; embeddings, head, convolutions do not count."""
    maps = {module.weight for module in linear_maps(model, adapted).values()}
    others = [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding | nn.Conv1d) and module is not model.get_output_embeddings()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1 and parameter not in maps
    ]
    return float(sum(matrix.numel() for matrix in others) / sum(tensor.numel() for tensor in model.parameters()))


def add_adapter(model: Any, rank: int, seed: int) -> Any:
    """``model`` with an adapter on each of its ``linear_maps``; nothing else is trainable.

    The scale is 2 (alpha = 2 · rank), B starts at 0, A is drawn by ``seed``; both are float32. Raises InputError if
    the model has no linear map.
    """
    from peft import LoraConfig, get_peft_model

    maps = linear_maps(model)
    if not maps:
        raise InputError("the model has no linear map to put an adapter on; tune all of it with ‹full›")
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(maps),
        # GPT-2 stores (in, out).
        fan_in_fan_out=not any(isinstance(linear, nn.Linear) for linear in maps.values()),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(model, settings)


def check_adapter(adapted: Any, base: Checkpoint, directory: Path) -> None:
    """Save the adapter, and raise InputError unless ``apply`` finds its tensors in ``base``."""
    save_adapter(adapted, directory)
    shapes = {name: entry.shape for name, entry in base.tensors.items()}
    try:
        Adapter.open(directory).meet(shapes, base.path)
    except InputError as error:
        raise InputError(
            f"{base.path}: transformers gives its tensors other names than they are stored under, so an adapter "
            "would not find them; tune all of it with ‹full›"
        ) from error


def save_adapter(adapted: Any, directory: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
    settings = adapted.peft_config["default"]
    settings.target_modules = sorted(settings.target_modules)  # the order of a set differs between processes
    with disk_errors():
        adapted.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()  # an empty model card
