"""Records as a notebook shows them: a line, a table, and what to doubt. All texts are escaped."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from perta_fast.errors import printable

_STYLES = {"left": "text-align: left", "right": "text-align: right; font-variant-numeric: tabular-nums"}
_MOST_ROWS = 200


@dataclass(frozen=True)
class Shown:
    """What is shown of a record. rows: of the table; the first column has names, the others numbers.

    chosen: the number of the row that stands out.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    chosen: int | None = None

    def as_html(self) -> str:
        """One division, which needs no style sheet."""
        parts = [f"<strong>{_text(self.title)}</strong>"]
        parts += [f"<br>{_text(line)}" for line in self.lines]
        if self.rows:
            parts.append(self._table())
        parts += [f"<br><strong>warning:</strong> {_text(warning)}" for warning in self.warnings]
        return f"<div>{''.join(parts)}</div>"

    def _table(self) -> str:
        head = _row("th", self.head)
        shown = [_row("td", cells, bold=number == self.chosen) for number, cells in enumerate(self.rows[:_MOST_ROWS])]
        rest = len(self.rows) - len(shown)
        more = f"<br>and {rest} more" if rest > 0 else ""
        return f"<table><thead>{head}</thead><tbody>{''.join(shown)}</tbody></table>{more}"


def number(value: float | None) -> str:
    """A number in a table; a dash if there is none."""
    return "–" if value is None or value != value else f"{value:.4g}"


def _row(tag: str, cells: Iterable[str], *, bold: bool = False) -> str:
    made = []
    for position, cell in enumerate(cells):
        text = f"<strong>{_text(cell)}</strong>" if bold else _text(cell)
        made.append(f'<{tag} style="{_STYLES["right" if position else "left"]}">{text}</{tag}>')
    return f"<tr>{''.join(made)}</tr>"


def _text(value: str) -> str:
    return escape(printable(value))
