"""Importances added up and taken apart, against means that are computed from the rows themselves."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from perta_fast import Importance, InputError, RunError, merge_importances, remove_importances
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.importance import combining, store
from perta_fast.importance.row_digests import FILE_NAME, RowDigests
from perta_fast.importance.store import ImportanceMetadata
from perta_fast.rules import ESTIMATORS, Estimator
from tests.support.checkpoints import draw, fingerprint

Tensors = dict[str, torch.Tensor]
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "scalar": (), "none": (0, 4), "b.weight": (3, 11)}
ROWS = range(12)
METADATA = ImportanceMetadata(
    estimator="grad",
    data_hash="",
    sample_count=0,
    truncated_count=0,
    label_count=0,
    evaluated_at="/models/base",
    perta_fast_version="0.1",
    torch_version="2.13",
    transformers_version="5.24",
    weights_hash="cd" * 32,
    dtype="float32",
    chat_template=True,
    system_prompt="Be brief.",
    date="10 Apr 2025",
)


def sample(number: int) -> Sample:
    return Sample((0, number), (IGNORED, number))


def exact(numbers: Sequence[int], estimator: str) -> Tensors:
    """The mean over rows of their gradients, or of the squares, float64."""
    means = {}
    for position, (name, shape) in enumerate(SHAPES.items()):
        gradients = [draw(shape, seed=100 * number + position).double() for number in numbers]
        values = gradients if estimator == "grad" else [gradient.square() for gradient in gradients]
        means[name] = torch.stack(values).mean(0)
    return means


def write(folder: Path, numbers: Sequence[int], estimator: Estimator = "grad", **changes: Any) -> Path:
    """The importance on rows of these numbers, as ``estimate_importance`` would save it."""
    rows = RowDigests.of([sample(number) for number in numbers])
    metadata = replace(
        METADATA,
        estimator=estimator,
        data_hash=f"data of {len(numbers)}",
        sample_count=len(numbers),
        label_count=3 * len(numbers),
        truncated_count=sum(number % 2 for number in numbers),
        rows_hash=rows.hash,
    )
    means = {name: mean.float() for name, mean in exact(numbers, estimator).items()}
    Importance(means, replace(metadata, **changes), rows=rows).save(folder)
    return folder


def assert_is_mean(found: Importance, numbers: Sequence[int], estimator: str, parts: Sequence[Sequence[int]]) -> None:
    """Off by no more than the rounding of what it was made of, and its own. parts: the rows of these."""
    expected, count = exact(numbers, estimator), len(numbers)
    assert list(found.tensors) == list(SHAPES)
    for name, mean in expected.items():
        rounding = sum(len(part) * 2.0**-24 * exact(part, estimator)[name].abs() for part in parts)
        limit = (rounding / count + 2.0**-24 * mean.abs()) * 1.001 + 1e-30
        tensor = found.tensors[name]
        assert tensor.dtype == torch.float32
        assert bool(((tensor.double() - mean).abs() <= limit).all()), name


# What comes out.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and chunks that the tensors do not fit into."""
    monkeypatch.setattr(store, "SHARD_BYTES", 170)
    monkeypatch.setattr(combining, "CHUNK", 4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_merging(estimator: Estimator, small: None, tmp_path: Path) -> None:
    parts = [ROWS[:5], ROWS[5:6], ROWS[6:]]
    folders = [write(tmp_path / f"{part}", part, estimator) for part in parts]
    found = merge_importances(folders, tmp_path / "out", progress=False)
    assert_is_mean(found, ROWS, estimator, parts)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_removing(estimator: Estimator, small: None, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", ROWS, estimator)
    parts = [ROWS[:2], ROWS[9:]]
    folders = [write(tmp_path / f"{part}", part, estimator) for part in parts]
    found = remove_importances(Importance.load(whole), folders, tmp_path / "out", progress=False)
    assert_is_mean(found, ROWS[2:9], estimator, [ROWS, *parts])
    for name in SHAPES:
        assert estimator == "grad" or not (found.tensors[name] < 0).any()


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", ROWS, one_by_one="a, b", read_as="x as text")
    part = write(tmp_path / "part", ROWS[:5], one_by_one="b, c", evaluated_at="/moved/base", date=None)
    found = remove_importances(whole, [part], tmp_path / "out", progress=False)
    rows = RowDigests.of([sample(number) for number in ROWS[5:]])
    expected = replace(
        METADATA,
        data_hash=rows.hash,
        rows_hash=rows.hash,
        sample_count=7,
        label_count=21,
        truncated_count=4,
        evaluated_at="/moved/base",
        one_by_one="a, b, c",
        read_as="x as text",
        combined="12 rows of data of 12 - 5 rows of data of 5",
    )
    assert replace(found.metadata, perta_fast_version="0.1") == expected
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == rows.content
    again = merge_importances([tmp_path / "out", part], tmp_path / "again", progress=False).metadata
    assert again.combined == f"7 rows of {rows.hash} + 5 rows of data of 5"
    assert (again.sample_count, again.label_count, again.truncated_count) == (12, 36, 6)
    assert (tmp_path / "again" / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=10), st.sampled_from(ESTIMATORS))
def test_any_partition(tmp_path_factory: pytest.TempPathFactory, groups: list[int], estimator: Estimator) -> None:
    """Parts make the whole; each but one taken out of it leaves that one."""
    parts = [[row for row, group in enumerate(groups) if group == number] for number in sorted(set(groups))]
    folder = tmp_path_factory.mktemp("partition")
    folders = [write(folder / f"{number}", part, estimator) for number, part in enumerate(parts)]
    whole = write(folder / "whole", range(len(groups)), estimator)
    if len(parts) > 1:
        merged = merge_importances(folders, folder / "merged", progress=False)
        assert_is_mean(merged, range(len(groups)), estimator, parts)
        assert merged.metadata.rows_hash == Importance.load(whole).metadata.rows_hash
        rest = remove_importances(whole, folders[1:], folder / "rest", progress=False)
        assert_is_mean(rest, parts[0], estimator, [range(len(groups)), *parts[1:]])
        assert rest.metadata.rows_hash == Importance.load(folders[0]).metadata.rows_hash


def test_one_request_after_the_other(tmp_path: Path) -> None:
    """Each from what remains of the last: the same rows are left, and the error stays in bounds."""
    remaining, parts = write(tmp_path / "whole", ROWS, "empirical-fisher"), [ROWS[:2], ROWS[2:5], ROWS[5:9]]
    for number, part in enumerate(parts):
        folder = write(tmp_path / f"part {number}", part, "empirical-fisher")
        remaining = tmp_path / f"rest {number}"
        remove_importances(tmp_path / (f"rest {number - 1}" if number else "whole"), [folder], remaining)
        with pytest.raises(InputError, match=f"{len(part)} of its {len(part)} rows are not among those of"):
            remove_importances(remaining, [folder], tmp_path / "twice")
    rounded = [ROWS, *parts, ROWS[2:], ROWS[5:]]  # what was rounded on the way
    assert_is_mean(Importance.load(remaining), ROWS[9:], "empirical-fisher", rounded)


def test_a_row_that_is_there_twice_is_taken_out_as_often_as_asked(tmp_path: Path) -> None:
    whole, part = write(tmp_path / "whole", [1, 1, 2]), write(tmp_path / "part", [1])
    found = remove_importances(whole, str(part), tmp_path / "out", progress=False)
    assert_is_mean(found, [1, 2], "grad", [[1, 1, 2], [1]])
    with pytest.raises(InputError, match="1 of its 1 rows are not among those of"):
        remove_importances(whole, [part, part, part], tmp_path / "more", progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of importances that were saved smaller; the result is float32, and what rounding made negative is 0."""
    whole, part = (write(tmp_path / str(rows), rows, "empirical-fisher") for rows in (ROWS, ROWS[:11]))
    values = []
    for folder in (whole, part):
        (path,) = folder.glob("*.safetensors")
        found = Importance.load(folder)
        tensors = {name: found.tensors[name].to(dtype) for name in found.tensors}
        save_file(tensors, path, metadata=store.as_strings(found.metadata))
        values.append({name: tensor.double() for name, tensor in tensors.items()})
    rest = remove_importances(whole, [part], tmp_path / "out", progress=False)
    negative = 0
    for name in SHAPES:
        expected = 12 * values[0][name] - 11 * values[1][name]
        negative += int((expected < 0).sum())
        assert torch.equal(rest.tensors[name], expected.clamp(min=0).float()), name
    assert negative


# What is refused.


def edited(folder: Path, change: Callable[[dict[str, str], Tensors], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors, table = load_file(path), store.as_strings(Importance.load(folder).metadata)
    change(table, tensors)
    save_file(tensors, path, metadata=table)


def no_rows(table: dict[str, str], tensors: Tensors) -> None:
    for name in ("rows_hash", "weights_hash", "dtype", "combined"):
        del table[name]


def live(table: dict[str, str], tensors: Tensors) -> None:
    table.update(weights_hash="", evaluated_at="live module")


def empty(table: dict[str, str], tensors: Tensors) -> None:
    table["sample_count"] = "0"


def lacking(table: dict[str, str], tensors: Tensors) -> None:
    del tensors["a.bias"]


def reshaped(table: dict[str, str], tensors: Tensors) -> None:
    tensors["a.weight"] = tensors["a.weight"].reshape(5, 7)


def double(table: dict[str, str], tensors: Tensors) -> None:
    tensors["a.weight"] = tensors["a.weight"].double()


def not_finite(table: dict[str, str], tensors: Tensors) -> None:
    tensors["b.weight"][1, 1] = float("nan")


EDITS = {
    no_rows: "part: does not know its rows, as it is of an earlier version",
    live: r"part: does not know the weights that it was taken at \(live module\)",
    empty: "part: its metadata says that it is a mean over no rows",
    lacking: "part: lacks tensor a.bias, which .*other has",
    reshaped: r"tensor a.weight: shape \[7, 5\] in .*other.*, \[5, 7\] in .*part",
    double: "part/importance.safetensors: tensor a.weight is F64",
    not_finite: "part/importance.safetensors: tensor b.weight has values that are not finite",
}
OTHER_METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": ({"estimator": "empirical-fisher"}, "one holds estimator grad, the other empirical-fisher"),
    "weights": ({"weights_hash": "ef" * 32}, "were taken at different weights, /models/base and /models/base"),
    "type": ({"dtype": "bfloat16"}, "the model was run in float32 and in bfloat16"),
    "prompt": ({"system_prompt": None}, "the system prompts differ, 'Be brief.' and none"),
    "date": ({"date": "11 Apr 2025"}, "told different dates, 10 Apr 2025 and 11 Apr 2025"),
}


def both_ways(tmp_path: Path, reason: str) -> None:
    """``part`` beside ``other`` and from ``whole``; the inputs stay as they were, and nothing is left."""
    before = fingerprint(tmp_path)
    with pytest.raises(InputError, match=reason):
        merge_importances([tmp_path / "other", tmp_path / "part"], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match=reason.replace("other has", "whole has").replace("other.*,", "whole.*,")):
        remove_importances(tmp_path / "whole", [tmp_path / "part"], tmp_path / "out", progress=False)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_what_cannot_be_added_is_refused(edit: Callable[[dict[str, str], Tensors], None], tmp_path: Path) -> None:
    for name, numbers in (("whole", ROWS), ("other", ROWS[5:]), ("part", ROWS[:5])):
        write(tmp_path / name, numbers)
    edited(tmp_path / "part", edit)
    both_ways(tmp_path, EDITS[edit])


@pytest.mark.parametrize("name", OTHER_METADATA)
def test_what_does_not_belong_together_is_refused(name: str, tmp_path: Path) -> None:
    changes, reason = OTHER_METADATA[name]
    for folder, numbers in (("whole", ROWS), ("other", ROWS[5:])):
        write(tmp_path / folder, numbers)
    write(tmp_path / "part", ROWS[:5], **changes)
    both_ways(tmp_path, reason)


def test_squares_below_0_are_refused(tmp_path: Path) -> None:
    def below_0(table: dict[str, str], tensors: Tensors) -> None:
        tensors["b.weight"][1, 1] = -1.0

    for name, numbers in (("whole", ROWS), ("other", ROWS[5:]), ("part", ROWS[:5])):
        write(tmp_path / name, numbers, estimator="empirical-fisher")
    edited(tmp_path / "part", below_0)
    both_ways(tmp_path, "part/importance.safetensors: tensor b.weight has squares below 0")


def test_what_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    def of(value: float) -> Callable[[dict[str, str], Tensors], None]:
        def edit(table: dict[str, str], tensors: Tensors) -> None:
            tensors["b.weight"][1, 1] = value

        return edit

    for name, numbers, value in (("whole", ROWS, 3e38), ("part", ROWS[:5], -3e38)):
        write(tmp_path / name, numbers)
        edited(tmp_path / name, of(value))
    before = fingerprint(tmp_path)
    with pytest.raises(InputError, match=r"tensor b\.weight would become larger than float32 holds"):
        remove_importances(tmp_path / "whole", [tmp_path / "part"], tmp_path / "out", progress=False)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_input_that_changes_meanwhile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write(tmp_path / each, rows) for each, rows in (("a", ROWS[:3]), ("b", ROWS[3:]))]
    (shard,) = (tmp_path / name).glob("*.safetensors")
    monkeypatch.setattr(combining, "ShardWriter", lambda *rest, **more: _changing(shard, *rest, **more))
    with pytest.raises(RunError, match=f"{shard}: has changed during the run; run the same command again"):
        merge_importances(folders, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def _changing(shard: Path, *arguments: Any, **settings: Any) -> store.ShardWriter:
    """A writer; while it is made, someone touches ``shard``."""
    os.utime(shard, ns=(0, 0))
    return store.ShardWriter(*arguments, **settings)


def test_prompts_of_texts_fit_all(tmp_path: Path) -> None:
    """Rows that went through no chat template had no prompt."""
    write(tmp_path / "texts", ROWS[:5], chat_template=False, system_prompt=None, date=None)
    write(tmp_path / "other", ROWS[5:])
    for order in (("texts", "other"), ("other", "texts")):
        found = merge_importances([tmp_path / name for name in order], tmp_path / f"{order[0]} first", progress=False)
        assert found.metadata.told == METADATA.told
    write(tmp_path / "others", [20, 21], system_prompt="Be long.")
    with pytest.raises(
        InputError, match=r"other and .*others: the system prompts differ, 'Be brief\.' and 'Be long\.'"
    ):
        merge_importances([tmp_path / name for name in ("texts", "other", "others")], tmp_path / "out")


def test_rows_that_would_count_twice(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(k), rows) for k, rows in enumerate((ROWS[:3], ROWS[6:], ROWS[1:5]))]
    with pytest.raises(InputError, match=r"2: 2 of its 4 rows are among those of .*0 and would count twice"):
        merge_importances(folders, tmp_path / "out", progress=False)
    for alone in (folders[:1], folders[0], str(folders[0]), Importance.load(folders[0])):
        with pytest.raises(InputError, match="merge takes two importances or more"):
            merge_importances(alone, tmp_path / "out", progress=False)  # type: ignore[arg-type]


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    whole, part = write(tmp_path / "whole", ROWS[:6]), write(tmp_path / "part", ROWS[4:9])
    with pytest.raises(InputError, match=r"part: 3 of its 5 rows are not among those of .*whole"):
        remove_importances(whole, [part], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="nothing would remain, as all of its 6 rows are removed"):
        remove_importances(whole, [whole], tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="remove takes one importance or more"):
        remove_importances(whole, [], tmp_path / "out", progress=False)


def test_squares_that_were_not_in_the_whole(tmp_path: Path) -> None:
    """Its rows are, but not what it says of them; the tensor is named, and nothing is left."""
    whole, part = (write(tmp_path / name, rows, "empirical-fisher") for name, rows in (("whole", ROWS), ("part", [3])))

    def larger(table: dict[str, str], tensors: Tensors) -> None:
        tensors["b.weight"] *= 20

    edited(part, larger)
    before = fingerprint(tmp_path)
    with pytest.raises(
        InputError, match=r"whole/importance.safetensors: tensor b.weight would become negative, .*part"
    ):
        remove_importances(whole, [part], tmp_path / "out", progress=False)
    assert fingerprint(tmp_path) == before


def test_an_importance_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in memory only; save it first"):
        merge_importances([write(tmp_path / "a", [1]), Importance({}, METADATA)], tmp_path / "out")


def test_outputs_do_not_replace_inputs(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, rows) for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:]))]
    before = fingerprint(tmp_path)
    for out in (tmp_path / "a", tmp_path):
        with pytest.raises(InputError, match="is or contains the input"):
            merge_importances(folders, out, overwrite=True, progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge_importances(folders, tmp_path / "full", progress=False)
    assert {path: digest for path, digest in fingerprint(tmp_path).items() if path.name != "file"} == before
    merge_importances(folders, tmp_path / "full", overwrite=True, progress=False)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["importance.safetensors", FILE_NAME]


# What is left behind.


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_fails(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write(tmp_path / name, rows) for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:]))]
    before = fingerprint(tmp_path)
    write_array = store.ShardWriter.write_array

    def failing(writer: store.ShardWriter, name: str, *arguments: Any) -> None:
        if name == "b.weight":
            raise error
        write_array(writer, name, *arguments)

    monkeypatch.setattr(store.ShardWriter, "write_array", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunError):
        merge_importances(folders, tmp_path / "out", progress=False)
    assert fingerprint(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


_KILLED = """
import os, sys
from perta_fast.importance.store import ShardWriter
from perta_fast.cli import main
original = ShardWriter.write_array
def killed(writer, name, *rest):
    if name == "b.weight":
        os.kill(os.getpid(), 9)
    original(writer, name, *rest)
if sys.argv[1] == "kill":
    ShardWriter.write_array = killed
status = main(sys.argv[2:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """No output is seen, and the same command makes it; it never imports torch."""
    write(tmp_path / "whole", ROWS, "empirical-fisher")
    write(tmp_path / "part", ROWS[:5], "empirical-fisher")
    before = fingerprint(tmp_path)
    arguments = ["importance", "--whole", "whole", "--remove", "part", "--out", "out", "--quiet"]

    def run(how: str) -> int:
        return subprocess.run([sys.executable, "-c", _KILLED, how, *arguments], cwd=tmp_path, check=False).returncode

    assert run("kill") == -9
    assert not (tmp_path / "out").exists()
    assert {path: digest for path, digest in fingerprint(tmp_path).items() if ".perta-" not in str(path)} == before
    assert run("go on") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "part", "whole"]
    assert_is_mean(Importance.load(tmp_path / "out"), ROWS[5:], "empirical-fisher", [ROWS, ROWS[:5]])


# What is kept of the rows elsewhere.


def test_rows_go_along_when_an_importance_is_saved_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "first", ROWS)
    Importance.load(folder).save(tmp_path / "second")
    names = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == names
    (folder / FILE_NAME).write_bytes(b"other")
    with pytest.raises(InputError, match=f"{FILE_NAME}: is not what was written"):
        Importance.load(folder).save(tmp_path / "third")
    (folder / FILE_NAME).unlink()  # by someone who does not want to keep it
    Importance.load(folder).save(tmp_path / "third")
    assert [path.name for path in (tmp_path / "third").iterdir()] == ["importance.safetensors"]
    assert not Importance.load(tmp_path / "third").metadata.rows_hash


def test_rows_that_are_not_known_are_not_claimed(tmp_path: Path) -> None:
    """An importance that was put together by hand, with the metadata of another."""
    loaded = Importance.load(write(tmp_path / "first", ROWS))
    Importance(dict(loaded.tensors), loaded.metadata).save(tmp_path / "second")
    assert Importance.load(tmp_path / "second").metadata == replace(loaded.metadata, rows_hash="")
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["importance.safetensors"]
