"""The compiled extension, loaded once. If it is missing, the message says what to do."""

from functools import cache
from importlib import import_module
from types import ModuleType

from perta_fast.errors import RunError


@cache
def _load() -> ModuleType | ImportError:
    try:
        return import_module("perta_fast._C")
    except ImportError as error:
        return error


def load() -> ModuleType | None:
    """The extension module, or None if it cannot be loaded."""
    module = _load()
    return None if isinstance(module, ImportError) else module


def why_missing() -> str:
    """Why the extension cannot be loaded, and what to do."""
    return (
        f"the compiled kernels (perta_fast._C) cannot be loaded: {_load()}; "
        "install a C++ compiler and run: pip install -e ."
    )


def kernels() -> ModuleType:
    """The extension module. Raises RunError if it cannot be loaded."""
    module = load()
    if module is None:
        raise RunError(why_missing())
    return module
