"""Which live modules are being measured: hooks, gradients and training modes of two runs at once would mix."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from perta_fast.errors import InputError

_LOCK = threading.Lock()
_IN_USE: set[int] = set()  # the identities of parameters, as two modules can share some


def check_not_in_use(module: nn.Module) -> None:
    """Raise InputError while ``measuring`` holds ``module``, or another module with one of its parameters."""
    if not _IN_USE.isdisjoint(map(id, module.parameters())):
        raise InputError(
            "this module, or one that shares parameters with it, is being measured by another call of perta_fast, in "
            "another thread or around this one; call them one after the other"
        )


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Hold ``module`` for one run. Raises InputError, with nothing changed, if another run holds it."""
    own = set(map(id, module.parameters()))
    with _LOCK:
        check_not_in_use(module)
        _IN_USE.update(own)
    try:
        yield
    finally:
        with _LOCK:
            _IN_USE.difference_update(own)
