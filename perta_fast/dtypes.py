"""Types of stored tensors: their safetensors names, sizes, and torch's names."""

from math import prod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

# The types with arithmetic, and their codes in the compiled kernels (csrc/dtype.h).
KERNEL_CODES: Final = {"F32": 0, "BF16": 1, "F16": 2}

# Types of buffers and counters: they have no task vector and are copied.
COPIED: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

_NAMES_BY_SIZE = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("U16", "I16", "F16", "BF16"),
    4: ("U32", "I32", "F32"),
    8: ("U64", "I64", "F64", "C64"),
}
ITEM_SIZES: Final = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names}

# Torch's names for the types that a model can be loaded in.
TORCH_NAMES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
STORED_TYPES: Final = {"float32": "F32", "bfloat16": "BF16"}  # of importances, by torch's names
FLOATING: Final = tuple(TORCH_NAMES[name] for name in KERNEL_CODES)


def torch_dtype(name: str) -> "torch.dtype":
    """Torch's type by its safetensors name or its own, for the types of ``TORCH_NAMES``."""
    import torch  # here: much of the package does without it

    dtype: torch.dtype = getattr(torch, TORCH_NAMES.get(name, name))
    return dtype


def torch_name(value: object) -> str:
    """The name of a torch type without ``torch.``; any other value as text."""
    return str(value).removeprefix("torch.")


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor of ``shape`` stored as ``dtype`` (a safetensors name)."""
    return ITEM_SIZES[dtype] * prod(shape)
