"""The errors of this package, and text for a person: it shows what it holds, and its commands can be copied.

Names of tensors, paths and fields of a report come from files that anyone may have written. Nothing in a shown text may
move the cursor, hide text or reorder it.
"""

import errno
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# A path may hold these signs: beside a letter, a slash and the like they are no mark.
_MARKED = re.compile(r"(?<![\w/.-])‹([a-z_]+)›(?!\.?[\w/-])")


class _Message(BaseException):
    """A message that marks the names of arguments: "‹batch_size› is 0; it must be at least 1".

    ``str`` gives it without the marks, the command line with its options in their place (``spelled``). In an f-string
    an error keeps its marks, so that they outlive a message within another. No other sign is a mark: paths and what
    libraries say hold backticks.
    """

    def __str__(self) -> str:
        return self.spelled(lambda name: name)

    def __format__(self, specification: str) -> str:
        return format(self._printable(), specification)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with ``spell`` of each marked name."""
        return _MARKED.sub(lambda found: spell(found[1]), self._printable())

    def _printable(self) -> str:
        return printable(super().__str__())  # it holds names and paths, which may hold anything


class PertaError(_Message, Exception):
    """Base of every error that this package raises on purpose; its text is for the user."""

    exit_status = 1


class InputError(PertaError, ValueError):
    """Bad arguments or bad input: nothing was done. Exit status 2."""

    exit_status = 2


class NotStreamable(InputError):
    """A model whose layers cannot be run one at a time."""


class RunError(PertaError, RuntimeError):
    """The run failed on the way (disk full, unreadable file); the inputs are untouched. Exit status 1."""


class NotFiniteError(RunError):
    """The result would not be finite. Another attempt gives the same error, so there is nothing to resume."""


class RankLost(RunError):
    """Another process of the same run has ended, and reported its own error; only one of those left shows this."""


class Interrupted(_Message, KeyboardInterrupt):
    """Stopped by the user, with work done that can be resumed. Its text says how."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Torch has an error type for this on devices, and only a message on the host."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, MemoryError) or of_torch


def is_of_device(error: BaseException) -> bool:
    """Whether CUDA failed: then the process can go on with nothing on that device."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def device_failure(error: BaseException) -> str:
    """What to say where ``is_of_device``: the lines after the first are advice for who debugs a kernel."""
    return f"the device failed: {str(error).splitlines()[0]}"


def advice(error: OSError) -> str:
    """What went wrong with a write, and what to do about it."""
    return {
        errno.ENOSPC: "the disk is full: free some space or choose another disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed this process's file size limit (ulimit -f)",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, str(error))


def printable(text: str) -> str:
    """``text`` in one line, with escapes such as ``\\x1b`` for what a terminal would not show as it is.

    That is control characters, ends of lines, characters that are invisible or turn the direction of writing, and the
    bytes of a path that is not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(map(shown_letter, text))


def printable_lines(lines: Iterable[str]) -> str:
    """``printable`` of each line, joined by ends of lines."""
    return "\n".join(map(printable, lines))


def tensors_named(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    return f"tensor{'s' if len(names) > 1 else ''} {names_shown(names, 3)}"


def names_shown(names: Sequence[str], most: int = 20) -> str:
    """The names, or the first of them and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def shell_command(*words: str | Path) -> str:
    """A command that can be copied into a shell, whatever its words hold.

    A path that begins with "-" is not taken for an option. Words that are not printable are quoted as bash, zsh and ksh
    read them, so that the command is the same when it is copied from a terminal.
    """
    return " ".join(map(_quoted, words))


def shown_letter(letter: str) -> str:
    """``letter``, or its escape if a terminal would not show it as it is."""
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
    if shown_letter(letter) == letter:
        return letter
    kind = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in letter.encode(errors=kind))
