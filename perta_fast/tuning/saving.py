"""Errors of the disk while another library writes: safetensors and tokenizers have types of their own for them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how Rust names what the system answered


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise a full disk, or another answer of the system, as the OSError that it is."""
    try:
        yield
    except Exception as error:
        number = _NUMBER.search(str(error))
        if number is None or not (isinstance(error, SafetensorError) or type(error) is Exception):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
