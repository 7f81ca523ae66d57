"""What the pages of docs/ say of the code is there."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from perta_fast.evaluation.results import Evaluation
from perta_fast.importance.store import ImportanceMetadata
from perta_fast.records.file_record import FileRecord
from perta_fast.records.report import DataRecord, DirectoryRecord, Phase, Report, TensorReport
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.results import Sweep

ROOT = Path(__file__).parent.parent
FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"`((?:perta_fast|csrc)/[\w/]+\.(?:py|h|cpp))`\s+`([\w.]+)`", ARCHITECTURE)
SECTIONS: dict[str, list[Any]] = {
    "Importance": [ImportanceMetadata],
    "Report of a run": [Report, TensorReport, DirectoryRecord, FileRecord, DataRecord, Phase],
    "Sweep": [Sweep, ScoredSetting],
    "Evaluation": [Evaluation],
}


def names_of(kind: Any) -> list[str]:
    is_dataclass = hasattr(kind, "__dataclass_fields__")
    return [field.name for field in fields(kind)] if is_dataclass else list(kind.__annotations__)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_is_on_the_page_of_formats(title: str) -> None:
    section = next(part for part in FORMATS.split("\n## ") if part.startswith(title))
    named = set(re.findall(r"[`\"](\w+)[`\"]", section))
    for kind in SECTIONS[title]:
        assert set(names_of(kind)) - named == set(), kind.__name__


def test_every_step_of_the_traced_runs_is_in_the_code() -> None:
    assert len(STEPS) >= 20
    for path, name in STEPS:
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            assert name in defined(ast.parse(text)), f"{path} {name}"
        else:
            assert re.search(rf"\b{name}\b", text), f"{path} {name}"


def defined(module: ast.Module) -> set[str]:
    """Functions, classes and methods (``Class.method``) of a file."""
    names = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_every_room_is_in_the_picture() -> None:
    rooms = {path.parent.name for path in (ROOT / "perta_fast").glob("*/__init__.py")}
    rooms |= {path.stem for path in (ROOT / "perta_fast").glob("[a-z]*.py")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ARCHITECTURE, readme):
        assert {room for room in rooms if not re.search(rf"\b{room}\b", page)} == set()
