"""JSON with declared types: written for people, checked when read."""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from perta_fast.errors import InputError
from perta_fast.files.own import own_file

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a table"}


def write_readable_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``readable_json`` to a file of the run's own (``own_file``)."""
    with open(path, "wb", opener=own_file) as file:
        file.write(readable_json(content))


def readable_json(content: Mapping[str, Any]) -> bytes:
    """``content`` as indented JSON; a path that is not UTF-8 is written with escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")


def with_nulls(content: Any) -> Any:
    """``content`` with null for numbers that are not finite, which JSON cannot express."""
    if isinstance(content, Mapping):
        return {key: with_nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [with_nulls(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def typed(value: Any, hint: Any, name: str = "") -> Any:
    """A value from JSON as its declared type: dataclasses are made, and floats of whole numbers.

    Integers must be ones that arithmetic can take. Raises InputError naming the field that does not fit;
    name: of ``value`` itself.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) or is_typeddict(hint):
        return _typed_table(value, hint, name)
    if origin is list and isinstance(value, list):
        return [typed(item, arguments[0], f"{name}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: typed(item, arguments[1], _inside(name, key)) for key, item in value.items()}
    if origin is UnionType:
        alike = [float] if type(value) is int and int not in arguments else []
        kinds = [kind for kind in arguments if (get_origin(kind) or kind) in (type(value), *alike)]
        return typed(value, kinds[0] if kinds else arguments[0], name)
    if hint is int or (hint is float and type(value) is int):
        allowed = type(value) is int and abs(value) < 1 << 63
    else:
        allowed = hint is Any or type(value) is hint
    if not allowed:
        raise InputError(f"{name or 'the content'} is {reprlib.repr(value)}, not {_KINDS.get(origin or hint, hint)}")
    return float(value) if hint is float else value


def fits(value: Any, hint: Any) -> bool:
    """Whether ``typed`` takes it."""
    try:
        typed(value, hint)
    except InputError:
        return False
    return True


def _typed_table(value: Any, hint: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{name or 'the content'} is {reprlib.repr(value)}, not a table")
    hints = get_type_hints(hint)
    if is_typeddict(hint):
        required = set(hint.__required_keys__)
    else:
        required = {field.name for field in fields(hint) if field.default is field.default_factory is MISSING}
    for key in (*(required - value.keys()), *(value.keys() - hints.keys())):
        raise InputError(f"{_inside(name, key)} is {'missing' if key in required else 'not known'}")
    table = {key: typed(item, hints[key], _inside(name, key)) for key, item in value.items()}
    return table if is_typeddict(hint) else hint(**table)


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
