"""Reading files: by position, as text, as JSON, and never from a pipe or a device, where a read may not end."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError, RunError, shell_command

_POINTER = b"version https://git-lfs.github.com/spec/"  # what git leaves in place of a large file


class PositionReader:
    """Reads byte ranges of one file; the first read opens it.

    If the file is cut short during the run, a read raises an error; a mapping would kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read_into(self, buffer: memoryview, begin: int, what: str, *, drop_cache: bool = False) -> None:
        """Fill ``buffer`` from byte ``begin`` on; ``drop_cache`` keeps these bytes out of the page cache.

        Raises RunError, with the file and ``what`` it holds there, if it cannot be read or ends too early.
        """
        descriptor = self.descriptor(what)
        try:
            whole = read_fully(descriptor, buffer, begin)
            if drop_cache:
                drop_pages(descriptor, begin, len(buffer))
        except OSError as error:
            raise self.failure(what, error.strerror) from error
        if not whole:
            raise self.failure(what)

    def descriptor(self, what: str) -> int:
        """The open file. Raises RunError, with the file and ``what`` it holds, if it cannot be opened."""
        try:
            return self._opened()
        except OSError as error:
            raise self.failure(what, error.strerror) from error

    def failure(self, what: str, reason: str | None = "") -> RunError:
        """The error of a read that failed for this reason of the system; none: the file ends too early."""
        if reason == "":
            return RunError(f"{self.path}: ends inside {what}: it was cut short during the run")
        return RunError(f"{self.path}: {what} cannot be read: {reason}")

    def fetch(self, begin: int, size: int) -> None:
        """Have the system begin to read ``size`` bytes, which will be asked for soon. Raises OSError if it cannot."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._opened(), begin, size, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = regular_file(os.fspath(self.path), os.O_RDONLY)
        return self._descriptor

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_fully(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill ``buffer`` from ``offset`` on; False if the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            return False
        buffer, offset = buffer[count:], offset + count
    return True


def drop_pages(descriptor: int, begin: int = 0, size: int = 0) -> None:
    """Give the clean pages of ``[begin, begin + size)`` back to the system; size 0 means to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


def checked_path(path: str | Path) -> Path:
    """``path``, if a file can have this name. Raises InputError if it is empty, or no file system can store it."""
    if path == "":  # to Python the working directory, but most often a variable that is not set
        raise InputError("a path is empty; the working directory is .")
    try:
        if b"\0" not in os.fsencode(path):
            return Path(path)
    except UnicodeEncodeError:
        pass
    raise InputError(f"{path}: holds a character that no file name can have")


def absolute(path: str | Path) -> str:
    """The same path from any working directory; links are not followed. Raises InputError as ``checked_path`` does."""
    return str(checked_path(path).absolute())


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; False for a name that no file can have."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for such a name)


def regular_file(path: str, flags: int) -> int:
    """An ``opener`` for ``open``: raises OSError at once unless ``path`` is a regular file or a link to one."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # does not wait for a pipe's other end
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "Not a regular file", path)


def check_fetched(path: Path, beginning: bytes) -> None:
    """Raise InputError if the ``beginning`` of a file is that of a pointer, which git-lfs puts in its place."""
    if beginning.startswith(_POINTER):
        fetch = shell_command("git", "-C", path.parent, "lfs", "pull")
        raise InputError(f"{path}: is a pointer of git-lfs; fetch the file itself with: {fetch}")


def read_bytes(path: Path, hint: str = "") -> bytes:
    """The content of a regular file. Raises InputError, which ends in ``hint``, if it cannot be read."""
    try:
        with open(path, "rb", opener=regular_file) as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}{hint}") from error


def read_json(path: Path, advice: str = "") -> Any:
    """What a regular JSON file holds. Raises InputError, with ``advice``, if it cannot be read."""
    hint = f"; {advice}" if advice else ""
    content = read_bytes(path, hint)
    check_fetched(path, content)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON{hint}") from error


def decode(content: bytes, path: Path) -> str:
    """The content of ``path`` as text, without a byte order mark. Raises InputError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text (byte {error.start})") from error
