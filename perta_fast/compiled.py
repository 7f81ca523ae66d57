"""The compiled extension, loaded once, with a clear word if it is not there."""

from functools import cache
from importlib import import_module
from types import ModuleType

from perta_fast.errors import RunError


@cache
def load() -> ModuleType | None:
    """The extension module, or None if it was not built for this Python."""
    try:
        return import_module("perta_fast._C")
    except ImportError:
        return None


def kernels() -> ModuleType:
    """The extension module. Raises RunError if it was not built."""
    module = load()
    if module is None:
        raise RunError(
            "the compiled kernels (perta_fast._C) are not built for this Python; "
            "install a C++ compiler and run: pip install -e ."
        )
    return module
