"""Tables in Markdown whose cells are means over pieces, some of which may not have been made yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.study.store import NotYet

MISSING = "not yet run"
HEAD = 2  # lines of a table before its first row

Thunk = Callable[[], Any]  # reads from a piece; raises NotYet if the piece is missing


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Write ``text`` between two markers of ``page``; the text around them stays."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def cell(thunks: Sequence[Thunk], number: Callable[[Any], float], form: str = "{:.3f}") -> str:
    """The mean of a number over seeds; if some are missing it says how many it has."""
    numbers = list(map(number, made(thunks)))
    if not numbers:
        return MISSING
    text = over(numbers, form)
    return text if len(numbers) == len(thunks) else f"{text} ({len(numbers)} of {len(thunks)})"


def over(numbers: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation."""
    text = form.format(mean(numbers))
    return f"{text} ± {form.format(stdev(numbers))}" if len(numbers) > 1 else text


def made(thunks: Iterable[Thunk]) -> list[Any]:
    """The results of the thunks whose pieces are finished."""
    results = []
    for thunk in thunks:
        with suppress(NotYet):
            results.append(thunk())
    return results


def head(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(titles), "|---" * len(titles) + "|"]


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
