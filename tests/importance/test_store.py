"""Importance on disk: what goes in comes out, the safetensors library reads it, damage is refused by name."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perta_fast import Importance, InputError, RunError
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.importance import store
from perta_fast.importance.store import ImportanceMetadata
from tests.support.checkpoints import draw, read_checkpoint, same_bytes, write_importance

METADATA = ImportanceMetadata(
    estimator="grad",
    data_hash="ab" * 32,
    sample_count=12,
    truncated_count=3,
    label_count=345,
    evaluated_at="/models/a é",
    perta_fast_version="0.1",
    torch_version="2.13",
    transformers_version="5.24",
    one_by_one="a.weight, a.bias",
    chat_template=True,
    system_prompt='Say "a é".\n',
    date="10 Apr 2025",
)
TENSORS = {
    "a.weight": draw((7, 5), seed=1),
    "a.bias": draw((7,), seed=2),
    "scalar": draw((), seed=3),
    "none": draw((0, 4)),
    "b.weight": draw((3, 11), seed=4),
}


def save(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Importance:
    importance = Importance(dict(tensors), METADATA)
    importance.save(folder)
    return importance


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit that TENSORS do not fit into."""
    monkeypatch.setattr(store, "SHARD_BYTES", 170)
    return 170


def reads_recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read whole from now on, in this order."""
    read: list[str] = []
    original = Checkpoint.tensor

    def recorded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return original(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", recorded)
    return read


def assert_equal(found: Importance, tensors: dict[str, torch.Tensor]) -> None:
    assert list(found.tensors) == list(tensors)
    assert all(same_bytes(found.tensors[name], tensors[name]) for name in tensors)


def test_round_trip(tmp_path: Path) -> None:
    saved = save(tmp_path / "importance")
    assert saved.directory == tmp_path / "importance"
    assert [path.name for path in tmp_path.rglob("*")] == ["importance", "importance.safetensors"]
    loaded = Importance.load(tmp_path / "importance")
    assert_equal(loaded, TENSORS)
    assert (loaded.metadata, loaded.directory) == (METADATA, saved.directory)


def test_the_library_reads_it(tmp_path: Path, small_shards: int) -> None:
    save(tmp_path / "importance")
    found = read_checkpoint(tmp_path / "importance")
    assert found.keys() == TENSORS.keys()
    assert all(same_bytes(found[name], TENSORS[name]) for name in TENSORS)
    for path in (tmp_path / "importance").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            table = file.metadata()
        assert table.pop("format") == "perta-importance"
        assert table.pop("format_version") == "1"
        assert "date_string" not in table  # what is None is not there
        assert table == {key: str(value) for key, value in asdict(METADATA).items() if value is not None}


def test_shards_and_index(tmp_path: Path, small_shards: int) -> None:
    save(tmp_path / "importance")
    shards = sorted((tmp_path / "importance").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"importance-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = json.loads((tmp_path / "importance" / "importance.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in TENSORS.values())
    for path in shards:
        sizes = [4 * tensor.numel() for tensor in load_file(path).values()]
        assert sum(sizes) <= small_shards or len(sizes) == 1
    assert_equal(Importance.load(tmp_path / "importance"), TENSORS)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 100))
def test_any_sizes_in_any_shards(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    tensors = {f"t{k}": draw((size,), seed=k) for k, size in enumerate(sizes)}
    folder = tmp_path_factory.mktemp("sizes") / "importance"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", limit)
        save(folder, tensors)
    assert_equal(Importance.load(folder), tensors)
    for path in folder.glob("*.safetensors"):
        written = [4 * tensor.numel() for tensor in load_file(path).values()]
        assert written  # no shard without tensors
        assert sum(written) <= limit or len([size for size in written if size]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_layouts_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    given = draw((6, 4), seed=5).to(dtype).T.requires_grad_()
    save(tmp_path / "importance", {"a": given})
    assert torch.equal(Importance.load(tmp_path / "importance").tensors["a"], given.detach().float())


def test_loading_reads_only_what_is_asked_for(
    tmp_path: Path, small_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "importance")
    read = reads_recorded(monkeypatch)
    loaded = Importance.load(tmp_path / "importance")
    assert (len(loaded.tensors), "a.bias" in loaded.tensors) == (5, True)
    assert list(loaded.tensors) == list(TENSORS)
    assert read == []
    assert torch.equal(loaded.tensors["b.weight"], TENSORS["b.weight"])
    assert read == ["b.weight"]
    with pytest.raises(KeyError):
        loaded.tensors["absent"]
    assert "absent" not in loaded.tensors


def test_a_loaded_importance_can_be_saved_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "first")
    read = reads_recorded(monkeypatch)
    Importance.load(tmp_path / "first").save(tmp_path / "second")
    assert read == list(TENSORS)  # each once
    names = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == names


def test_a_full_directory_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "importance")
    other = Importance({"c": torch.ones(2)}, replace(METADATA, sample_count=1))
    with pytest.raises(InputError, match="exists and is not empty"):
        other.save(tmp_path / "importance")
    assert other.directory is None
    assert_equal(Importance.load(tmp_path / "importance"), TENSORS)
    other.save(tmp_path / "importance", overwrite=True)
    assert list(Importance.load(tmp_path / "importance").tensors) == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_fully", full)
    with pytest.raises(RunError, match="the disk is full"):
        save(tmp_path / "importance")
    assert list(tmp_path.iterdir()) == []


# Damage.

GOOD = {
    "format": "perta-importance",
    "format_version": "1",
    **{key: str(value) for key, value in asdict(METADATA).items()},
}


def write(folder: Path, metadata: dict[str, str] | None) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "importance.safetensors", metadata)
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: None, "is not an importance made by"),
        (lambda table: {}, "is not an importance made by"),
        (lambda table: {"format": "pt"}, "is not an importance made by"),
        (lambda table: table | {"format": "other"}, "is not an importance made by"),
        (lambda table: table | {"estimator": "fisher"}, "is not an importance made by"),
        *(
            (lambda table, key=key: {k: v for k, v in table.items() if k != key}, "is not an importance made by")
            for key in ("format", "estimator", "data_hash", "sample_count", "evaluated_at")
        ),
        (lambda table: table | {"format_version": "2"}, "was written by a later version"),
        *(
            (lambda table, value=value: table | {"sample_count": value}, "counts that are not whole numbers")
            for value in ("", "-1", "3.5", "many", "²", "9" * 5000)
        ),
        (lambda table: table | {"label_count": "x"}, "counts that are not whole numbers"),
        (lambda table: table | {"truncated_count": "x"}, "counts that are not whole numbers"),
    ],
)
def test_damaged_metadata(
    change: Callable[[dict[str, str]], dict[str, str] | None], reason: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "importance", change(dict(GOOD)))
    with pytest.raises(InputError) as caught:
        Importance.load(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert reason in str(caught.value)


def test_metadata_of_the_first_days_is_read(tmp_path: Path) -> None:
    """Without what was added later: counts of truncated samples and labels, versions."""
    loaded = Importance.load(write_importance(tmp_path / "old", {"a": torch.ones(3)}))
    assert (loaded.metadata.sample_count, loaded.metadata.truncated_count) == (3, 0)
    assert loaded.metadata.torch_version == ""


def test_shards_of_different_runs(tmp_path: Path, small_shards: int) -> None:
    save(tmp_path / "importance")
    Importance(TENSORS, replace(METADATA, data_hash="cd" * 32)).save(tmp_path / "other")
    name = "importance-00002-of-00002.safetensors"
    (tmp_path / "importance" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(InputError, match="its shards come from different runs; estimate it again"):
        Importance.load(tmp_path / "importance")


def test_not_an_importance(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds neither importance\.safetensors nor"):
        Importance.load(tmp_path / "empty")
    with pytest.raises(InputError, match="no such directory"):
        Importance.load(tmp_path / "absent")
