"""Two rules of CONTRIBUTING.md on functions: how long they are, and how many parameters they take."""

import ast
from collections.abc import Iterator
from pathlib import Path

import perta_fast as pf

ROOT = Path(__file__).parents[1]
LINES, PARAMETERS = 80, 12


def functions(*folders: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    yield f"{file.relative_to(ROOT)}: {node.name}", node


def test_no_function_is_too_long() -> None:
    """The lines of what it does: signature and docstring do not count."""
    body = {
        where: node.body[1:] if ast.get_docstring(node) is not None else node.body
        for where, node in functions("perta_fast", "kernels", "bench", "tests")
    }
    lengths = {where: lines[-1].end_lineno - lines[0].lineno + 1 for where, lines in body.items() if lines}  # type: ignore[operator]
    assert len(lengths) > 1000
    assert {where: length for where, length in lengths.items() if length > LINES} == {}


def test_no_function_takes_too_many_parameters() -> None:
    """But those of the public API; a kernel takes what it is launched with."""
    counts = {
        where: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for where, node in functions("perta_fast", "bench", "tests")
        if node.name not in pf.__all__
    }
    assert {where: count for where, count in counts.items() if count > PARAMETERS} == {}
