"""Files beside the weights: of a model in place that a run goes on with, and where importances were taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import perta_fast as pf
from perta_fast.files.durable import read_record, write_record
from perta_fast.subtraction import in_place
from tests.support.checkpoints import read_checkpoint, write_importance
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job, write_job

INDEX = "model.safetensors.index.json"
TEMPLATE = "additional_chat_templates/rag.jinja"
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "modeling_own.py", "README.md", TEMPLATE)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\n")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    inputs = write_inputs(tmp_path / "inputs", shards=2)
    for name in BESIDE:
        path = inputs["model"] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    return inputs


def change(inputs: Inputs, base: str = "base") -> pf.Report:
    """Change the model in place."""
    return pf.apply(inputs["model"], inputs[base], *inputs.all[2:], in_place=True, progress=False)


def stop_at_move(number: int, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, base: str = "base") -> None:
    """Change the model in place until a file is about to be moved.

    Config and index are moved aside; card, report, list, index and config are moved back: moves 1 to 7.
    """
    moved: list[Path] = []

    def move(source: Path, target: Path) -> None:
        moved.append(source)
        if len(moved) == number:
            raise KeyboardInterrupt
        source.rename(target)

    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr(in_place, "move", move)
        change(inputs, base)


def where(model: Path, name: str) -> Path:
    """Where a file of a model lies while a run in place is unfinished."""
    aside = model / ".perta-journal" / name
    return aside if name in ("config.json", INDEX) and aside.exists() else model / name


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "job.json"}


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    *((name, append, "has changed since the run began; put the old file back") for name in (*BESIDE, INDEX)),
    ("tokenizer.json", Path.unlink, "is gone since the run began"),
    (TEMPLATE, Path.unlink, "is gone since the run began"),
    ("chat_template.jinja", append, "was not there when the run began; move it away"),
    ("additional_chat_templates/new.jinja", append, "was not there when the run began"),
]


@pytest.mark.parametrize("move", [1, 2, 3, 7])
@pytest.mark.parametrize(("name", "damage", "reason"), CHANGES)
def test_companions_of_a_model_in_place(
    name: str,
    damage: Callable[[Path], object],
    reason: str,
    move: int,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = inputs["model"]
    pf.apply(*inputs.all, out=tmp_path / "out", progress=False)
    stop_at_move(move, inputs, monkeypatch)
    path = where(model, name)
    before = path.read_bytes() if path.exists() else None
    damage(path)
    stopped = state(model)
    with pytest.raises(pf.InputError, match=reason) as caught:
        pf.resume(model, progress=False)
    assert f"{model / name}: " in str(caught.value)
    assert state(model) == stopped
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    pf.resume(model, progress=False)
    result, expected = read_checkpoint(model), read_checkpoint(tmp_path / "out")
    assert result.keys() == expected.keys() and all(bool((result[key] == expected[key]).all()) for key in result)
    assert pf.verify(model, progress=False).problems == []
    listed = {key for key in pf.Report.load(model).inputs["model"]["files"] if "safetensors" not in key}
    assert listed == set(BESIDE)


@pytest.mark.parametrize("move", range(1, 8))
def test_what_the_run_itself_changes_is_not_refused(move: int, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the base in the same directory, a config that is a link, no card, and an older report."""
    model = inputs["model"]
    (model / "README.md").unlink()
    (model / "config.json").rename(model.parent / "linked.json")
    (model / "config.json").symlink_to("../linked.json")
    (model / "perta_report.json").write_text("old")
    stop_at_move(move, inputs, monkeypatch, base="model")
    pf.resume(model, progress=False)
    assert (model / "config.json").is_symlink() and (model / "config.json").read_text() == "{}"
    assert pf.verify(model, progress=False).problems == []


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("move", [3, 4, 6])
def test_a_file_that_was_put_in_the_place_of_one_set_aside(
    name: str, move: int, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download makes them again: it would be lost, or replace the model's own."""
    model = inputs["model"]
    stop_at_move(move, inputs, monkeypatch)
    kept = where(model, name).read_bytes()
    (model / name).write_text("another")
    with pytest.raises(pf.InputError, match=r"was put there while the run had set its own .* aside; move it away"):
        pf.resume(model, progress=False)
    assert (model / name).read_text() == "another"
    if move == 6:
        (model / name).unlink()
    else:
        (model / name).write_bytes(kept)  # the same again does no harm
    pf.resume(model, progress=False)
    assert (model / name).read_bytes() == kept
    assert pf.verify(model, progress=False).problems == []


def test_a_model_that_was_moved_while_its_run_was_stopped(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is the model, and its importances were taken there."""
    taken = str(inputs["model"].resolve())
    for role in ("forget", "retain"):
        shutil.rmtree(inputs[role])
        write_importance(inputs[role], inputs.tensors[role], evaluated_at=taken)
    stop_at_move(4, inputs, monkeypatch, base="model")
    inputs["model"].rename(tmp_path / "moved")
    pf.resume(tmp_path / "moved", progress=False)
    assert pf.verify(tmp_path / "moved", progress=False).problems == []


def test_a_new_card_that_was_edited_is_refused(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was moved into the model already, and is not the card that the run began with."""
    model = inputs["model"]
    stop_at_move(4, inputs, monkeypatch)
    assert "Unlearned" in (model / "README.md").read_text()
    append(model / "README.md")
    with pytest.raises(pf.InputError, match=r"README\.md: has changed since the run began"):
        pf.resume(model, progress=False)


@pytest.mark.parametrize("records", [{"x": {"a": {"bytes": 1, "blake3": ""}}}, {"x": {}}, {"model": {}}, {"base": {}}])
@pytest.mark.parametrize("move", [1, 4])
def test_records_that_no_run_wrote(
    records: dict[str, Any], move: int, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_move(move, inputs, monkeypatch)
    path = inputs["model"] / ".perta-journal" / "job.json"
    write_record(path, read_record(path) | {"companions": records})
    with pytest.raises(pf.InputError, match=r"is damaged: it names files of x|was not there when the run began"):
        pf.resume(inputs["model"], progress=False)


def test_an_index_that_changed_before_a_new_directory_is_finished(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for role in ("model", "base", "forget"):
        path = next(inputs[role].glob("*.index.json"))
        with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
            patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
            pf.apply(*inputs.all, out=out, overwrite=True, progress=False)
        before = path.read_bytes()
        append(path)
        with pytest.raises(pf.InputError, match=rf"{path.name}: has changed since the run began"):
            pf.resume(out, progress=False)
        path.write_bytes(before)
    pf.resume(out, progress=False)
    report = pf.Report.load(out)
    for role in ("model", "base", "tuned", "forget_importance", "retain_importance"):
        (path,) = Path(report.inputs[role]["path"]).glob("*.index.json")
        assert report.inputs[role]["files"][path.name]["blake3"] == blake3(path.read_bytes()).hexdigest()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job, a fourth checkpoint in the directory elsewhere, and importances i-forget and i-retain that it gave."""
    folder = tmp_path_factory.mktemp("taken")
    job = write_job(folder)
    shutil.copytree(job.tuned, folder / "elsewhere")
    (folder / "elsewhere" / "README.md").write_text("x")
    for role in ("forget", "retain"):
        pf.estimate_importance(folder / "elsewhere", folder / f"{role}.jsonl", out=folder / f"i-{role}", progress=False)
    return job


@pytest.fixture
def elsewhere(taken: Job) -> Path:
    return taken.model.parent / "elsewhere"


def importances(job: Job) -> tuple[Path, Path]:
    return job.model.parent / "i-forget", job.model.parent / "i-retain"


def chosen_by_a_sweep(job: Job, out: Path) -> pf.Report:
    how: dict[str, Any] = {"rule": "grad", "lams": [300.0], "select": "best-forget", "target_retain_loss": 1e6}
    pf.sweep(
        *job.checkpoints,
        job.forget,
        job.retain,
        *importances(job),
        out=out.with_name("sweep"),
        checkpoint=out,
        progress=False,
        **how,
    )
    return pf.Report.load(out)


def applied(job: Job, out: Path) -> pf.Report:
    return pf.apply(*job.checkpoints, *importances(job), out=out, progress=False)


def in_its_place(job: Job, out: Path) -> pf.Report:
    shutil.copytree(job.model, out)
    return pf.apply(out, job.base, job.tuned, *importances(job), in_place=True, progress=False)


WAYS = [applied, in_its_place, chosen_by_a_sweep]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_a_fourth_checkpoint(
    way: Callable[[Job, Path], pf.Report], taken: Job, elsewhere: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = way(taken, out)
    record = report.inputs["forget_evaluated_at"]
    assert "retain_evaluated_at" not in report.inputs
    assert record["path"] == str(elsewhere.resolve())
    assert record["files"].keys() == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    }
    for name, file in record["files"].items():
        content = (elsewhere / name).read_bytes()
        assert file == {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    assert pf.verify(out, progress=False).problems == []
    for name in ("tokenizer.json", "config.json"):
        before = (elsewhere / name).read_bytes()
        append(elsewhere / name)
        found = pf.verify(out, progress=False).problems
        (elsewhere / name).write_bytes(before)
        assert found == [f"{elsewhere / name} has changed since the run"]
    elsewhere.rename(elsewhere.with_name("away"))
    result = pf.verify(out, progress=False)
    elsewhere.with_name("away").rename(elsewhere)
    assert result.problems == []
    assert any(line.startswith("forget_evaluated_at: ") and line.endswith("is gone") for line in result.unchecked)


def test_two_places(taken: Job, tmp_path: Path) -> None:
    job, copy = taken, tmp_path / "copy"
    shutil.copytree(job.base, copy)
    retain = pf.estimate_importance(copy, job.retain, out=tmp_path / "i", progress=False).directory
    report = pf.apply(*job.checkpoints, importances(job)[0], retain, out=tmp_path / "out", progress=False)
    assert report.inputs["retain_evaluated_at"]["path"] == str(copy.resolve())
    assert "tokenizer.json" in report.inputs["retain_evaluated_at"]["files"]
    append(copy / "tokenizer.json")
    assert pf.verify(tmp_path / "out", progress=False).problems == [
        f"{copy / 'tokenizer.json'} has changed since the run"
    ]


def test_one_of_the_three_by_another_path(taken: Job, tmp_path: Path) -> None:
    """Directories are compared, not paths."""
    (tmp_path / "link").symlink_to(importances(taken)[0].parent / "elsewhere")
    report = pf.apply(
        taken.model, taken.base, tmp_path / "link", *importances(taken), out=tmp_path / "out", progress=False
    )
    assert not [role for role in report.inputs if role.endswith("evaluated_at")]
    assert "tokenizer.json" in report.inputs["tuned"]["files"]


@pytest.mark.parametrize("way", ["apply", "in place", "sweep"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_fourth_checkpoint_that_changed_between_a_stop_and_resume(
    gone: bool, way: str, taken: Job, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is gone altogether, the run can still be finished: it reads nothing there."""
    out = tmp_path / "sweep" if way == "sweep" else tmp_path / "out"
    stops = {"apply": "subtraction.to_directory.describe_output", "in place": "subtraction.in_place.describe_output"}
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr(f"perta_fast.{stops.get(way, 'sweeping.run.draw')}", stop)
        {"apply": applied, "in place": in_its_place, "sweep": chosen_by_a_sweep}[way](taken, tmp_path / "out")
    before = (elsewhere / "tokenizer.json").read_bytes()
    if gone:
        elsewhere.rename(elsewhere.with_name("away"))
    else:
        append(elsewhere / "tokenizer.json")
        with pytest.raises(pf.InputError, match=rf"{elsewhere}/tokenizer\.json: has changed since the"):
            pf.resume(out, progress=False)
        (elsewhere / "tokenizer.json").write_bytes(before)
    pf.resume(out, progress=False)
    if gone:
        elsewhere.with_name("away").rename(elsewhere)
    assert pf.verify(tmp_path / "out", progress=False).problems == []


@pytest.mark.parametrize("what", ["nothing", "no checkpoint", "a pipe", "relative", "no path", "live module"])
def test_a_place_that_is_no_checkpoint(what: str, inputs: Inputs, tmp_path: Path) -> None:
    """An importance may say anything: no other directory is listed in the report."""
    place = tmp_path / "home"
    if what == "no checkpoint":
        place.mkdir()
        (place / "config.json").write_text("{}")
        (place / "diary.txt").write_text("private")
    elif what == "a pipe":
        os.mkfifo(place)
    text = {"relative": "home", "no path": "/home\0", "live module": "live module"}.get(what, str(place))
    for role in ("forget", "retain"):
        shutil.rmtree(inputs[role])
        write_importance(inputs[role], inputs.tensors[role], evaluated_at=text)
    report = pf.apply(*inputs.all, out=tmp_path / "out", progress=False)
    unchecked = [line for line in pf.verify(tmp_path / "out", progress=False).unchecked if "taken" in line]
    if text == str(place):
        assert report.inputs["forget_evaluated_at"] == {"path": text, "files": {}}
        assert unchecked == [
            f"config and tokenizer of {text}, where an importance was taken: no model was there to hash"
        ]
    else:
        assert "forget_evaluated_at" not in report.inputs and unchecked == []


def test_a_place_that_the_output_replaces(taken: Job, elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere, tmp_path / "kept")
    try:
        pf.apply(*taken.checkpoints, *importances(taken), out=elsewhere, overwrite=True, progress=False)
        result = pf.verify(elsewhere, progress=False)
        assert result.problems == []
        assert pf.Report.load(elsewhere).inputs["forget_evaluated_at"]["kept"] is False
    finally:
        shutil.rmtree(elsewhere)
        (tmp_path / "kept").rename(elsewhere)


@pytest.mark.parametrize("name", ["model/tokenizer.json", "base/tokenizer.json", "tuned/config.json"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unlearning_in_place_that_was_stopped(
    stream: bool, name: str, taken: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(taken.model.parent, tmp_path / "copy")
    model, base, tuned, forget, retain = (
        tmp_path / "copy" / part for part in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")
    )
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.subtraction.in_place.describe_output", stop)
        pf.unlearn(
            model, base, tuned, forget, retain, stream=stream, in_place=True, progress=False, lam=1.0, rule="fisher"
        )
    path = tmp_path / "copy" / name
    before = path.read_bytes()
    append(path)
    with pytest.raises(pf.InputError, match=rf"{path}: has changed since the run began"):
        pf.resume(model, progress=False)
    path.write_bytes(before)
    pf.resume(model, progress=False)
    assert pf.verify(model, progress=False).problems == []


@pytest.mark.parametrize(
    ("name", "checkpoint", "refused"),
    [("tuned/config.json", False, True), ("model/README.md", False, False), ("model/README.md", True, True)],
)
def test_companions_of_a_sweep(
    name: str, checkpoint: bool, refused: bool, taken: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's card counts if a checkpoint is written, which has a copy."""
    shutil.copytree(taken.model.parent, tmp_path / "copy")
    (tmp_path / "copy" / "model" / "README.md").write_text("x")
    parts = ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")
    how: dict[str, Any] = {"rule": "tv", "lams": [0.5], "out": tmp_path / "sweep", "progress": False}
    if checkpoint:
        how |= {"select": "best-forget", "target_retain_loss": 1e6, "checkpoint": tmp_path / "best"}
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.sweeping.run.draw", stop)
        pf.sweep(*(tmp_path / "copy" / part for part in parts), **how)
    append(tmp_path / "copy" / name)
    if refused:
        with pytest.raises(pf.InputError, match=rf"{name}: has changed since the sweep began"):
            pf.resume(tmp_path / "sweep", progress=False)
    else:
        pf.resume(tmp_path / "sweep", progress=False)
