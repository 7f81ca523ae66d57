"""Progress bars that other libraries draw."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_of_libraries(shown: bool) -> Iterator[None]:
    """Tell tqdm to draw nothing, wherever it is used: a download, lm-evaluation-harness."""
    name = "TQDM_DISABLE"
    if shown or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
