"""JSON with declared types: written for people, checked when read."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict


def write_readable_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``readable_json``."""
    path.write_bytes(readable_json(content))


def readable_json(content: Mapping[str, Any]) -> bytes:
    """``content`` for people and programs; a path that is not UTF-8 comes back from its escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")


def printable(text: str) -> str:
    """``text`` with escapes for what no stream can take: the bytes of a path that is not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def fits(value: Any, hint: Any) -> bool:
    """Whether what JSON gave has the declared type; numbers must be ones that arithmetic can take."""
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) or is_typeddict(hint):
        return _fits_record(value, hint)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if origin is UnionType:
        return any(fits(value, argument) for argument in arguments)
    if hint is int or (hint is float and type(value) is int):
        return type(value) is int and abs(value) < 1 << 63
    return type(value) is hint


def _fits_record(value: Any, hint: Any) -> bool:
    if is_typeddict(hint):
        required = set(hint.__required_keys__)
    else:
        required = {each.name for each in fields(hint) if each.default is each.default_factory is MISSING}
    hints = get_type_hints(hint)
    return (
        isinstance(value, dict)
        and required <= value.keys() <= hints.keys()
        and all(fits(item, hints[key]) for key, item in value.items())
    )
