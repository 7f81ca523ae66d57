"""Standard output and standard error that show what is written to them, and end no run when they are closed."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from perta_fast.errors import shown_letter

COLOUR_ON, COLOUR_OFF = "\x1b[7m", "\x1b[27m"  # reverse video: it shows spaces too
_BAR_MOVES = re.compile(r"(\n|\x1b\[A)+")  # how tqdm goes from one bar to another


class ShownStream:
    """A text stream that escapes what is not printable, or has no place in the stream's encoding.

    Once a write fails, as the reader has gone or the disk is full, ``lost`` is the error, and nothing more is written.
    bars: keep what tqdm writes to draw a bar. COLOUR_ON and COLOUR_OFF are kept if they are written alone. Other
    attributes are those of the stream itself.
    """

    def __init__(self, stream: Any, *, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``; returns its length."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(self._stream.write, self._escaped(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """``write`` of each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self._stream.flush)

    def _escaped(self, text: str) -> str:
        if text.isprintable() or text in (COLOUR_ON, COLOUR_OFF) or (self._bars and _BAR_MOVES.fullmatch(text)):
            return text
        returns = len(text) - len(text.lstrip("\r")) if self._bars else 0
        return text[:returns] + "".join(
            letter if letter in "\n\t" else shown_letter(letter) for letter in text[returns:]
        )

    def _try(self, action: Any, *arguments: str) -> None:
        if self.lost is not None:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.lost = error
            with suppress(OSError, ValueError):  # what is buffered would be tried again when the process ends
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, self._stream.fileno())
                os.close(descriptor)


@contextmanager
def shown_streams() -> Iterator[tuple[ShownStream, ShownStream]]:
    """Make standard output and standard error ``ShownStream``s; both are there even if the caller has closed them."""
    for descriptor in range(3):  # else the next file that is opened gets the number, and what is printed goes into it
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    with open(os.devnull, "w") as nowhere:
        output, errors = ShownStream(sys.stdout or nowhere), ShownStream(sys.stderr or nowhere, bars=True)
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                yield output, errors
            finally:
                output.flush()
                errors.flush()
