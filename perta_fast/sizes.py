"""Byte counts as people write and read them."""

import re

from perta_fast.errors import InputError

_UNITS = {
    "": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), start=1)},
}


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "500MB", "1.5 GB" or a plain number. Raises InputError for anything else, or for 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise InputError(f"{text!r} is not a size; write it like 12GiB, 500MB or 1.5 GB")
    size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise InputError(f"{text!r} is no room at all; give at least one byte")
    return size


def format_size(count: float) -> str:
    """Three figures and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
