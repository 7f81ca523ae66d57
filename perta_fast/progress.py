"""How far a run has come: each phase has a bar, lines or a callback, and a line in the log at its start and its end."""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perta_fast.errors import RunError, printable
from perta_fast.memory import format_size
from perta_fast.progress_lines import Lines, Unit

LOGGER = logging.getLogger("perta_fast")
LOGGER.addHandler(logging.NullHandler())  # silent unless the program sets up logging
_INTERVAL = 0.1  # least seconds between two calls of a callback


@dataclass(frozen=True)
class Event:
    """How far one phase of a run has come: the argument of a ``progress`` that is a callable.

    phase: what is done, in a few words. done, total: bytes ("B") read and written, samples, or steps: one
    sample through one part of a streamed model.

    ``progress`` is called when a phase begins, at most ten times a second during it, and when it is done: one
    call at a time, not always from the thread that started the run. An error that it raises stops the run as
    Ctrl-C does, with the same work left to resume; the caller of the run gets it (an OSError as the cause of a
    RunError).
    """

    phase: str
    done: int
    total: int
    unit: Unit


Progress = bool | Callable[[Event], object]  # whether to draw bars, or what to call instead


class Bar:
    """One phase, as a context manager; many threads may ``update``.

    It draws a bar on a terminal or in a notebook. Elsewhere it writes ``Lines``.
    """

    def __init__(self, total: int, phase: str, progress: Progress, unit: Unit = "B", done: int = 0) -> None:
        self._phase, self._unit, self._total = phase, unit, total
        self._first = self._done = done
        self._callback = progress if callable(progress) else None
        self._called = self._started = 0.0
        self._lock = threading.Lock()
        self._note = ""
        self._drawn: Any = None
        self._lines: Lines | None = None
        if draws_bars(progress):
            self._drawn = _bar_class()(
                total=total, initial=done, desc=printable(phase), unit=unit, unit_scale=unit == "B"
            )
        elif progress and self._callback is None and not _switched_off():
            self._lines = Lines(phase, total, unit, done)

    def __enter__(self) -> "Bar":
        self._started = time.perf_counter()
        LOGGER.info("%s begins: %s", self._phase, self._amount(self._total - self._done))
        self._report()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._drawn is not None:
            self._drawn.close()
        ending = "is done" if error is None else "was stopped"
        amount, seconds = self._amount(self._done - self._first), time.perf_counter() - self._started
        LOGGER.info("%s %s: %s in %.2f s", self._phase, ending, amount, seconds)
        if error is not None:
            return
        if self._lines is not None:
            self._lines.finish(self._done, self._note)
        self._report()

    def update(self, count: int, note: str | None = None) -> None:
        """Add what was done. note: what to show beside it from now on, such as a loss."""
        with self._lock:
            self._done += count
            self._note = self._note if note is None else note
            if self._drawn is not None:
                if note is not None:
                    self._drawn.set_postfix_str(note, refresh=False)
                self._drawn.update(count)
            if self._lines is not None:
                self._lines.show(self._done, self._note)
            if time.monotonic() - self._called >= _INTERVAL:
                self._report()

    def reset(self) -> None:
        with self._lock:
            self._done = 0
            if self._drawn is not None:
                self._drawn.reset()
            if self._lines is not None:
                self._lines.restart()

    def _report(self) -> None:
        if self._callback is not None:
            self._called = time.monotonic()
            try:
                self._callback(Event(self._phase, self._done, self._total, self._unit))
            except OSError as error:  # it must not be taken for an error of one of the run's files
                raise RunError(f"progress: the callback failed: {error}") from error

    def _amount(self, count: int) -> str:
        return format_size(count) if self._unit == "B" else f"{count:,} {self._unit}s"


def draws_bars(progress: Progress) -> bool:
    """Whether bars are drawn: if they are wanted, on a terminal or in a notebook."""
    if not progress or callable(progress) or _switched_off():
        return False
    return _on_terminal() or _in_notebook()


def _switched_off() -> bool:
    """Whether tqdm was told to be silent by its own variable. The command line tells so all ranks but the first."""
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_notebook() -> bool:
    return "IPython" in sys.modules and _bar_class().__module__ == "tqdm.notebook"


def _bar_class() -> Any:
    """tqdm's for a terminal or a notebook, imported where a bar is drawn.

    ``tqdm.auto`` is the same with asyncio, which takes as long to import as a small run to compute.
    """
    from tqdm import TqdmExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)  # that it may change how it chooses
        from tqdm.autonotebook import tqdm
    return tqdm
