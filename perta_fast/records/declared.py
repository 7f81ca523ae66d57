"""Arguments as records can hold them, checked by the types that a dataclass or a function declares."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import signature
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, get_type_hints

from perta_fast.arguments import plain
from perta_fast.records.typed_json import typed

T = TypeVar("T")
P = ParamSpec("P")

_CHECKED = {hint for kind in (bool, int, float) for hint in (kind, kind | None)}


def declared(cls: type[T], arguments: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> T:
    """The dataclass ``cls`` of these arguments, ``plain``.

    names: of arguments, by field, that have another name. Raises InputError for one that is of another type.
    """
    hints = get_type_hints(cls)
    values = {field.name: plain(arguments[field.name]) for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: typed(value, hints[name], f"‹{names.get(name, name)}›") for name, value in values.items()})


def checked_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, with numbers and flags made ``plain``, and checked by their declared types, before it is called.

    It raises InputError for one that is of another type. Other arguments are handed on.
    """
    order = list(signature(function).parameters)
    hints = {name: hint for name, hint in function.__annotations__.items() if hint in _CHECKED}

    def checked(name: str, value: Any) -> Any:
        return typed(plain(value), hints[name], f"‹{name}›") if name in hints else value

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = [checked(name, value) for name, value in zip_longest(order[: len(args)], args)]
        named: Any = {name: checked(name, value) for name, value in kwargs.items()}
        return function(*first, **named)

    return call
