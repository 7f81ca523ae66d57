"""LoRA adapters as peft saves them (arXiv 2106.09685): a task vector that is stored as factors.

Peft itself is not needed. An adapter adds scale * b @ a to a matrix; the subtraction forms this product a chunk
at a time.
"""

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perta_fast.checkpoints.advice import python_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry, widened
from perta_fast.checkpoints.tied import OUTPUT_HEADS
from perta_fast.dtypes import KERNEL_CODES
from perta_fast.errors import InputError
from perta_fast.files.reading import PositionReader, read_json

CONFIG = "adapter_config.json"
STEM = "adapter_model"
Matrix = np.ndarray[Any, np.dtype[np.float32]]

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")
_WRAPPED = ".base_layer."  # peft's name for the layer that it adds to
# Settings of peft that this package reads, or that do not change what the factors mean.
_HARMLESS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_rslora"),
    )
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base alone


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix, or to its transpose: scale * b @ a. a: (rank, d_in), b: (d_out, rank)."""

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def factors(self) -> tuple[Matrix, Matrix]:
        """Two float32 arrays, (rows, rank) and (rank, columns), whose product times scale is added to the matrix.

        Raises RunError if the file cannot be read.
        """
        a, b = _read(self.a), _read(self.b)
        if self.transposed:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: header and config are read and checked.

    low_rank: by the name of the weight to add to. whole: tensors saved in full (``modules_to_save``, biases).
    untouched: matrices of the base that were saved beside their factors. Names are those of the model in memory
    that the adapter was trained on.
    """

    checkpoint: Checkpoint
    low_rank: Mapping[str, LowRank] = field(repr=False)
    whole: Mapping[str, TensorEntry] = field(repr=False)
    untouched: Mapping[str, TensorEntry] = field(repr=False)
    fan_in_fan_out: bool = False

    @classmethod
    def open(cls, path: str | Path) -> "Adapter":
        """Read config and header of a LoRA or rsLoRA adapter.

        Raises InputError, naming file and tensor or setting, for whatever is missing or malformed, and for
        adapters of every other kind.
        """
        path = Path(path)
        config = _read_config(path / CONFIG)
        checkpoint = Checkpoint.open(path, STEM)
        factors: dict[str, dict[str, TensorEntry]] = {}
        whole: dict[str, TensorEntry] = {}
        for key, entry in checkpoint.tensors.items():
            name = key.removeprefix(_PREFIX)
            factor = _FACTOR.fullmatch(name)
            if entry.dtype not in KERNEL_CODES:
                raise InputError(f"{entry.path}: tensor {key} is {entry.dtype}; float32, bfloat16 or float16 is needed")
            if factor is not None:
                factors.setdefault(factor["module"], {})[factor["factor"]] = entry
            elif "lora_" in name:
                raise InputError(f"{entry.path}: tensor {key} is not of plain LoRA; {_merge_first(path)}")
            else:
                whole[name.replace(_WRAPPED, ".")] = entry
        low_rank = {f"{module}.weight": _low_rank(path, module, pair, config) for module, pair in factors.items()}
        untouched = {name: whole.pop(name) for name in low_rank.keys() & whole.keys()}
        return cls(checkpoint, low_rank, whole, untouched, bool(config.get("fan_in_fan_out")))

    @property
    def config(self) -> Path:
        """The file with the settings."""
        return self.checkpoint.path / CONFIG

    def meet(
        self, shapes: Mapping[str, tuple[int, ...]], where: object
    ) -> tuple[dict[str, LowRank], dict[str, TensorEntry]]:
        """What the adapter adds to tensors of a model, and which tensors it replaces, both by the model's names.

        shapes: of the model's tensors. where: what messages call the model. Raises InputError, naming the tensor,
        if the model lacks one or has it in another shape.
        """
        low_rank = {}
        for name, update in self.low_rank.items():
            stored = self._name_in(name, shapes, where)
            shape = shapes[stored]
            if shape not in (update.shape, update.shape[::-1]):
                raise InputError(
                    f"tensor {stored}: shape {list(shape)} in {where}, but {list(update.shape)} for {name} in "
                    f"{update.a.path}; this adapter is not of this model"
                )
            transposed = shape != update.shape
            if shape[0] == shape[1]:  # the shape does not say it; peft stores an embedding's factors transposed
                transposed = self.fan_in_fan_out or ".lora_embedding_" in update.a.name
            low_rank[stored] = replace(update, transposed=transposed)
        whole = {self._name_in(name, shapes, where): entry for name, entry in self.whole.items()}
        return low_rank, whole

    def check_untouched(self, base: Checkpoint) -> None:
        """Raise InputError unless the ``untouched`` matrices are as in ``base``."""
        for name, entry in self.untouched.items():
            if not self.checkpoint.equal(entry.name, self._name_in(name, base.tensors, base.path), base):
                raise InputError(
                    f"{entry.path}: holds a {name} that differs from that in {base.path}; "
                    f"{_merge_first(entry.path.parent)}"
                )

    def _name_in(self, name: str, names: Mapping[str, object], where: object) -> str:
        """The model's name for the tensor ``name``: it may have another beginning (with or without ``model.``)."""
        if name in names:
            return name
        alike = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if len(alike) == 1:
            return alike[0]
        why = "which is tied to the input embedding, or missing," if name in OUTPUT_HEADS else "which is not"
        raise InputError(
            f"{self.checkpoint.path}: adapts {name}, {why} in {where}; {_merge_first(self.checkpoint.path)}"
        )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter of peft, and no model."""
    try:
        names = {entry.name for entry in Path(path).iterdir()}
    except (OSError, ValueError):
        return False
    return CONFIG in names and not {"model.safetensors", "model.safetensors.index.json"} & names


def _low_rank(path: Path, module: str, pair: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> LowRank:
    missing = {"A", "B"} - pair.keys()
    if missing:
        raise InputError(f"{path}: has no lora_{missing.pop()} for {module}")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{a.path}: the factors of {module} have shapes {list(b.shape)} and {list(a.shape)}, which is no "
            f"product of matrices; {_merge_first(path)}"
        )
    rank = a.shape[0]
    try:
        alpha = _by_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        configured = _by_module(config.get("rank_pattern"), module, config.get("r"))
    except re.error as error:
        raise InputError(f"{path / CONFIG}: {error.pattern!r} is not a regular expression: {error}") from error
    if not isinstance(alpha, int | float) or not abs(alpha) < 1e30 or not 0 < rank == configured:
        raise InputError(
            f"{path / CONFIG}: rank {configured}, lora_alpha {alpha} for {module}, whose factors have rank {rank}"
        )
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_module(pattern: Any, module: str, otherwise: Any) -> Any:
    """The value for one module, as peft chooses it: of the first pattern that fits the end of its name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _read_config(path: Path) -> dict[str, Any]:
    config, patterns = read_json(path), ("alpha_pattern", "rank_pattern")
    if not isinstance(config, dict) or not all(isinstance(config.get(name) or {}, dict) for name in patterns):
        raise InputError(f"{path}: is not the config of an adapter")
    advice = _merge_first(path.parent)
    if config.get("use_dora"):
        raise InputError(f"{path}: a DoRA adapter, whose change of the weights is not of low rank; {advice}")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: an adapter of type {config.get('peft_type')}, not LORA; {advice}")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model too; {advice}"
        )
    for name, value in config.items():
        if name not in _HARMLESS and value:
            raise InputError(f"{path}: setting {name} is not understood here; {advice}")
    return config


def _merge_first(path: Path) -> str:
    target = f"{path}-merged"
    program = (
        "from peft import AutoPeftModelForCausalLM as M; "
        f"M.from_pretrained({str(path)!r}, dtype='auto').merge_and_unload().save_pretrained({target!r})"
    )
    return f"merge it and give the merged checkpoint: {python_command(program)}"


def _read(entry: TensorEntry) -> Matrix:
    """A tensor as float32."""
    data = bytearray(entry.size)
    with closing(PositionReader(entry.path)) as reader:
        reader.read_into(memoryview(data), entry.begin, f"tensor {entry.name}")
    return widened(data, entry.dtype).reshape(entry.shape)
