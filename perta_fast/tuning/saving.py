"""Errors of the disk while another library writes: safetensors, tokenizers and torch have types of their own."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how Rust names what the system answered
_OF_TORCH = re.compile(r"iostream error|inline_container|PytorchStreamWriter")  # it does not say what that was


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise a full disk, or another answer of the system, as the OSError that it is."""
    try:
        yield
    except Exception as error:
        if type(error) is RuntimeError and _OF_TORCH.search(str(error)):
            raise OSError(errno.EIO, "torch could not write the whole of a file") from error
        number = _NUMBER.search(str(error))
        if number is None or not (isinstance(error, SafetensorError) or type(error) is Exception):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
