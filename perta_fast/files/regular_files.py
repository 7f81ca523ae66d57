"""Opening files that others have laid out: where a pipe or a device lies instead, a read would never end."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError


def regular_file(path: str, flags: int) -> int:
    """The ``opener`` with which ``open`` takes a regular file, or a link to one, and nothing else.

    Raises OSError at once for anything else.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # does not wait for a pipe's other end
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "Not a regular file", path)


def read_json(path: Path, advice: str = "") -> Any:
    """What a regular JSON file holds. Raises InputError, naming it, with ``advice`` if it cannot be read."""
    hint = f"; {advice}" if advice else ""
    try:
        with open(path, "rb", opener=regular_file) as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON{hint}") from error
