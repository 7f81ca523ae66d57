"""Tables of arguments and fields for the pages of the Python API.

Docstrings are plain prose, for ``help()``: what an argument means follows its name and a colon. This finds these places
and makes a table of them; the rest stays as it is.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import griffe

_REST = re.compile(r"(?<=[.;] )(Other arguments|Others? ).*$", re.DOTALL)  # a sentence that ends the last cell


class ArgumentTables(griffe.Extension):
    """For mkdocstrings: changes the docstring of each function and class before it is shown."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = with_table(func.docstring.value, _parameters(func.parameters), "argument")

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is not None:
            func = cls.members.get("__init__")
            rows = _parameters(cls.parameters) if func is None else _parameters(func.parameters)  # type: ignore[union-attr]
            fields = {name: text for name, text in rows.items() if name != "self"}
            own = {name: ("", "") for name, member in cls.members.items() if member.is_attribute}
            cls.docstring.value = with_table(cls.docstring.value, own | fields, "field")


def with_table(text: str, names: dict[str, tuple[str, str]], title: str) -> str:
    """``text`` with a table of the ``names`` that it explains, where the first of them stood.

    names: each with its type and default, as in the source.
    """
    if not names:
        return text
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    begins = re.compile(rf"(?:^|(?<=[.;:)] ))((?:{known})(?:(?:, | and )(?:{known}))*): ")
    above: list[str] = []
    rows: list[tuple[str, str]] = []
    below: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        joined = paragraph if re.search(r"^ {4}|^[-*|] ", paragraph, re.MULTILINE) else " ".join(paragraph.split())
        before, *found = begins.split(joined)
        if not found:
            (below if rows else above).append(paragraph)
            continue
        if before.strip():
            (below if rows else above).append(before.strip())
        pairs = list(zip(found[::2], found[1::2], strict=True))
        if rest := _REST.search(pairs[-1][1]):
            pairs[-1] = (pairs[-1][0], pairs[-1][1][: rest.start()])
            below.append(rest[0])
        rows += pairs
    return "\n\n".join([*above, *([_table(rows, names, title)] if rows else []), *below])


def _table(rows: Iterable[tuple[str, str]], names: dict[str, tuple[str, str]], title: str) -> str:
    lines = [f"| {title} | type | meaning |", "|---|---|---|"]
    for which, meaning in rows:
        words = re.split(r", | and ", which)
        called = ", ".join(f"`{word}`" for word in words)
        lines.append(f"| {called} | {_types([names[word] for word in words])} | {_cell(_sentence(meaning))} |")
    return "\n".join(lines)


def _types(types: Sequence[tuple[str, str]]) -> str:
    """Type and default of the arguments in one row, each once."""
    shown = []
    for kind, default in dict.fromkeys(types):
        text = f"`{kind}`" if kind else ""
        shown.append(f"{text} = `{default}`" if default else text)
    return ", ".join(filter(None, shown))


def _sentence(text: str) -> str:
    text = text.strip().rstrip(";")
    return text if text.endswith((".", ":")) else f"{text}."


def _cell(text: str) -> str:
    """A bar would end the cell, but not within code."""
    parts = text.split("`")
    return "`".join(part if inside % 2 else part.replace("|", "\\|") for inside, part in enumerate(parts))


def _parameters(parameters: Any) -> dict[str, tuple[str, str]]:
    """By name: type and default. Types are written without quotes."""
    return {
        each.name: (str(each.annotation or "").strip("\"'"), "" if each.default is None else str(each.default))
        for each in parameters
        if each.name.isidentifier()
    }
