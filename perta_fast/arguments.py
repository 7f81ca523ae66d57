"""Checks of arguments that many functions share; none of them needs torch."""

import re
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

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


def plain_number(value: Any) -> Any:
    """A number of NumPy's, or of another library, as Python's own; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_device(device: "str | torch.device | None") -> None:
    """Raise InputError for a text that names no device; whether there is such a device, only torch knows."""
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d{1,3})?", device):
        raise InputError(f"‹device› {device!r} is none of {DEVICES}")
