"""What shows that an input of a section has changed, wherever in it that lies."""

from collections.abc import Callable
from pathlib import Path

import pytest

from perta_fast.cli.recipe_plan import states
from perta_fast.cli.recipe_results import leftover
from perta_fast.cli.recipe_section import Section
from perta_fast.cli.recipe_sections import COMMANDS
from perta_fast.records.recipe import Setting


def rows(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "Some words."}\n')


def other(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


INPUTS: dict[str, tuple[str, str, str, str, Callable[[Path], None]]] = {
    "rows in a file": ("unlearn", "retain", "rows.jsonl", "rows.jsonl", rows),
    "rows in a directory": ("unlearn", "retain", "rows", "rows/data/train.jsonl", rows),
    "one file of a directory": ("unlearn", "retain", "rows:train", "rows/train.jsonl", rows),
    "rows to tune on": ("tune", "data", "rows:train", "rows/train.jsonl", rows),
    "a file of a model": ("unlearn", "model", "model", "model/config.json", other),
    "a chat template": ("eval", "model", "model", "model/additional_chat_templates/tool_use.jinja", other),
    "importances to forget": ("sweep", "importance", "both", "both/forget/importance.safetensors", other),
    "importances to retain": ("sweep", "importance", "both", "both/retain/importance.safetensors", other),
    "one importance": ("sweep", "forget-importance", "one", "one/importance.safetensors", other),
    "a benchmark": ("eval", "data", "muse", "muse/knowmem/forget_qa.json", other),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_change_anywhere_in_an_input_is_seen(kind: str, tmp_path: Path) -> None:
    name, key, given, changed, write = INPUTS[kind]
    section = Section(name, COMMANDS[name], {key: Setting(given, "")}, tmp_path / "run.yaml")
    path = tmp_path / changed
    write(path)
    before = states(section)
    assert states(section) == before
    path.write_bytes(path.read_bytes() * 2)
    changed_now = states(section)
    assert list(changed_now) == [key] and changed_now != before


def test_what_is_changed_in_place_meanwhile_is_left_out(tmp_path: Path) -> None:
    other(tmp_path / "model" / "config.json")
    section = Section("unlearn", COMMANDS["unlearn"], {"model": Setting("model", "")}, tmp_path / "run.yaml")
    assert states(section, [tmp_path / "model"]) == {}


@pytest.mark.parametrize(
    ("name", "key", "refused"),
    [
        ("unlearn", "save-importance", True),
        ("sweep", "checkpoint", True),
        ("eval", "open-unlearning-dir", False),  # to which files are added
        ("report", "png", False),
    ],
)
def test_only_what_is_made_as_a_whole_is_in_the_way(name: str, key: str, refused: bool, tmp_path: Path) -> None:
    other(tmp_path / "place" / "file")
    settings = {key: Setting("place", ""), "out": Setting("out", "")}
    section = Section(name, COMMANDS[name], settings, tmp_path / "run.yaml")
    assert leftover(section) == (tmp_path / "place" if refused else None)
