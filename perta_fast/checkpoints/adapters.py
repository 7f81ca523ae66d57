"""Adapters as peft saves them: a task vector that is stored as factors, as whole tensors, or in a form of peft's own.

Plain LoRA (arXiv 2106.09685) is read without peft: it adds scale * b @ a to a matrix, and the subtraction forms this
product a chunk at a time.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapter_kinds import (
    STEM,
    Settings,
    all_by_peft,
    holds_target_parameter,
    of_another_model,
    read_settings,
    some_by_peft,
)
from perta_fast.checkpoints.adapter_names import PREFIX, peft_names
from perta_fast.checkpoints.advice import GATHER_FIRST, float32_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import RESIZED, is_output_head, is_resized, tied_partner
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG, shard_number
from perta_fast.dtypes import COPIED, KERNEL_CODES
from perta_fast.errors import InputError

_LORA = re.compile(r"(?P<module>.+?)\.(?P<part>(?:base_layer\.)*(?:lora_|token_adapter\.).+)")
_FACTOR = re.compile(r"lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")
_WRAPPED = ".base_layer."  # peft's name for the layer that it adds to


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: header and config are read and checked.

    low_rank: by the name of the weight to add to. whole: tensors saved in full (``modules_to_save``, biases).
    untouched: matrices of the base that were saved beside their factors. Names are those of the model in memory
    that the adapter was trained on. by_peft: the tensors that only peft understands, by peft's names.
    """

    checkpoint: Checkpoint
    settings: Settings = field(repr=False)
    low_rank: Mapping[str, LowRank] = field(repr=False)
    whole: Mapping[str, TensorEntry] = field(repr=False)
    untouched: Mapping[str, TensorEntry] = field(repr=False)
    by_peft: Mapping[str, TensorEntry] = field(repr=False)
    base: Path | None = None

    @classmethod
    def open(cls, path: str | Path, base: Path | None = None) -> "Adapter":
        """Read config and header of an adapter. base: the checkpoint that it was tuned from, for advice.

        Raises InputError, naming file and tensor or setting, for whatever is missing or malformed, and for
        adapters whose kind is not taken.
        """
        path = Path(path)
        settings = read_settings(path, base)
        checkpoint = Checkpoint.open(path, STEM)
        _check_tensors(checkpoint, COPIED if settings["peft_type"] != "LORA" else frozenset())
        tensors = {new: checkpoint.tensors[name] for new, name in peft_names(checkpoint.tensors, path).items()}
        if settings["peft_type"] != "LORA":
            return cls(checkpoint, settings, {}, {}, {}, tensors, base)
        modules, others = _by_module(tensors)
        low_rank: dict[str, LowRank] = {}
        by_peft: dict[str, TensorEntry] = {}
        for module, parts in modules.items():
            factors = {part: _FACTOR.fullmatch(part) for part in parts}
            plain = all(factors.values()) and not holds_target_parameter(module, settings)
            if plain and not all_by_peft(settings) and all(len(entry.shape) == 2 for entry in parts.values()):
                pair = {match["factor"]: parts[part] for part, match in factors.items() if match is not None}
                low_rank[f"{module}.weight"] = _low_rank(path, module, pair, settings)
                continue
            if not plain and not some_by_peft(settings):
                odd = next(entry.name for part, entry in parts.items() if factors[part] is None)
                raise InputError(
                    f"{path}: tensor {odd} is not of plain LoRA, but {ADAPTER_CONFIG} names no other form; is that "
                    "the config that was saved with it?"
                )
            by_peft |= {f"{PREFIX}{module}.{part}": entry for part, entry in parts.items()}
            wrapped = [name for name in others if name.startswith(f"{module}{_WRAPPED}")]
            by_peft |= {f"{PREFIX}{name}": others.pop(name) for name in wrapped}
        for name in ("trainable_token_indices", "target_parameters"):
            if settings.get(name) and not by_peft:
                raise InputError(
                    f"{path}: has no tensors for {name}, which {ADAPTER_CONFIG} names; save the adapter again"
                )
        whole = {name.replace(_WRAPPED, "."): entry for name, entry in others.items()}
        untouched = {name: whole.pop(name) for name in low_rank.keys() & whole.keys()}
        return cls(checkpoint, settings, low_rank, whole, untouched, by_peft, base)

    @property
    def config(self) -> Path:
        """The file with the settings."""
        return self.checkpoint.path / ADAPTER_CONFIG

    @property
    def config_has_changed(self) -> bool:
        """Whether it no longer says what was read of it; or is gone."""
        try:
            return read_settings(self.checkpoint.path, self.base) != self.settings
        except InputError:
            return True

    def meet(
        self, shapes: Mapping[str, tuple[int, ...]], where: object, common_rows: bool = False
    ) -> dict[str, dict[str, LowRank | TensorEntry]]:
        """What the adapter adds to tensors of a model, or puts in their place, by the model's names.

        A tied matrix that is stored once may have a change for each of its two uses, so changes have their own names
        too. shapes: of the model's tensors. where: what messages call the model. Raises InputError, naming the tensor,
        if the model lacks one or has it in another shape.
        """
        changes: dict[str, dict[str, LowRank | TensorEntry]] = {}
        for name, update in self.low_rank.items():
            stored = self.name_in(name, shapes, where)
            shape = shapes[stored]
            is_embedding = ".lora_embedding_" in update.a.name
            resized = is_resized(stored, shape, update.shape[::-1] if is_embedding else update.shape)
            if shape not in (update.shape, update.shape[::-1]) and not (resized and common_rows):
                raise InputError(
                    f"tensor {stored}: shape {list(shape)} in {where}, but {list(update.shape)} for {name} in "
                    f"{update.a.path}; {RESIZED if resized else 'this adapter is not of this model'}"
                )
            transposed = is_embedding if resized else shape != update.shape
            if shape[0] == shape[1]:  # the shape does not say it; peft stores an embedding's factors transposed
                transposed = bool(self.settings.get("fan_in_fan_out")) or is_embedding
            changes.setdefault(stored, {})[name] = replace(update, transposed=transposed)
        for name, entry in self.whole.items():
            changes.setdefault(self.name_in(name, shapes, where), {})[name] = entry
        return changes

    def check_untouched(self, base: Checkpoint, common_rows: bool = False) -> None:
        """Raise InputError unless the ``untouched`` matrices are as in ``base``."""
        for name, entry in self.untouched.items():
            stored = self.name_in(name, base.tensors, base.path)
            shape = base.tensors[stored].shape
            resized = is_resized(stored, shape, entry.shape)
            if resized and not common_rows:
                shapes = f"shape {list(shape)} in {base.path}, {list(entry.shape)} in {entry.path}"
                raise InputError(f"tensor {stored}: {shapes}; {RESIZED}")
            if not self.checkpoint.equal(entry.name, stored, base, common_rows=resized):
                raise InputError(
                    f"{entry.path}: holds a {name} that differs from that in {base.path}; is that the checkpoint "
                    "that the adapter was tuned from?"
                )

    def name_in(self, name: str, names: Mapping[str, object], where: object) -> str:
        """The model's name for the tensor ``name``: it may have another beginning (with or without ``model.``).

        An output head or an embedding that is stored once has the name of the other. Raises InputError if none fits.
        """
        if name in names:
            return name
        alike = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if len(alike) == 1:
            return alike[0]
        partner = tied_partner(name, names)
        if partner is not None:
            return partner
        also = "" if not is_output_head(name) else " or tied to an embedding that is"
        raise InputError(
            f"{self.checkpoint.path}: adapts {name}, which is not in {where}{also}; {of_another_model(self.settings)}"
        )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter of peft, and no model."""
    try:
        names = {entry.name for entry in Path(path).iterdir()}
    except (OSError, ValueError):
        return False
    of_model = ("model.safetensors", "model.safetensors.index.json")
    return ADAPTER_CONFIG in names and not any(name in of_model or shard_number(name) for name in names)


def _check_tensors(checkpoint: Checkpoint, also: frozenset[str]) -> None:
    """Raise InputError unless there are tensors, with elements, of types with arithmetic or of those in ``also``."""
    if not checkpoint.tensors:
        raise InputError(f"{checkpoint.path}: the adapter has no tensors, so it changes nothing; save it again")
    for key, entry in checkpoint.tensors.items():
        if entry.count == 0:
            raise InputError(f"{entry.path}: tensor {key} has shape {list(entry.shape)}: {GATHER_FIRST}")
        if entry.dtype not in KERNEL_CODES and entry.dtype not in also:
            how = f", with: {float32_command(entry.path)}" if entry.dtype.startswith("F") else ""
            raise InputError(
                f"{entry.path}: tensor {key} is {entry.dtype}; float32, bfloat16 or float16 is needed{how}"
            )


def _by_module(tensors: Mapping[str, TensorEntry]) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """The tensors of LoRA by module and part; and the others by name."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    others: dict[str, TensorEntry] = {}
    for key, entry in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if match is None:
            others[name] = entry
        else:
            modules.setdefault(match["module"], {})[match["part"]] = entry
    return modules, others


def _low_rank(path: Path, module: str, pair: Mapping[str, TensorEntry], settings: Settings) -> LowRank:
    missing = {"A", "B"} - pair.keys()
    if missing:
        raise InputError(f"{path}: has no lora_{missing.pop()} for {module}")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{a.path}: the factors of {module} have shapes {list(b.shape)} and {list(a.shape)}, which is no "
            "product of matrices; the file is damaged, or of a form that its config does not name"
        )
    rank = a.shape[0]
    try:
        alpha = _of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
        configured = _of_pattern(settings.get("rank_pattern"), module, settings.get("r"))
    except re.error as error:
        raise InputError(f"{path / ADAPTER_CONFIG}: {error.pattern!r} is not a regular expression: {error}") from error
    if not isinstance(alpha, int | float) or not abs(alpha) < 1e30 or not 0 < rank == configured:
        raise InputError(
            f"{path / ADAPTER_CONFIG}: rank {configured}, lora_alpha {alpha} for {module}, whose factors have "
            f"rank {rank}"
        )
    return LowRank(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_pattern(pattern: Any, module: str, otherwise: Any) -> Any:
    """The value for one module, as peft chooses it: of the first pattern that fits the end of its name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
