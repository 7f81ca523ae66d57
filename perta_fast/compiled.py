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


def kernels() -> ModuleType:
    """The extension module. Raises RunError, which says what to do, if it cannot be loaded."""
    module = _load()
    if isinstance(module, ImportError):
        raise RunError(
            f"the compiled kernels (perta_fast._C) cannot be loaded: {module}; "
            "install a C++ compiler and run: pip install -e ."
        )
    return module
