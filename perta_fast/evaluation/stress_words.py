"""The names of the stresses. It needs no torch."""

import re
from collections.abc import Sequence

from perta_fast.errors import InputError

ROUNDED = {"int8": 8, "int4": 4}  # by name, the bits that weights are rounded to
_RELEARN = re.compile("relearn=0*([1-9][0-9]{0,8})", re.ASCII)


def stress_words(given: Sequence[str]) -> list[str]:
    """The stresses, each once, as ``int8``, ``int4`` or ``relearn=20``. Raises InputError for any other, or none."""
    words = []
    for word in given:
        relearn = _RELEARN.fullmatch(word) if isinstance(word, str) else None
        if relearn is None and word not in ROUNDED:
            raise InputError(
                f"‹stress›: {word!r} is none; there are {', '.join(ROUNDED)} and relearn=K, with K steps, at least 1"
            )
        words.append(f"relearn={relearn[1]}" if relearn else word)
    if not words:
        raise InputError("‹stress› names none")
    return list(dict.fromkeys(words))


def rounds(words: Sequence[str]) -> bool:
    """Whether one of the stresses rounds weights."""
    return any(word in ROUNDED for word in words)
