"""How far a run has come: each phase has a bar or a callback, and a line in the log at its start and its end."""

import logging
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from perta_fast.errors import RunError, printable
from perta_fast.memory import format_size

LOGGER = logging.getLogger("perta_fast")
LOGGER.addHandler(logging.NullHandler())  # silent unless the program sets up logging
_INTERVAL = 0.1  # least seconds between two calls of a callback

Unit = Literal["B", "sample", "step"]


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
    """One phase, as a context manager. Draws only on a terminal or in a notebook; many threads may ``update``."""

    def __init__(self, total: int, phase: str, progress: Progress, unit: Unit = "B", done: int = 0) -> None:
        self._phase, self._unit, self._total = phase, unit, total
        self._first = self._done = done
        self._callback = progress if callable(progress) else None
        self._called = self._started = 0.0
        self._lock = threading.Lock()
        self._drawn = None
        if progress and self._callback is None:
            self._drawn = _bar_class()(
                total=total,
                initial=done,
                desc=printable(phase),
                unit=unit,
                unit_scale=unit == "B",
                disable=None,  # only on a terminal
            )

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
        if error is None:
            self._report()

    def update(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._drawn is not None:
                self._drawn.update(count)
            if time.monotonic() - self._called >= _INTERVAL:
                self._report()

    def reset(self) -> None:
        with self._lock:
            self._done = 0
            if self._drawn is not None:
                self._drawn.reset()

    def _report(self) -> None:
        if self._callback is not None:
            self._called = time.monotonic()
            try:
                self._callback(Event(self._phase, self._done, self._total, self._unit))
            except OSError as error:  # it must not be taken for an error of one of the run's files
                raise RunError(f"progress: the callback failed: {error}") from error

    def _amount(self, count: int) -> str:
        return format_size(count) if self._unit == "B" else f"{count:,} {self._unit}s"


def _bar_class() -> Any:
    """tqdm's for a terminal or a notebook. It is imported late, as it reads the environment then, which --quiet sets.

    ``tqdm.auto`` is the same with asyncio, which takes as long to import as a small run to compute.
    """
    from tqdm import TqdmExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)  # that it may change how it chooses
        from tqdm.autonotebook import tqdm
    return tqdm
