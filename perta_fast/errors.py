"""The errors of this package: bad input, and a run that fails."""

import errno

from perta_fast.terminal import printable


class _Printable(BaseException):
    def __str__(self) -> str:
        return printable(super().__str__())  # it holds names and paths, which may hold anything


class PertaError(_Printable, Exception):
    """Base of every error that this package raises on purpose; its text is for the user."""

    exit_status = 1


class InputError(PertaError, ValueError):
    """Bad arguments or bad input: nothing was done. Exit status 2."""

    exit_status = 2


class RunError(PertaError, RuntimeError):
    """The run failed on the way (disk full, unreadable file); the inputs are untouched. Exit status 1."""


class NotFiniteError(RunError):
    """The result would not be finite. Another attempt gives the same error, so there is nothing to resume."""


class RankLost(RunError):
    """Another process of the same run has ended. It has reported its own error, so this one is not shown."""


class Interrupted(_Printable, KeyboardInterrupt):
    """Stopped by the user, with work done that can be resumed. Its text says how."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Torch has an error type for this on devices, and only a message on the host."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, MemoryError) or of_torch


def advice(error: OSError) -> str:
    """What went wrong with a write, and what to do about it."""
    return {
        errno.ENOSPC: "the disk is full: free some space or choose another disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed this process's file size limit (ulimit -f)",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, str(error))
