"""Rows that were given in Python in place of a data file: kept for one run, and known again by their hash.

Where a path would stand in a record or a recipe, they are ``python:`` and the hash.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from perta_fast.errors import InputError

IN_WORDS = "rows given in Python"
_NAME = re.compile(r"python:[0-9a-f]{64}")


@dataclass(frozen=True)
class GivenRows:
    """Entries as ``formats.read_entries`` has them, each with where it stands, and their hash."""

    entries: Sequence[tuple[str, Any]]
    digest: str

    @classmethod
    def of(cls, entries: Sequence[tuple[str, Any]]) -> "GivenRows":
        """The hash is that of the entries as JSON lines."""
        from blake3 import blake3  # here: the command line imports this file at its start

        digest = blake3()
        for _, entry in entries:
            digest.update(f"{_json(entry)}\n".encode())
        return cls(entries, digest.hexdigest())

    def __str__(self) -> str:
        return f"python:{self.digest}"


Given = Mapping[str, GivenRows]  # by their names
NOTHING_GIVEN: Given = MappingProxyType({})
_SAME_CALL = "the same call, with the same rows"


def is_given(source: object) -> bool:
    """Whether this stands for rows given in Python: they themselves, or their name in a record."""
    return isinstance(source, GivenRows) or _NAME.fullmatch(str(source)) is not None


def same_call(overwrites: bool) -> str:
    """The call that goes on with what a stopped one has kept; one that ``overwrites`` would start over."""
    return f"{_SAME_CALL}, without ‹overwrite›" if overwrites else _SAME_CALL


def no_longer_there(source: object) -> InputError:
    """The error of a run that has the name alone."""
    return InputError(
        f"{source}: these {IN_WORDS} are not kept; call the Python function again with the same rows, or give a file"
    )


def _json(entry: Any) -> str:
    """As ``json.dumps`` writes it; of what JSON cannot express, the type."""
    plain = dict(entry) if hasattr(entry, "keys") else entry
    return json.dumps(plain, skipkeys=True, default=lambda value: type(value).__name__)
