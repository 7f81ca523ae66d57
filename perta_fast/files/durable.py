"""Writing files so that a crash loses nothing: whole writes, in order, flushed to the disk."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.errors import InputError
from perta_fast.files.own import own_file
from perta_fast.files.reading import read_bytes

# What the system answers where it cannot copy between two files within the kernel.
_NO_COPY_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_STEP = 1 << 20  # bytes that are copied through memory at a time


def write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; the system may write only a part in one call."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def copy_range(source: int, target: int, size: int, source_offset: int, target_offset: int) -> None:
    """Copy ``size`` bytes between open files, within the kernel where the two file systems allow it.

    Raises OSError, also if ``source`` is too short.
    """
    while size:
        try:
            count = os.copy_file_range(source, target, size, source_offset, target_offset)
        except (OSError, AttributeError) as error:  # AttributeError: not Linux
            if isinstance(error, OSError) and error.errno not in _NO_COPY_IN_KERNEL:
                raise
            data = os.pread(source, min(size, _STEP), source_offset)
            write_fully(target, memoryview(data), target_offset)
            count = len(data)
        if count == 0:
            raise OSError(errno.EIO, "the file ended too early")
        size, source_offset, target_offset = size - count, source_offset + count, target_offset + count


def write_file(path: Path, data: bytes, beside: Path | None = None) -> None:
    """Make ``path`` hold ``data``: after a crash it holds the old content or the new, never a part.

    beside: where the file is built, in the same directory; None is ``path`` with ".new" at its end.
    """
    beside = beside or path.with_name(f"{path.name}.new")
    descriptor = own_file(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_fully(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    move(beside, path)


def write_record(path: Path, content: Any) -> None:
    """Write JSON with its hash, as ``write_file`` does."""
    text = json.dumps(content)
    write_file(path, f"{blake3(text.encode()).hexdigest()}\n{text}\n".encode())


def read_record(path: Path, advice: str = "") -> Any:
    """What ``write_record`` wrote. Raises InputError, with ``advice``, if the file cannot be read or is damaged."""
    hint = f"; {advice}" if advice else ""
    digest, _, text = read_bytes(path, hint).partition(b"\n")
    text = text.removesuffix(b"\n")
    if blake3(text).hexdigest().encode() != digest:
        raise InputError(f"{path}: is damaged: it does not have the hash that it was written with{hint}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: it is not JSON{hint}") from error


def move(source: Path, target: Path) -> None:
    """Rename within one file system, replacing ``target``, and flush both directories."""
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def link_tree(source: Path, target: Path, linked: str) -> None:
    """Copy what is in ``source`` into ``target``. linked: the ending of files that get a second name, if they can."""
    for folder, _, names in os.walk(source):
        below = target / Path(folder).relative_to(source)
        below.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name.endswith(linked):
                try:
                    os.link(Path(folder, name), below / name)
                    continue
                except OSError:  # another file system, or one without links
                    pass
            shutil.copyfile(Path(folder, name), below / name)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below ``directory``, and the directories themselves."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def discard(directory: Path) -> None:
    """Remove a directory, if there is one. After a kill it has all its files, or its name no more."""
    half = directory.with_name(f"{directory.name}.gone")
    remove(half)
    if directory.is_dir():
        move(directory, half)
        remove(half)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with its content; no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
