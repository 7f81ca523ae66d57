"""Whether the disks have room for what a command will write, before it begins."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from perta_fast.errors import RunError

FREE_MARGIN = 64 << 20  # bytes of disk left for small files
_BLOCK = 512  # bytes that ``st_blocks`` counts in


def check_space(needed: Mapping[Path, int], emptied: Iterable[Path] = ()) -> None:
    """Raise RunError if a file system has fewer bytes free than ``needed`` of the directories that it will hold.

    emptied: as in ``free_bytes``.
    """
    emptied = list(emptied)
    by_disk: dict[int, list[Path]] = defaultdict(list)
    for directory in needed:
        by_disk[disk_of(directory)].append(directory)
    for directories in by_disk.values():
        size, free = sum(needed[directory] for directory in directories), free_bytes(directories[0], emptied)
        if free < size:
            names = " and ".join(map(str, directories))
            raise RunError(
                f"{names}: {'needs' if len(directories) == 1 else 'need'} {size / 1e9:.2f} GB of disk space, "
                f"{free / 1e9:.2f} GB are free; nothing was written"
            )


def free_bytes(directory: Path, emptied: Iterable[Path] = ()) -> int:
    """Bytes free on the file system that will hold ``directory``.

    emptied: directories of commands that were killed, which are emptied before anything is written.
    """
    disk = disk_of(directory)
    leftover = sum(_size_on_disk(path) for path in emptied if disk_of(path) == disk)
    return shutil.disk_usage(existing_parent(directory)).free + leftover


def existing_parent(path: Path) -> Path:
    """``path``, or its nearest parent that is a directory."""
    path = path.absolute()
    return next(directory for directory in (path, *path.parents) if directory.is_dir())


def disk_of(directory: Path) -> int:
    """A number for the file system that will hold ``directory``."""
    return existing_parent(directory).stat().st_dev


def share_a_disk(one: Path, other: Path) -> bool:
    """Whether one file system will hold both."""
    return disk_of(one) == disk_of(other)


def _size_on_disk(directory: Path) -> int:
    """Bytes that are free once ``directory`` is removed; files with other names too are not."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # a run that is going on may remove it
                file = os.lstat(os.path.join(folder, name))
                size += _BLOCK * file.st_blocks if file.st_nlink == 1 else 0
    return size
