"""The tensors of a tuned model that its adapter has in a form of peft's own, made by peft one module at a time.

The module that an adapter changes is built alone, with the weights of the base in float32; peft puts the adapter on it
and merges it. So no form of adapter is written down here a second time.
"""

import copy
import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.adapter_kinds import NAMING, of_another_model
from perta_fast.checkpoints.adapter_names import PREFIX
from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import is_resized
from perta_fast.errors import InputError
from perta_fast.models.language_part import empty_model
from perta_fast.models.same_names import is_found, named_as_module
from perta_fast.models.stored_names import load_tensor, loaded_tensors, stored_places
from perta_fast.models.untrained_adapters import is_as_before_training

_NAME = "default"  # peft's name for an adapter in memory
# Settings that say which modules an adapter changes. Here that is always the one module that is built.
_WHERE = ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices")


@dataclass(frozen=True)
class _Place:
    """Where a stored tensor lies: ``count`` elements from ``first`` on of a parameter, by path, of a module."""

    module: str
    parameter: str
    first: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def elements(self) -> slice:
        """Its elements among those of the flat parameter."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class MergedByPeft:
    """What peft makes of the modules of a base that an adapter changes.

    places: by the name of a tensor, as the model is stored that it is subtracted from. modules: by path, the adapter's
    tensors for it, by their names in the model.
    """

    adapter: Adapter
    base: Checkpoint
    skeleton: nn.Module
    places: Mapping[str, _Place]
    modules: Mapping[str, Mapping[str, TensorEntry]]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _last: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)  # the module merged last

    @classmethod
    def open(cls, adapter: Adapter, base: Checkpoint, names: Mapping[str, object]) -> "MergedByPeft":
        """Find the modules that ``adapter.by_peft`` changes in the base's model, which is built without weights.

        names: of the tensors of the model that it is subtracted from: the form in which results are wanted.
        One module of each kind is merged, to see early what cannot be. Raises InputError if peft is not installed or
        does not know a setting, the model cannot be built, or a module is not in it or cannot be merged.
        """
        _check_peft(adapter)
        skeleton: nn.Module = empty_model(base.path, torch.float32, whole=True)
        modules = _by_module(adapter, base, skeleton)
        for path, tensors in modules.items():
            _resize_as_adapted(skeleton.get_submodule(path), path, tensors, adapter)
            parameters = dict(skeleton.get_submodule(path).named_parameters())
            if "bias" not in parameters and any(name.endswith(".lora_B.bias") for name in tensors):
                raise InputError(
                    f"{adapter.checkpoint.path}: lora_bias gives {path} a bias, for which the model has no place; "
                    "tune again without lora_bias"
                )
        places = _places(skeleton, modules, names)
        base = named_as_module(base, skeleton, places)
        opened = cls(adapter, base, skeleton, places, modules)
        for path in opened._one_of_each_kind():
            opened.array(next(name for name, place in places.items() if place.module == path))
        return opened

    def array(self, name: str) -> FloatArray:
        """The tuned values of the tensor ``name``, flat, in float32.

        Memory: 3 to 34 times the module in float32, by kind (docs/adapters.md). Raises InputError if the adapter's
        tensors do not fit the module.
        """
        place = self.places[name]
        with self._lock, _quiet():
            if place.module not in self._last:
                self._last.clear()
                self._last[place.module] = self._merged(place.module)
            merged = self._last[place.module][place.parameter]
        values: FloatArray = merged.contiguous().view(-1).numpy()[place.elements]
        return values

    @torch.no_grad()
    def is_untrained(self, name: str) -> bool:
        """Whether the tensor ``name`` is as it was before training, but for rounding. Memory: as in ``array``."""
        place = self.places[name]
        if place.parameter != "weight":
            return False
        entries = self.modules[place.module].items()
        tensors = {name.removeprefix(f"{place.module}."): load_tensor(entry) for name, entry in entries}
        return is_as_before_training(self._with_base_weights(place.module), tensors, self.adapter.settings)

    def _one_of_each_kind(self) -> list[str]:
        """The modules, without those that are like an earlier one in all shapes."""
        kinds: dict[object, str] = {}
        for path, tensors in self.modules.items():
            module = self.skeleton.get_submodule(path)
            own = sorted((name.removeprefix(f"{path}."), entry.shape) for name, entry in tensors.items())
            kind = type(module), tuple(own), tuple(parameter.shape for parameter in module.parameters())
            kinds.setdefault(kind, path)
        return list(kinds.values())

    @torch.no_grad()
    def _merged(self, path: str) -> dict[str, Tensor]:
        """The parameters of a module after merging, by name within it."""
        tensors = {name: load_tensor(entry) for name, entry in self.modules[path].items()}
        module = self._with_base_weights(path)
        own = {name.removeprefix(f"{path}.") for name in tensors}
        parameters = dict(module.named_parameters())
        if own <= parameters.keys():  # saved as a whole
            saved = {name.removeprefix(f"{path}."): tensor.float() for name, tensor in tensors.items()}
            return {name: tensor.detach() for name, tensor in (parameters | saved).items()}
        merged: dict[str, Tensor] = {}
        try:
            merged = _merge(module, path, self._config(path, tensors), tensors)
        except MemoryError:
            raise
        except Exception as error:  # shapes that do not fit, in whatever way peft finds it
            reason = " ".join(str(error).split())
            raise InputError(f"{self.adapter.checkpoint.path}: peft cannot merge {path}: {reason}") from error
        return merged

    def _with_base_weights(self, path: str) -> nn.Module:
        """A copy of a module of the skeleton with the base's values, in float32.

        Rows of a resized vocabulary that the base lacks are those that the adapter was saved with, or zero.
        """
        module: nn.Module = copy.deepcopy(self.skeleton.get_submodule(path)).to_empty(device="cpu").float()
        saved = _saved_base_layer(path, self.modules[path])
        for name, parameter in module.named_parameters():
            parameter.zero_() if saved is None or name != "weight" else parameter.copy_(load_tensor(saved))
            flat = parameter.view(-1)
            for stored, place in self.places.items():
                if (place.module, place.parameter) == (path, name):
                    base_name = self.adapter.name_in(stored, self.base.tensors, self.base.path)
                    values = self.base.tensor(base_name)
                    shape = tuple(values.shape)
                    if shape != place.shape and not is_resized(stored, shape, place.shape):
                        raise InputError(
                            f"{self.base.path}: tensor {base_name} is {list(values.shape)}, its config.json calls for "
                            f"{list(place.shape)}"
                        )
                    common = min(values.numel(), place.count)
                    flat[place.first : place.first + common] = values.view(-1)[:common].float()
        return module

    def _config(self, path: str, tensors: dict[str, Tensor]) -> Any:
        """Peft's settings for one module. LoRA's trainable tokens become an adapter of their own."""
        from peft import PeftConfig, TrainableTokensConfig

        config = PeftConfig.from_pretrained(str(self.adapter.checkpoint.path))
        for name in NAMING:  # without the names of wrappers
            if hasattr(config, name):
                setattr(config, name, self.adapter.settings.get(name) or getattr(config, name))
        of_tokens = f"{path}.token_adapter."
        if f"{of_tokens}trainable_tokens_delta" not in tensors:
            return config
        for name in [name for name in tensors if name.startswith(of_tokens)]:
            tensors[f"{path}.{name.removeprefix(of_tokens)}"] = tensors.pop(name)
        return TrainableTokensConfig(token_indices=_tokens(path, self.adapter), target_modules=[path])


def _places(skeleton: Any, paths: Iterable[str], names: Mapping[str, object]) -> dict[str, _Place]:
    """Where the tensors of the modules at ``paths`` lie, in the form of ``names``, or as they are usually stored."""

    def places() -> dict[str, _Place]:
        return {
            stored: _Place(path, name, first, tuple(shape))
            for path in paths
            for name, parameter in skeleton.get_submodule(path).named_parameters()
            for stored, (first, shape) in stored_places(skeleton, f"{path}.{name}", parameter.shape).items()
        }

    usual, conversions = places(), getattr(skeleton, "_weight_conversions", None)
    if not all(is_found(name, names) for name in usual):
        loaded_tensors(skeleton, names)  # now stored_places gives these names, as of joined experts
        found = places()
        if all(is_found(name, names) for name in found):
            return found
        skeleton._weight_conversions = conversions
    return usual


def _merge(module: nn.Module, path: str, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the adapter on a module that stands alone under its path, merge it, and return the module's parameters."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    _aim(config, path, tuner)
    root = nn.Module()
    parent = root
    *names, last = path.split(".")
    for name in names:
        child = nn.Module()
        parent.add_module(name, child)
        parent = child
    parent.add_module(last, module)
    adapted = tuner(root, config, _NAME)
    expected = get_peft_model_state_dict(root, save_embedding_layers=False).keys()
    given = {name for name in tensors if not name.startswith(f"{path}.base_layer.") or name in expected}
    if odd := sorted(expected ^ given):
        raise ValueError(f"by its settings the adapter should {'' if odd[0] in expected else 'not '}have {odd[0]}")
    set_peft_model_state_dict(root, dict(tensors))
    merged: nn.Module = adapted.merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.get_submodule(path).named_parameters()}


def _aim(config: Any, path: str, tuner: Any) -> None:
    """Change peft's settings so that they mean the module at ``path`` and no other."""
    parameters = getattr(config, "target_parameters", None)
    for name in _WHERE:
        if hasattr(config, name):
            setattr(config, name, None)
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = [path] if tuner._check_target_module_feedforward(config, path) else []
    config.target_modules = [path]
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the values come from the file
    if hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = False
    if parameters:
        chosen = [name for name in parameters if f"{path}.".endswith(f"{name.rpartition('.')[0]}.")]
        config.target_modules, config.target_parameters = ([], chosen) if chosen else ([path], None)


def _tokens(path: str, adapter: Adapter) -> list[int]:
    """The rows of the module at ``path`` that an adapter of trained tokens replaces."""
    settings = adapter.settings
    tokens = settings.get("token_indices" if settings["peft_type"] != "LORA" else "trainable_token_indices") or []
    if isinstance(tokens, dict):
        # A head that is tied to the one embedding that is named has the same tokens.
        otherwise = next(iter(tokens.values())) if len(tokens) == 1 else []
        tokens = next((of for name, of in tokens.items() if f".{path}".endswith(f".{name}")), otherwise)
    return [token for token in tokens if isinstance(token, int)]


def _saved_base_layer(path: str, tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The matrix of the base that peft saved beside what it adds to it, as it does if the vocabulary was resized."""
    names = [f"{path}.{part}base_layer.weight" for part in ("", "token_adapter.")]
    return next((tensors[name] for name in names if name in tensors), None)


def _resize_as_adapted(module: nn.Module, path: str, tensors: Mapping[str, TensorEntry], adapter: Adapter) -> None:
    """Give an embedding or a head of the skeleton the number of rows that it had when the adapter was trained."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding | nn.Linear) or not isinstance(weight, Tensor):
        return
    saved = _saved_base_layer(path, tensors)
    rows, old = weight.shape[0], weight.shape[0]
    if saved is not None and is_resized(f"{path}.weight", tuple(weight.shape), saved.shape):
        rows = saved.shape[0]
    elif any(name.endswith(".trainable_tokens_delta") for name in tensors):
        rows = max([rows, *(token + 1 for token in _tokens(path, adapter))])
    if rows == old:
        return
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(torch.empty(rows, *parameter.shape[1:], device="meta")))
    setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)


def _by_module(adapter: Adapter, base: Checkpoint, skeleton: nn.Module) -> dict[str, dict[str, TensorEntry]]:
    """The tensors that peft understands by the paths of their modules, and by their names in the model.

    The adapter may name a module without the beginning of its path (``model.``), or as ``base`` stores it. Raises
    InputError if a tensor belongs to no module.
    """
    named = skeleton.named_modules(remove_duplicate=False)
    paths = {name for name, module in named if next(module.parameters(recurse=False), None) is not None}
    stored: dict[str, str] | None = None
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in adapter.by_peft.items():
        parts = key.removeprefix(PREFIX).split(".")
        names = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]  # the longest first
        name = next((name for name in names if name in paths), None)
        path = name
        if path is None:
            stored = _stored_modules(base, skeleton) if stored is None else stored
            found = [
                (name, path)
                for name in names
                for path in paths
                if path.endswith(f".{name}") or path == stored.get(name)
            ]
            name, path = found[0] if len(found) == 1 else (None, None)
        if name is None or path is None:
            raise InputError(
                f"{adapter.checkpoint.path}: tensor {entry.name} belongs to no module of the model in {base.path}; "
                f"{of_another_model(adapter.settings)}"
            )
        modules.setdefault(path, {})[f"{path}.{key.removeprefix(PREFIX).removeprefix(f'{name}.')}"] = entry
    return modules


def _stored_modules(base: Checkpoint, skeleton: nn.Module) -> dict[str, str]:
    """The paths of modules by what comes before the last part of their stored tensors' names."""
    loaded = [tensor for tensor in loaded_tensors(skeleton, base.tensors) if tensor.converter is None]
    return {tensor.stored.rpartition(".")[0]: tensor.target.rpartition(".")[0] for tensor in loaded}


def _check_peft(adapter: Adapter) -> None:
    """Raise InputError unless peft is installed and knows all settings of the adapter."""
    kind = adapter.settings["peft_type"]
    if find_spec("peft") is None:
        what = "LoRA with these settings" if kind == "LORA" else kind
        raise InputError(f"{adapter.checkpoint.path}: an adapter of {what} is merged by peft: pip install peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    upgrade = f"peft {version('peft')} does not know it: pip install --upgrade peft"
    if known is None:
        raise InputError(f"{adapter.config}: type {kind}; {upgrade}")
    names = {item.name for item in dataclasses.fields(known)} | {"peft_version", "runtime_config"}
    for name, value in adapter.settings.items():
        if value and name not in names:
            raise InputError(f"{adapter.config}: setting {name}; {upgrade}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings, which are of settings for training, and without traces in the environment.

    BOFT leaves other compilers in it if its extension cannot be built (peft 0.21.2).
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
