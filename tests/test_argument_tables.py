"""The site's pages of the Python API: arguments as tables, made of the prose of docstrings, without losing a word."""

import importlib.util
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf

pytest.importorskip("griffe", reason="an extension of griffe makes them")
SOURCE = Path(__file__).parent.parent / "docs" / "argument_tables.py"
NAMED = [getattr(pf, name) for name in pf.__all__]
PUBLIC = [
    value
    for value in NAMED
    if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, BaseException))
]


def tables() -> Any:
    spec = importlib.util.spec_from_file_location("argument_tables", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(value: Any) -> str:
    names = dict.fromkeys((*inspect.signature(value).parameters, *vars(value)), ("int | None", "3"))
    text: str = tables().with_table(inspect.getdoc(value), names, "argument")
    return text


def rows(text: str) -> dict[str, str]:
    """The last cell of each row, by the names in its first."""
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]
    return {name: row[-1] for row in cells for name in re.findall(r"`(\w+)`", row[0])}


def test_a_table_of_prose() -> None:
    names = {"lam": ("float | None", "1.0"), "mu": ("float", ""), "out": ("Path", ""), "to": ("Path", "")}
    text = "Do it.\n\nlam: how far, as in\n``{a: b}``. A second sentence. mu, lam: a | b; out: a file. "
    text += "Other arguments as in ``f``.\n\nReturns: nothing. Raises ValueError."
    assert tables().with_table(text, names, "argument").split("\n\n") == [
        "Do it.",
        "| argument | type | meaning |\n"
        "|---|---|---|\n"
        "| `lam` | `float | None` = `1.0` | how far, as in ``{a: b}``. A second sentence. |\n"
        "| `mu`, `lam` | `float`, `float | None` = `1.0` | a \\| b. |\n"
        "| `out` | `Path` | a file. |",
        "Other arguments as in ``f``.",
        "Returns: nothing. Raises ValueError.",
    ]
    assert tables().with_table("Nothing to explain.\n\n    code: here", names, "argument").endswith("    code: here")


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
def test_no_word_is_lost(value: Any) -> None:
    text = inspect.getdoc(value)
    assert text is not None
    kept = re.sub(r"^\|[-|]+\|$|^\| argument .*$|`int \| None` = `3`", "", shown(value), flags=re.MULTILINE)
    before, after = (Counter(re.findall(r"[^\W_]\w*", each)) for each in (text, kept))
    before.subtract(word for word in after.elements())
    assert {word: count for word, count in before.items() if count > 0} == {}


def test_the_arguments_of_unlearn() -> None:
    found = rows(shown(pf.unlearn))
    assert found.keys() >= {"rule", "forget", "retain", "fields", "download", "lam", "at", "save_importance", "stream"}
    assert found["lam"].startswith("None searches for the largest")
    assert found["download"] == "fetch them there first."


def test_prose_stays_readable_in_help() -> None:
    assert not [value for value in PUBLIC if "|---" in (value.__doc__ or "")]
