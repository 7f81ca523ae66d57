"""A limit for what might never end."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from tests.support.children import HUNG


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise AssertionError, which no reader takes for its own, if the body does not come to an end."""
    old = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise AssertionError("this does not come to an end")
