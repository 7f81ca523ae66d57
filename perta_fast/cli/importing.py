"""Ctrl-C while modules are imported."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130  # the exit status
INTERRUPTED_MESSAGE = (
    "interrupted; the inputs are untouched and no partial output is left. Run the same command again to start over"
)


@contextmanager
def importing() -> Iterator[None]:
    """For imports before the work begins: Ctrl-C ends the process at once, with one line.

    Nothing has to be cleared up then, and C code that is interrupted in an import may raise another error.
    """
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except KeyboardInterrupt:
        _say()
        raise SystemExit(INTERRUPTED) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    _say()
    os._exit(INTERRUPTED)


def _say() -> None:
    with suppress(OSError):  # it is closed
        os.write(2, f"perta: {INTERRUPTED_MESSAGE}\n".encode())
