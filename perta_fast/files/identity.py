"""Whether two paths lead to one file or directory, by device and inode.

One directory can have many paths: links, bind mounts, other upper and lower case on some file systems.
"""

import os
from pathlib import Path

Identity = tuple[int, int]  # device and inode


def identity(path: str | Path) -> Identity | None:
    """What ``path`` leads to, links followed; None if there is nothing."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_dev, status.st_ino


def is_same(first: str | Path, second: str | Path) -> bool:
    """Whether two paths lead to one file or directory, which may be missing."""
    known = identity(first)
    return os.path.realpath(first) == os.path.realpath(second) or (known is not None and known == identity(second))


def lies_in(path: str | Path, directory: str | Path) -> bool:
    """Whether ``path`` is ``directory`` or lies in it; both may be missing."""
    resolved, target, known = Path(os.path.realpath(path)), Path(os.path.realpath(directory)), identity(directory)
    above = (resolved, *resolved.parents)
    return target in above or (known is not None and known in map(identity, above))
