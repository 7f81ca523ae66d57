"""The choice of a backend (reference, cpp, cuda or triton), and the checks that all backends need."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Real
from types import NoneType

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.dtypes import KERNEL_CODES, torch_dtype
from perta_fast.errors import RunError
from perta_fast.rules import EXACT_POWERS

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
DTYPE_CODES = {torch_dtype(name): code for name, code in KERNEL_CODES.items()}
TRITON_DEVICES = ("cuda", "xpu")


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can serve tensors on ``device``, the fastest first; "reference" is always among them."""
    return _available(torch.device(device).type, _interpreted())


def choose(backend: str, device: torch.device, serving: tuple[str, ...] = BACKENDS) -> str:
    """The backend to use, out of those that the operation has (``serving``).

    Raises ValueError, saying why, if the backend asked for is unknown or cannot serve ``device``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    available = _available(device.type, _interpreted())
    if backend == "auto":
        return next(name for name in available if name in serving)
    if backend not in available or backend not in serving:
        why = _why_not(backend, device.type, _interpreted()) or "this operation has no such kernel"
        others = ", ".join(name for name in available if name in serving)
        raise ValueError(f"backend {backend} cannot serve tensors on {device.type}: {why}; available: {others}")
    return backend


def choose_for_power(backend: str, device: torch.device, p: float) -> str:
    """``choose`` for a power of importances; "auto" leaves Triton out where it has no exact one."""
    lacking = backend == "auto" and p not in EXACT_POWERS
    return choose(backend, device, tuple(name for name in BACKENDS if name != "triton") if lacking else BACKENDS)


@cache
def _available(kind: str, interpreted: bool) -> tuple[str, ...]:
    names = ("cuda", "cpp", "triton", "reference")
    return tuple(name for name in names if _why_not(name, kind, interpreted) is None)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(backend: str, kind: str, interpreted: bool) -> str | None:
    """Why ``backend`` cannot serve devices of this kind; None if it can."""
    if backend in ("cpp", "cuda"):
        if kind != {"cpp": "cpu", "cuda": "cuda"}[backend]:
            return f"it serves {'CPU' if backend == 'cpp' else 'CUDA'} tensors only"
        try:
            module = compiled.kernels()
        except RunError as error:
            return str(error)
        if backend == "cuda" and not module.build_info()["cuda"]:
            return "perta_fast was built without CUDA; put nvcc on PATH and build it again"
    if backend == "triton":
        if kind not in ("cpu", *TRITON_DEVICES):
            return "Triton does not serve such a device"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run: pip install 'perta-fast[triton]'"
        if kind == "cpu" and not interpreted:
            return "on the CPU it needs TRITON_INTERPRET=1, set before the program starts"
    return None


def addresses(arrays: Iterable[Tensor | None]) -> tuple[int, ...]:
    """The addresses of tensors for the compiled kernels; 0 if there is no tensor."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in arrays)


def dtype_codes(arrays: Iterable[Tensor | None]) -> tuple[int, ...]:
    """The codes of the tensors' types for the compiled kernels."""
    return tuple(0 if tensor is None else DTYPE_CODES[tensor.dtype] for tensor in arrays)


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Make a CUDA ``device`` current, and yield the address of torch's stream on it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


_TENSOR = ((Tensor,), "a torch.Tensor")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "forget_importance": ((Tensor, NoneType), "a torch.Tensor or None"),
    "retain_importance": ((Tensor, NoneType), "a torch.Tensor or None"),
    "ratio": ((Tensor, NoneType), "a torch.Tensor or None"),
    **dict.fromkeys(("lam", "p", "alpha", "scale"), ((Real,), "a number")),
    "threshold": ((Real, NoneType), "a number or None"),
    "backend": ((str,), "a string"),
}


def check_types(**arguments: object) -> None:
    """Raise TypeError, naming the argument, unless each is what an argument of its name must be."""
    for name, value in arguments.items():
        kinds, described = _KINDS.get(name, _TENSOR)
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {described}, not {type(value).__name__}")


def check_lists(**arguments: Sequence[Tensor]) -> None:
    """Raise, naming the argument, unless all are equally long lists or tuples of tensors."""
    for name, tensors in arguments.items():
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{name} must be a list or tuple of tensors, not {type(tensors).__name__}")
        check_types(**numbered(name, tensors))
        first, expected = next(iter(arguments.items()))
        if len(tensors) != len(expected):
            raise ValueError(f"{name} has {len(tensors)} tensors, {first} has {len(expected)}")


def check_array(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise, naming the argument, unless ``tensor`` is a dense array on ``device`` that a kernel can read."""
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{name} is sparse, nested or otherwise not one dense array; pass a dense tensor")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; {device} is needed")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise ValueError(f"{name} has lost its memory: its storage was freed or shrunk")


def check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    """``check_array``, and that ``tensor`` has the shape of ``like``."""
    check_array(name, tensor, like.device)
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(like.shape)} is needed")


def check_weighing(forget: object, retain: object, ratio: object, suffix: str = "") -> None:
    """Raise ValueError if there is one importance and not the other, or a ratio beside them; None is none.

    suffix: what the arguments' names get in the message.
    """
    names = f"forget_importance{suffix} and retain_importance{suffix}"
    if (forget is None) != (retain is None):
        raise ValueError(f"{names} go together: give both or neither")
    if ratio is not None and retain is not None:
        raise ValueError(f"ratio{suffix} takes the place of {names}: give it or them")


def check_one_device(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless all tensors are on the device of the first one."""
    for numbered_name, tensor in numbered(name, tensors).items():
        if tensor.device != tensors[0].device:
            raise ValueError(f"{numbered_name} is on {tensor.device}; {tensors[0].device} is needed")


def numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """The tensors of a list by their names in messages."""
    return {f"{name}[{k}]": tensor for k, tensor in enumerate(tensors)}


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming both, if a written tensor shares memory with any other tensor."""
    extents = [(*_extent(tensor), name, True) for name, tensor in written.items()]
    extents += [(*_extent(tensor), name, False) for name, tensor in read.items()]
    # In the order of memory, only the furthest ends so far matter: of written tensors, and of tensors that are read.
    furthest: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for begin, end, name, is_written in sorted(extent for extent in extents if extent[0] < extent[1]):
        reach, other = max(furthest.values()) if is_written else furthest[True]
        if begin < reach:
            first, second = (other, name) if other in written else (name, other)
            raise ValueError(f"{second} shares memory with {first}, which is overwritten")
        furthest[is_written] = max(furthest[is_written], (end, name))


def _extent(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_meta:  # holds no memory
        return 0, 0
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()
