"""Lines that say how far a phase has come, for where no bar can be drawn: a file, a notebook's log."""

import sys
import time
from contextlib import suppress
from typing import Literal

from perta_fast.errors import printable
from perta_fast.memory import format_duration, format_size

Unit = Literal["B", "sample", "step"]

_FIRST, _NEXT, _LATEST = 10.0, 30.0, 120.0  # seconds after the start, at least and at most after a line
_NEXT_SHARE = 0.1  # of the phase: what is done between two lines, unless the latest time comes first


class Lines:
    """The lines of one phase, on standard error: none in its first seconds, and the last one when it is done.

    done: what had been done of it before, by a run that was stopped.
    """

    def __init__(self, phase: str, total: int, unit: Unit, done: int) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._any = False
        self._first = self._shown = done
        self._started = self._began = self._at = time.monotonic()
        self._wait = _FIRST

    def show(self, done: int, note: str) -> None:
        """Write a line if it is time for one. note: what to say beside it; "" for nothing."""
        now = time.monotonic()
        since = now - self._at
        if since < self._wait or (done - self._shown < _NEXT_SHARE * self._total and since < _LATEST and self._any):
            return
        rate = (done - self._first) / (now - self._began)
        if rate <= 0 or done >= self._total:  # ``finish`` has the last line
            return
        left = f"{self._amount(rate)} a second, {format_duration((self._total - done) / rate)} left"
        self._write(f"{self._come(done)}, {left}", note)
        self._any, self._at, self._shown, self._wait = True, now, done, _NEXT

    def finish(self, done: int, note: str) -> None:
        """Write the last line, if there was another."""
        if self._any:
            self._write(f"{self._come(done)}, done in {format_duration(time.monotonic() - self._started)}", note)

    def restart(self) -> None:
        """Count from nothing."""
        self._first = self._shown = 0
        self._began = self._at = time.monotonic()
        self._wait = _FIRST

    def _come(self, done: int) -> str:
        share = done / self._total if self._total else 1.0
        amount = self._amount(done) if self._unit == "B" else f"{done:,}"
        return f"{amount} of {self._amount(self._total)} ({share:.0%})"

    def _amount(self, count: float) -> str:
        if self._unit == "B":
            return format_size(count)
        number = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
        return f"{number} {self._unit}{'' if count == 1 else 's'}"

    def _write(self, text: str, note: str) -> None:
        line = printable(f"{self._phase}: {text}{'; ' if note else ''}{note}")
        with suppress(OSError, ValueError, AttributeError):  # a log that is full, closed or missing ends no run
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
