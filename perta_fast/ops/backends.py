"""Which implementation serves a call: reference, cpp, cuda or triton."""

import importlib.util
import os

import torch
from torch import Tensor

from perta_fast import compiled

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can serve tensors on ``device``, the fastest first; "reference" is always among them."""
    kind = torch.device(device).type
    module = compiled.load()
    found = []
    if kind == "cpu" and module is not None:
        found.append("cpp")
    if kind == "cuda" and module is not None and module.build_info()["cuda"]:
        found.append("cuda")
    if _triton_installed() and (kind != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append("triton")
    return (*found, "reference")


def choose(backend: str, device: torch.device, serving: tuple[str, ...] = BACKENDS) -> str:
    """The backend to use, of those that the operation has (``serving``).

    Raises ValueError if the one asked for is unknown or cannot serve ``device``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    available = tuple(name for name in available_backends(device) if name in serving)
    if backend == "auto":
        return available[0]
    if backend not in available:
        raise ValueError(
            f"backend {backend} cannot serve tensors on {device.type} here; available: {', '.join(available)}"
        )
    return backend


def check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise, naming the argument, unless ``tensor`` can be read by a kernel beside ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(like.shape)} is needed")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; {like.device} is needed")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors share bytes."""
    begin, end = first.data_ptr(), first.data_ptr() + first.numel() * first.element_size()
    other, other_end = second.data_ptr(), second.data_ptr() + second.numel() * second.element_size()
    return begin < other_end and other < end


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
