"""The page's templates, and how they show a value. Jinja2 escapes each value once, when it inserts it."""

import base64
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_LONG = 24  # letters without a place for a line break
_WORDS = re.compile(r"[\s_/.]")

Cell = str | int | float | None


@cache
def templates() -> Environment:
    """The environment of ``page.html``, with filters and tests."""
    environment = Environment(
        loader=PackageLoader("perta_fast.reporting"),
        autoescape=True,
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "breakable": _breakable,
        "cell": _cell,
        "numeric_columns": _numeric_columns,
    }
    # A text, such as a hash, that must be broken inside a word to fit a narrow column.
    environment.tests["long"] = lambda cell: isinstance(cell, str) and max(map(len, _WORDS.split(cell))) > _LONG
    return environment


def _text(value: Any) -> Any:
    """A value as text that any browser can show; HTML is not changed."""
    if isinstance(value, Markup):
        return value
    shown = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return shown.encode(errors="backslashreplace").decode()


def _cell(value: Cell) -> str:
    """The text of a table's cell; a dash for a value that is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _breakable(value)


def _breakable(text: str) -> Markup:
    """A name or a path that a browser may break after its separators."""
    return Markup(re.sub(r"(?<=[_/])(?=\w)|(?<=\.)(?=[^\W\d])", "<wbr>", escape(_text(text))))


def _numeric_columns(rows: Sequence[Sequence[Cell]], count: int) -> list[bool]:
    """Whether each column holds a number."""
    return [any(isinstance(row[k], int | float) for row in rows) for k in range(count)]
