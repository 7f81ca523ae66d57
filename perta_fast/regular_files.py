"""Opening files that others have laid out: where a pipe or a device lies instead, a read would never end."""

import errno
import os
import stat


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
