"""One run at a time in a directory."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing then stops two runs in one directory
    fcntl = None  # type: ignore[assignment]


def lock(directory: Path) -> int:
    """Lock ``directory`` until the descriptor that is returned is closed, or the process ends.

    Raises BlockingIOError if another run holds it, OSError if it cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), directory.stat()):
                raise BlockingIOError  # another run has just moved or removed it
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
