"""Writing files so that a crash loses nothing: whole writes, flushed to the disk, in order."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.errors import InputError
from perta_fast.files.reading import regular_file


def write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in as many calls as it takes."""
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
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            count = _copy_through_memory(source, target, min(size, 1 << 20), source_offset, target_offset)
        except AttributeError:  # not Linux
            count = _copy_through_memory(source, target, min(size, 1 << 20), source_offset, target_offset)
        if count == 0:
            raise OSError(errno.EIO, "the file ended too early")
        size, source_offset, target_offset = size - count, source_offset + count, target_offset + count


def _copy_through_memory(source: int, target: int, size: int, source_offset: int, target_offset: int) -> int:
    data = os.pread(source, size, source_offset)
    write_fully(target, memoryview(data), target_offset)
    return len(data)


def write_file(path: Path, data: bytes, beside: Path | None = None) -> None:
    """Make ``path`` hold ``data``: after a crash it holds the old content or the new, never a part.

    beside: where it is built, in the same directory; ``path`` with ".new" at its end if not given.
    """
    beside = beside or path.with_name(f"{path.name}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_fully(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    move(beside, path)


def write_record(path: Path, content: Any) -> None:
    """``write_file`` of JSON with its hash."""
    text = json.dumps(content)
    write_file(path, f"{blake3(text.encode()).hexdigest()}\n{text}\n".encode())


def read_record(path: Path) -> Any:
    """What ``write_record`` wrote. Raises InputError if the file cannot be read or has been damaged."""
    try:
        with open(path, "rb", opener=regular_file) as file:
            digest, _, text = file.read().partition(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    text = text.removesuffix(b"\n")
    if blake3(text).hexdigest().encode() != digest:
        raise InputError(f"{path}: is damaged: it does not have the hash that it was written with")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: it is not JSON") from error


def move(source: Path, target: Path) -> None:
    """Rename within one file system, replacing ``target``, and flush both directories."""
    source.rename(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def sync_file(path: Path) -> None:
    """Flush one file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below ``directory``, and the directories themselves, to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync_file(Path(root, name))
        sync_directory(Path(root))


def sync_directory(directory: Path) -> None:
    """Flush the entries of one directory."""
    sync_file(directory)


def remove(path: Path) -> None:
    """Remove a file or a directory with all that it holds; no error if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
