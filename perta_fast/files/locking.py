"""One run at a time in a directory."""

import fcntl
import os
from pathlib import Path


def lock(directory: Path) -> int:
    """Lock ``directory`` until the returned descriptor is closed, or the process ends.

    Raises BlockingIOError if another run holds the lock, OSError if the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), directory.lstat()):
            raise BlockingIOError  # another run has just moved or removed the directory
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
