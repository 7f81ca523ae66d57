"""The few pieces of HTML that a page is made of. Every text is escaped here, and nowhere else."""

import base64
import html
import math
import re
from collections.abc import Sequence

from perta_fast.records.typed_json import printable

# Nothing is loaded from anywhere and nothing runs.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5b616b; --page: #fff; --line: #d9dce1;
  --card: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --faint: #a0a6b0; --page: #16181c; --line: #3a3e46; --card: #202329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } h3 { font-size: 1rem; }
p, td, th, h3 { overflow-wrap: break-word; unicode-bidi: isolate; }
p, h3, .long { overflow-wrap: anywhere; }
.note, figcaption, caption { color: var(--faint); font-size: .9rem; text-align: left; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; text-align: left;
  vertical-align: top; }
.long { min-width: 9rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .5rem 0; }
img { width: 100%; max-width: 48rem; height: auto; background: #fff; border-radius: .4rem; }
.pair { display: grid; gap: .5rem; margin: .5rem 0 1rem; }
.pair > div { background: var(--card); border-radius: .4rem; padding: .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (min-width: 40rem) { .pair { grid-template-columns: 1fr 1fr; } }
@media print {
  :root { color-scheme: light; --text: #000; --faint: #444; --page: #fff; --line: #bbb; --card: #fff; }
  body { max-width: none; font-size: 10pt; } .scroll { overflow: visible; }
  img { width: auto; max-width: 100%; max-height: 22cm; }
  figure, tr, .pair { break-inside: avoid; } h2, h3, caption { break-after: avoid; }
  .pair > div { border: 1px solid #bbb; }
}
"""

_LONG = 24  # letters that no line break parts

Cell = str | int | float | None


def document(title: str, sections: Sequence[str]) -> bytes:
    """A whole page in UTF-8."""
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    return text.encode()


def escape(text: str) -> str:
    """``text`` as nothing but text, in elements and attributes alike."""
    shown = "".join(
        letter if letter >= " " or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return html.escape(printable(shown))


def section(identifier: str, title: str, *parts: str) -> str:
    return (
        f'<section id="{escape(identifier)}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls by itself where it is too wide. Numbers stand on the right; None is a dash."""
    numeric = [any(isinstance(row[k], int | float) for row in rows) for k in range(len(columns))]
    kinds = [' class="number"' if each else "" for each in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_breakable(name)}</th>' for name, kind in zip(columns, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind or _kind(cell)}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(left: tuple[str, str], right: tuple[str, str]) -> str:
    """Two titled texts, under each other on a narrow screen."""
    cells = (f"<div><strong>{escape(title)}</strong>\n{escape(text)}</div>" for title, text in (left, right))
    return f'<div class="pair">{"".join(cells)}</div>'


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _breakable(value)


def _breakable(text: str) -> str:
    """Names and paths may be broken after their separators."""
    return re.sub(r"(?<=[_/.])(?=\w)", "<wbr>", escape(text))


def _kind(value: Cell) -> str:
    """Hashes and the like may be broken anywhere."""
    pieces = re.split(r"[\s_/.]", value) if isinstance(value, str) else [""]
    return ' class="long"' if max(map(len, pieces)) > _LONG else ""
