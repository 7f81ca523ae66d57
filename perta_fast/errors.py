"""What can go wrong, in two kinds: the caller's input, and the run itself."""

import errno


class PertaError(Exception):
    """Base of every error that this package raises on purpose; its text is meant for the user."""

    exit_status = 1


class InputError(PertaError, ValueError):
    """Bad arguments or bad input: nothing was done. The command line exits with status 2."""

    exit_status = 2


class RunError(PertaError, RuntimeError):
    """The run failed on the way (disk full, unreadable file). Exit status 1; inputs are untouched."""


class NotFiniteError(RunError):
    """The arithmetic's own result is at fault: running again would meet it again."""


class RankLost(RunError):
    """Another process of the same run is gone; what it had to say, it said itself."""


class Interrupted(KeyboardInterrupt):
    """Stopped by the user with work done that can be taken up again; its text says how."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a type of its own for that on devices, and none on the host."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, MemoryError) or named


def advice(error: OSError) -> str:
    """What went wrong with a write, and what to do about it."""
    return {
        errno.ENOSPC: "the disk is full: free some space or choose another disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed this process's file size limit (ulimit -f)",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, str(error))
