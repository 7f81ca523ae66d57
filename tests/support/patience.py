"""A limit for code that might never end."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# Seconds after which a child process or a rank counts as hung. Tests wait for events, not for times, and pass on a
# busy machine too: this limit only ends a test that would never end.
HUNG = 600


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise AssertionError if the body does not end; the package never raises that error itself."""
    old = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise AssertionError("this does not end")
