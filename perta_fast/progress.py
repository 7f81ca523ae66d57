"""The phases of a run: a bar or a callback during each, and a line in the log at its start and end."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from perta_fast.errors import RunError
from perta_fast.memory import format_size

LOGGER = logging.getLogger("perta_fast")
_INTERVAL = 0.1  # seconds between calls of a callback, at least

Unit = Literal["B", "sample", "step"]


@dataclass(frozen=True)
class Event:
    """How far one phase of a run has come: what ``progress`` is called with, if it is a callable.

    phase: what is being done, in a few words. done, total: bytes ("B") read and written, samples, or steps: one
    sample through one part of a streamed model.

    It is called when a phase begins, at most ten times a second during it, and when it is done: one call at a
    time, not always from the thread that started the run. What it raises stops the run as Ctrl-C does, with the
    same work left to resume, and is raised by the function that was called (an OSError as the cause of a
    RunError).
    """

    phase: str
    done: int
    total: int
    unit: Unit


Progress = bool | Callable[[Event], object]  # whether bars are drawn, or what is called instead


class Bar:
    """One phase, as a context manager; ``update`` may be called from many threads."""

    def __init__(self, phase: str, total: int, unit: Unit, progress: Progress, done: int = 0) -> None:
        self._phase, self._unit, self._total = phase, unit, total
        self._first = self._done = done
        self._tell = progress if callable(progress) else None
        self._told = self._started = 0.0
        self._lock = threading.Lock()
        from tqdm.auto import tqdm  # here: when imported it reads the environment, which --quiet sets

        self._drawn = tqdm(
            total=total,
            initial=done,
            desc=phase,
            unit=unit,
            unit_scale=unit == "B",
            disable=None if progress and self._tell is None else True,  # None: only on a terminal
        )

    def __enter__(self) -> "Bar":
        self._started = time.perf_counter()
        LOGGER.info("%s begins: %s", self._phase, self._amount(self._total - self._done))
        self._report()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._drawn.close()
        ending = "is done" if error is None else "was stopped"
        amount, seconds = self._amount(self._done - self._first), time.perf_counter() - self._started
        LOGGER.info("%s %s: %s in %.2f s", self._phase, ending, amount, seconds)
        if error is None:
            self._report()

    def update(self, count: int) -> None:
        """Count ``count`` more as done."""
        with self._lock:
            self._done += count
            self._drawn.update(count)
            if time.monotonic() - self._told >= _INTERVAL:
                self._report()

    def reset(self) -> None:
        """Start again from 0."""
        with self._lock:
            self._done = 0
            self._drawn.reset()

    def _report(self) -> None:
        if self._tell is not None:
            self._told = time.monotonic()
            try:
                self._tell(Event(self._phase, self._done, self._total, self._unit))
            except OSError as error:  # or it would be taken for an error of a file of the run
                raise RunError(f"progress: the callback failed: {error}") from error

    def _amount(self, count: int) -> str:
        return format_size(count) if self._unit == "B" else f"{count:,} {self._unit}s"


def byte_bar(total: int, description: str, progress: Progress, done: int = 0) -> Bar:
    """A phase that is counted in bytes, from ``done``. A bar is drawn only on a terminal or in a notebook."""
    return Bar(description, total, "B", progress, done)


def sample_bar(total: int, description: str, progress: Progress) -> Bar:
    """``byte_bar`` for samples."""
    return Bar(description, total, "sample", progress)


def step_bar(total: int, description: str, progress: Progress) -> Bar:
    """``byte_bar`` for samples times the parts of a streamed model."""
    return Bar(description, total, "step", progress)
