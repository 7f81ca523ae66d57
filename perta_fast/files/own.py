"""Opens, makes and removes what a run keeps for itself: never through a link, and only what is plain and its own.

A run keeps unfinished work under hidden names (``is_own_name``), in a model's directory and beside outputs. Others may
have put a link there, by mistake or to do harm. So, from the first hidden name of a path on, each directory is opened
relative to the one above it and without following links; the file is plain and, to be written, has no second name.
An owner is trusted who could replace the file anyway: root, this user, or who owns the directory that holds it.
"""

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.mounts import mounts_in

_OWN_NAME = re.compile(
    r"\.(.+\.)?perta-(journal|run|sweep|evaluation|tuning|preconditioning|partial|replaced|importance|recipe)",
    re.DOTALL,
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # the latter: does not wait for a pipe's other end
# What the system answers for a link, for a directory in place of a file or the reverse, for a pipe or a socket.
_OTHER_KIND = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)


def is_own_name(name: str) -> bool:
    """Whether runs keep unfinished work under ``name``."""
    return _OWN_NAME.fullmatch(name) is not None


def own_file(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open, or with ``os.O_CREAT`` make, a file of a run; also an ``opener`` for ``open``.

    Raises InputError, with nothing written, if it or a hidden directory above it is not the run's own; OSError.
    """
    path = Path(path)
    with _holder_of(path) as holder:
        if flags & os.O_CREAT:
            with suppress(FileExistsError):  # a new file needs no check
                return os.open(path.name, flags | os.O_EXCL, mode, dir_fd=holder)
        try:
            descriptor = os.open(path.name, flags & ~(os.O_CREAT | os.O_TRUNC) | _NO_LINK, dir_fd=holder)
        except OSError as error:
            raise _explained(error, path) from error
        try:
            _check_file(path, flags, os.fstat(descriptor), os.fstat(holder))
            if flags & os.O_TRUNC:
                os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _check_file(path: Path, flags: int, status: os.stat_result, holder: os.stat_result) -> None:
    # Weights in a model's directory may be of another user of a group: a journal writes them, but they are not its own.
    own = any(map(is_own_name, path.parts))
    problem = _problem(status, holder if own else status, directory=False)
    if not problem and flags & (os.O_WRONLY | os.O_RDWR):
        problem = _second_name(status)
    if problem:
        raise InputError(_inside(path, problem))


def make_own_directory(path: Path) -> None:
    """Make ``path``, unless it is there already. Raises InputError as ``check_own`` does; OSError."""
    check_own(path)
    with _holder_of(path) as holder, suppress(FileExistsError):
        os.mkdir(path.name, dir_fd=holder)  # not checked again: some network file systems give it to another user


def remove_own_file(path: Path) -> None:
    """Remove a file, or a link itself; no error if there is none, or only one behind a link."""
    with suppress(FileNotFoundError, InputError), _holder_of(path) as holder:
        os.unlink(path.name, dir_fd=holder)


def check_own(path: Path, *, directory: bool = True) -> None:
    """Raise InputError if a run could not keep a directory, or a file, under the hidden name ``path``."""
    try:
        status, holder = path.lstat(), path.parent.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be used for unfinished work: {error.strerror}") from error
    problem = _problem(status, holder, directory) or ("" if directory else _second_name(status))
    if not problem and mounts_in(path):
        problem = "is, or holds, a mount point"
    if problem:
        raise InputError(f"{path}: {problem}. A run keeps unfinished work under this name: move away what is there")


def check_own_tree(directory: Path, links: Collection[str] = ()) -> None:
    """Raise InputError if anything below ``directory`` is not as a run leaves it.

    links: names in ``directory`` that may be links. Only weights may be hard links (``link_unchanged``).
    """
    for folder, _, _, holder in os.fwalk(directory, follow_symlinks=False, onerror=_raise):
        with os.scandir(holder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if entry.name in links and Path(folder) == directory and not entry.is_dir(follow_symlinks=False):
                    continue
                problem = _problem(status, os.fstat(holder), directory=stat.S_ISDIR(status.st_mode))
                if not problem and stat.S_ISREG(status.st_mode) and not entry.name.endswith(".safetensors"):
                    problem = _second_name(status)
                if problem:
                    raise InputError(_inside(Path(folder, entry.name), problem))


@contextmanager
def _holder_of(path: Path) -> Iterator[int]:
    """The open directory that holds ``path``; no link is followed below the first hidden name."""
    parts = path.parent.parts
    first = next((number for number, name in enumerate(parts) if is_own_name(name)), len(parts))
    descriptor = os.open(Path(*parts[:first]), _DIRECTORY)
    try:
        for number, name in enumerate(parts[first:], start=first):
            try:
                below = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                raise _explained(error, Path(*parts[: number + 1])) from error
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _problem(status: os.stat_result, holder: os.stat_result, directory: bool) -> str:
    """Why a file or directory, found in ``holder``, is not the run's own; "" if it is."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not (stat.S_ISDIR(status.st_mode) if directory else stat.S_ISREG(status.st_mode)):
        return "is not a directory" if directory else "is not a plain file"
    if status.st_uid not in (0, os.geteuid(), holder.st_uid):
        return f"belongs to another user (number {status.st_uid})"
    return ""


def _second_name(status: os.stat_result) -> str:
    """Why a file must not be written: what is written to it would be in another file too."""
    return "has a second name (a hard link)" if status.st_nlink > 1 else ""


def _explained(error: OSError, path: Path) -> Exception:
    """An InputError that says what is at ``path``, if that is why it could not be opened; else ``error``."""
    if error.errno not in _OTHER_KIND:
        return error
    return InputError(_inside(path, "is a link" if path.is_symlink() else "is not a plain file or directory"))


def _inside(path: Path, problem: str) -> str:
    return f"{path}: {problem}, which no run leaves there; put back the file that the run wrote, or remove it"


def _raise(error: OSError) -> None:
    raise error
