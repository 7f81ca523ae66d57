"""Text that is shown to a person: nothing in it moves the cursor, hides text or reorders it; and commands to copy.

Names of tensors, paths and fields of a report come from files that anyone may have written.
"""

import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

_BAR_MOVES = re.compile(r"(\n|\x1b\[A)+")  # how tqdm goes from one bar to another


def printable(text: str) -> str:
    """``text`` in one line, with escapes such as ``\\x1b`` for what a terminal would not show as it is.

    That is control characters, ends of lines, characters that are invisible or turn the direction of writing, and the
    bytes of a path that is not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable_lines(lines: Iterable[str]) -> str:
    """``printable`` of each line, joined by ends of lines."""
    return "\n".join(map(printable, lines))


def shell_command(*words: str | Path) -> str:
    """A command that can be copied into a shell, whatever its words hold.

    A path that begins with "-" is not taken for an option. Words that are not printable are quoted as bash, zsh and ksh
    read them, so that the command is the same when it is copied from a terminal.
    """
    return " ".join(map(_quoted, words))


class ShownStream:
    """A text stream that escapes what is not printable, or has no place in the stream's encoding.

    Once a write fails, as the reader has gone or the disk is full, ``lost`` is the error, and nothing more is written.
    bars: keep what tqdm writes to draw a bar. Other attributes are those of the stream itself.
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
        if text.isprintable() or (self._bars and _BAR_MOVES.fullmatch(text)):
            return text
        returns = len(text) - len(text.lstrip("\r")) if self._bars else 0
        return text[:returns] + "".join(letter if letter in "\n\t" else _shown(letter) for letter in text[returns:])

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


def _shown(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    return letter.encode("unicode_escape").decode()


def _quoted(word: str | Path) -> str:
    text = os.fspath(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if printable(text) == text:
        return shlex.quote(text)
    return f"$'{''.join(map(_as_bytes, text))}'"


def _as_bytes(letter: str) -> str:
    if letter in "'\\":
        return f"\\{letter}"
    if _shown(letter) == letter:
        return letter
    kind = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in letter.encode(errors=kind))
