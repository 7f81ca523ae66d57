"""The parts of a causal language model, from its configuration alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.checkpoints.quantised import refuse_quantised
from perta_fast.errors import InputError, NotStreamable
from perta_fast.models.language_part import empty_model, own_type
from perta_fast.models.running_type import running_type
from perta_fast.ops.backends import DTYPE_CODES

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Structure:
    """A model on the meta device and its parts, each a list of parameter names.

    path: of its configuration. own: the type of its checkpoint; it may run in another. by_layer: the parameters of each
    decoder layer. embedding, head: the two matrices of vocabulary size; the same name if they are tied, None if there
    is no head. resident: all others, which are small and always in memory.
    """

    path: Path
    own: torch.dtype
    model: nn.Module
    layers: nn.ModuleList
    by_layer: list[list[str]]
    embedding: str
    head: str | None
    resident: list[str]

    @classmethod
    def build(
        cls,
        path: Path,
        dtype: torch.dtype | None = None,
        default: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> "Structure":
        """Build the model that ``config.json`` in ``path`` describes, without memory for weights or buffers.

        dtype: in which it runs; None takes what ``running_type`` makes of its own type on ``device``. default: its own
        type if the configuration names none. Raises InputError, naming what was looked for, if the model cannot be
        built or its decoder layers cannot be found.
        """
        refuse_quantised(path, {})
        own = own_type(path, default)
        model = _build(path, dtype or running_type(own, device))
        layers, prefix = _decoder_layers(model, path)
        by_layer: list[list[str]] = [[] for _ in layers]
        outside = []
        names = {parameter: name for name, parameter in model.named_parameters()}
        for name in names.values():
            if name.startswith(prefix):
                by_layer[int(name[len(prefix) :].split(".")[0])].append(name)
            else:
                outside.append(name)
        embedding = names[_weight(model.get_input_embeddings(), "input embedding", path)]
        output = model.get_output_embeddings()
        head = None if output is None else names[_weight(output, "output head", path)]
        resident = [name for name in outside if name not in (embedding, head)]
        return cls(path, own, model, layers, by_layer, embedding, head, resident)

    @property
    def tied(self) -> bool:
        """Whether input embedding and output head are one matrix."""
        return self.embedding == self.head

    @property
    def vocabulary(self) -> list[str]:
        """The matrices of vocabulary size, without repetition."""
        return list(dict.fromkeys(filter(None, [self.embedding, self.head])))

    @property
    def parts(self) -> list[list[str]]:
        """The parts in the order in which their means are complete: untied head, layers from the last, the rest."""
        head = [] if self.head is None or self.tied else [[self.head]]
        return [*head, *reversed(self.by_layer), [*self.resident, self.embedding]]

    @property
    def embedding_module(self) -> nn.Module:
        """The input embedding."""
        module: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return module


def _build(path: Path, dtype: torch.dtype) -> Any:
    model = empty_model(path, dtype)
    dtype, config = model.dtype, model.config
    if dtype not in DTYPE_CODES:
        raise InputError(f"{path}: would run in {dtype}; it must be float32, bfloat16 or float16")
    if config.is_encoder_decoder:
        raise NotStreamable(f"{path}: has an encoder and a decoder; streaming walks through a decoder alone")
    return model.eval()


def _decoder_layers(model: nn.Module, path: Path) -> tuple[nn.ModuleList, str]:
    """The list of decoder layers and the prefix of their parameters."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            lists[name] = module
    if len(lists) != 1 or len({type(layer) for layer in next(iter(lists.values()))}) != 1:
        raise NotStreamable(
            f"{path}: looked for one list of {count} equal decoder layers in {type(model).__name__}, "
            f"found {', '.join(lists) or 'none'}; streaming does not understand this model"
        )
    ((name, layers),) = lists.items()
    return layers, f"{name}."


def _weight(module: nn.Module, what: str, path: Path) -> Any:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise NotStreamable(f"{path}: looked for the weight of its {what}, found none")
    return weight
