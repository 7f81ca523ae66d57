"""Checks of arguments that many functions share; none of them needs torch."""

import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, SupportsFloat

from perta_fast.errors import InputError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DEVICES = "auto, cpu, cuda or cuda:N"


def check_sizes(batch_size: int, max_length: int | None, **others: int | None) -> None:
    """Raise InputError, naming the argument, unless each is at least 1, or None (no limit)."""
    for name, value in {"batch_size": batch_size, "max_length": max_length, **others}.items():
        if value is not None and value < 1:
            raise InputError(f"‹{name}› is {value}; it must be at least 1")


def check_limits(stream: bool, memory: int | None, device_memory: int | None) -> None:
    """Raise InputError for a limit of memory that nothing would keep, as the run is not streamed."""
    for name, value in {"memory": memory, "device_memory": device_memory}.items():
        if value is not None and not stream:
            raise InputError(f"‹{name}› is for streamed runs; give ‹stream› too, or leave it out")


def plain(value: Any) -> Any:
    """Numbers, flags, texts and arrays of NumPy and others as Python's own, which JSON can hold; the rest as it is.

    Within lists, tuples and mappings too. An array of no dimension is a number, of one a list.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass too
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        parts = map(plain, value)
        return list(parts) if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, SupportsFloat) else value


def listed(value: Any) -> list[Any]:
    """Several values as a list, and one, such as a text, as a list of it."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return list(value) if several else [value]


def check_device(device: "str | torch.device | None") -> None:
    """Raise InputError for a text that names no device; whether there is such a device, only torch knows."""
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d{1,3})?", device):
        raise InputError(f"‹device› {device!r} is none of {DEVICES}")
