"""What shows that an input has changed: of a model every file that it is loaded from, of any other its content."""

import os
from pathlib import Path

import pytest

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import (
    changed_file,
    check_inputs,
    input_files,
    state_of_file,
    state_of_input,
    states_below,
)
from perta_fast.errors import InputError
from tests.support.checkpoints import draw, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In two shards, with an index, a config and a card."""
    folder = write_checkpoint(tmp_path / "model", {"a": draw((2,)), "b": draw((3,))}, shards=2)
    for name in ("config.json", "README.md", "notes.pdf"):
        (folder / name).write_text("{}")
    return folder


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def test_a_change_of_any_file_that_a_model_is_loaded_from_is_seen(model: Path) -> None:
    """Of the index too: it may place a tensor into another shard."""
    before = input_files(Checkpoint.open(model))
    shard, *_ = sorted(model.glob("*.safetensors"))
    index, config = model / "model.safetensors.index.json", model / "config.json"
    assert before.keys() == {str(path) for path in model.iterdir() if path.name not in ("README.md", "notes.pdf")}
    for name in ("README.md", "notes.pdf"):
        append(model / name)
    check_inputs(before, input_files(Checkpoint.open(model)), "run")
    for path, change in ((shard, touch), (index, append), (config, append)):
        change(path)
        now = input_files(Checkpoint.open(model))
        with pytest.raises(InputError, match=rf"{path}: has changed since the run began; put the old file back, with"):
            check_inputs(before, now, "run")
        before = now
    config.unlink()
    with pytest.raises(InputError, match=r"config\.json: has changed since the run began"):
        check_inputs(before, input_files(Checkpoint.open(model)), "run")


def test_a_file_is_known_by_its_content_unless_it_is_large(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 9)
    small, large = state_of_file(path, 9), state_of_file(path, 8)
    touch(path)
    assert state_of_file(path, 9) == state_of_file(path) == small != state_of_file(path, 8) != large
    assert state_of_input(tmp_path) == {"rows.jsonl": small} and state_of_input(tmp_path / "none") is None
    (tmp_path / "x.safetensors").write_bytes(b"none of ours")
    assert state_of_file(tmp_path / "x.safetensors").keys() == {"hash"}


def test_the_first_file_below_a_directory_that_changed(model: Path) -> None:
    before = states_below(model)
    assert changed_file(model, {"a\0": {}}) == model / "a\0"  # of a record that anyone may have written
    (model / "new").touch()
    assert changed_file(model, before) is None
    for path, change in ((next(model.glob("*.safetensors")), touch), (model / "notes.pdf", append)):
        change(path)
        assert changed_file(model, before) == path
        before = states_below(model)
        path.unlink()
        assert changed_file(model, before) == path
        before = states_below(model)
