"""What ``perta resume`` could finish is given up by no other command unless it is asked to start over."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import perta_fast as pf
from perta_fast import cli
from perta_fast.demo import run_demo
from perta_fast.reporting import write_report
from perta_fast.streaming.write_behind import WriteBehind
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs to the directories out.json, out.html, out.yaml and out, and a sweep to sweep: all stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    pf.apply(*job.checkpoints, rule="tv", out=folder / "done", progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        for name in ("out", "out.json", "out.html", "out.yaml"):
            with pytest.raises(pf.Interrupted):
                pf.apply(*job.checkpoints, rule="tv", lam=0.5, out=folder / name, progress=False)
        patched.setattr("perta_fast.sweeping.run.draw", stop)
        with pytest.raises(pf.Interrupted):
            pf.sweep(
                *job.checkpoints, job.forget, job.retain, rule="tv", lams=[0.5], out=folder / "sweep", progress=False
            )
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, for one test; the runs themselves are resumed where they were begun."""
    kept = tmp_path / "kept"
    shutil.copytree(stopped, kept, symlinks=True)
    yield stopped
    shutil.rmtree(stopped)
    shutil.copytree(kept, stopped, symlinks=True)


def importance(job: Job, out: Path, **more: Any) -> object:
    return pf.estimate_importance(job.base, job.forget, out=out, progress=False, **more)


def tune(job: Job, out: Path, **more: Any) -> object:
    return pf.tune(job.base, job.forget, out, epochs=1, progress=False, **more)


def evaluation(job: Job, out: Path, **more: Any) -> object:
    return pf.evaluate(job.base, forget=job.forget, out=out, max_new_tokens=1, progress=False, **more)


def unlearning(job: Job, out: Path, **more: Any) -> object:
    return pf.unlearn(
        *job.checkpoints, job.forget, job.retain, lam=1.0, out=out, progress=False, **{"rule": "fisher"} | more
    )


def applied(job: Job, out: Path, **more: Any) -> object:
    return pf.apply(*job.checkpoints, rule="tv", lam=0.75, out=out, progress=False, **more)


def sweep(job: Job, out: Path, **more: Any) -> object:
    how = {"rule": "tv", "lams": [9.0], "progress": False}
    return pf.sweep(*job.checkpoints, job.forget, job.retain, **how | more, out=out)


def saved(job: Job, out: Path, **more: Any) -> object:
    return pf.estimate_importance(job.base, job.forget, progress=False).save(out, **more)


def kept(job: Job, out: Path, **more: Any) -> object:
    return unlearning(job, out.with_name("elsewhere"), save_importance=out, **more)


def chosen(job: Job, out: Path, **more: Any) -> object:
    where = out.with_name("elsewhere")
    return sweep(job, where, select="best-forget", lams=[200.0], target_retain_loss=1e6, checkpoint=out, **more)


def streamed(function: Callable[..., object]) -> Callable[..., object]:
    return lambda job, out, **more: function(job, out, stream=True, **more)


def page(job: Job, out: Path, **more: Any) -> object:
    return write_report(out.with_name("done"), out, progress=False, **more)


def plots(job: Job, out: Path, **more: Any) -> object:
    return write_report(out.with_name("done"), out.with_name("elsewhere.html"), png=out, progress=False, **more)


def template(job: Job, out: Path, overwrite: bool = False) -> object:
    status = cli.main(["recipe", "init", "--out", str(out), *(["--overwrite"] if overwrite else [])])
    if status:
        raise pf.InputError("as it was printed: another run to this place was stopped; perta resume")
    return None


def other_sweep(job: Job, out: Path, **more: Any) -> object:
    return sweep(job, out, lams=[0.25], **more)


TO_DIRECTORIES = [importance, streamed(importance), saved, tune, unlearning, streamed(unlearning), applied, other_sweep]
TO_DIRECTORIES += [kept, streamed(kept), chosen, plots]
CASES = [(function, name) for function in TO_DIRECTORIES for name in ("out", "sweep")]
CASES += [(evaluation, "out.json"), (page, "out.html"), (template, "out.yaml")]


@pytest.mark.parametrize(("function", "name"), CASES)
def test_refused_and_then_finished(function: Callable[..., object], name: str, job: Job, folder: Path) -> None:
    before = fingerprint(folder)
    with pytest.raises(pf.InputError, match=r"another run to this place was stopped.*perta resume"):
        function(job, folder / name)
    assert fingerprint(folder) == before
    pf.resume(folder / name, progress=False)
    assert (folder / name / ("sweep.json" if name == "sweep" else "perta_report.json")).exists()


@pytest.mark.parametrize(("function", "name"), CASES)
def test_overwrite_starts_over(function: Callable[..., object], name: str, job: Job, folder: Path) -> None:
    function(job, folder / name, overwrite=True)
    assert (folder / name).exists()
    assert not (folder / f".{name}.perta-partial").exists()
    with pytest.raises(pf.InputError, match="there is no unfinished run to resume"):
        pf.resume(folder / name, progress=False)


def test_the_message_on_the_command_line(job: Job, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["importance", "--model", job.base, "--data", job.forget, "--out", folder / "out"]
    assert cli.main(list(map(str, asked))) == 2
    finishing = f"finish it with: perta resume {folder / 'out'}, or start over with --overwrite"
    assert finishing in capsys.readouterr().err
    with pytest.raises(pf.InputError, match=r"perta resume .*, or choose another directory"):
        run_demo(folder / "out", fast=True)


def test_a_run_that_had_no_work_yet_is_begun_again(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job is on the disk, but no part is: the same command starts over, as it always did."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("perta_fast.files.new_directory.remove", lambda _: None)  # as if killed
        patched.setattr("perta_fast.files.new_directory.forget", lambda _: None)
        patched.setattr("perta_fast.subtraction.to_directory.copy_companions", stop)
        applied(job, tmp_path / "out")
    assert (tmp_path / ".out.perta-partial" / ".perta-run" / "job.json").exists()
    applied(job, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("function", [applied, unlearning, streamed(unlearning)], ids=["apply", "unlearn", "stream"])
def test_what_was_begun_with_overwrite_goes_on_without(
    function: Callable[..., object], job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may replace it was told when it began; another run is refused with the command that finishes it."""
    out = tmp_path / "out"
    pf.apply(*job.checkpoints, rule="tv", out=out, progress=False)
    how = {"rule": "tv"} if function is unlearning else {}
    function(job, tmp_path / "expected", **how)
    before = fingerprint(out)
    with monkeypatch.context() as patched:
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        with pytest.raises(pf.Interrupted):
            function(job, out, overwrite=True, **how)
    assert fingerprint(out) == before
    with pytest.raises(pf.InputError, match="another run to this place was stopped; finish it with: perta resume"):
        pf.apply(*job.checkpoints, rule="tv", lam=0.125, out=out, progress=False)
    function(job, out, **how)
    assert read_checkpoint(out).keys() == read_checkpoint(tmp_path / "expected").keys()
    for name, tensor in read_checkpoint(tmp_path / "expected").items():
        assert torch.equal(read_checkpoint(out)[name], tensor)


def test_an_evaluation_that_is_saved_by_hand(job: Job, folder: Path) -> None:
    result = evaluation(job, folder / "other.json")
    assert isinstance(result, pf.Evaluation)
    with pytest.raises(pf.InputError, match="another run to this place was stopped"):
        result.save(folder / "out.json")


KEPT = ("kept", "kept.json", "kept.html", "kept.yaml")


@pytest.fixture(scope="module")
def stopped_walks(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streamed runs, stopped when a part of their importances is written, which keep them in the directories KEPT."""
    folder = tmp_path_factory.mktemp("walks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests that go on with them
    pf.apply(*job.checkpoints, rule="tv", out=folder / "done", progress=False)
    for name in KEPT:
        stop_walk(job, folder / f"run to {name}", folder / name)
    torch.set_num_threads(threads)
    return folder


def stop_walk(job: Job, out: Path, keep: Path, steps: int = 4) -> None:
    record, calls = WriteBehind._record, []

    def stop_later(writing: WriteBehind, done: int, *rest: Any) -> None:
        calls.append(done)
        if len(calls) > steps:
            raise KeyboardInterrupt
        record(writing, done, *rest)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(pf.Interrupted if steps else KeyboardInterrupt):
        patched.setattr(WriteBehind, "_record", stop_later)
        streamed(unlearning)(job, out, save_importance=keep)


@pytest.fixture
def walks(stopped_walks: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, for one test, where they were begun."""
    shutil.copytree(stopped_walks, tmp_path / "all", symlinks=True)
    yield stopped_walks
    shutil.rmtree(stopped_walks)
    shutil.copytree(tmp_path / "all", stopped_walks, symlinks=True)


AT_KEPT = [(function, "kept") for function in TO_DIRECTORIES]
AT_KEPT += [(evaluation, "kept.json"), (page, "kept.html"), (template, "kept.yaml")]


@pytest.mark.parametrize(("function", "name"), AT_KEPT)
def test_importances_of_a_stopped_walk_are_not_given_up(
    function: Callable[..., object], name: str, job: Job, walks: Path
) -> None:
    before = fingerprint(walks)
    with pytest.raises(pf.InputError, match=r"another run.* was stopped.*perta resume"):
        function(job, walks / name)
    assert fingerprint(walks) == before


def test_the_run_that_keeps_them_is_finished_as_the_message_says(
    job: Job, walks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = walks / "run to kept"
    assert cli.main(["importance", f"--model={job.base}", f"--data={job.forget}", f"--out={walks / 'kept'}"]) == 2
    message = capsys.readouterr().err
    finishing = f"finish it with: perta resume '{out}'"
    assert f"kept: another run which keeps its importances here was stopped; {finishing}, or give it up" in message
    assert cli.main(["resume", str(walks / "kept")]) == 2
    message = capsys.readouterr().err
    assert f"importances of another run are kept here: {finishing}" in message
    pf.resume(out, progress=False)
    streamed(unlearning)(job, tmp_path / "at once", save_importance=tmp_path / "kept")
    names = [path.relative_to(tmp_path / "kept") for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert names and not any((walks / name).exists() for name in (".kept.perta-partial", "run to kept/.perta-run"))
    assert all((walks / "kept" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes() for name in names)
    assert sorted(path.name for path in (walks / "kept").iterdir()) == ["forget", "retain"]
    importance(job, walks / "kept", overwrite=True)


@pytest.mark.parametrize(
    ("function", "name"),
    [(importance, "kept"), (applied, "kept"), (kept, "kept"), (streamed(kept), "kept"), (evaluation, "kept.json")],
)
def test_overwrite_gives_them_up(function: Callable[..., object], name: str, job: Job, walks: Path) -> None:
    """Also if what was written there instead holds importances of another run."""
    function(job, walks / name, overwrite=True)
    before = fingerprint(walks / name)
    with pytest.raises(pf.InputError, match=r"start it over with overwrite|holds what no run has written"):
        pf.resume(walks / f"run to {name}", progress=False)
    assert fingerprint(walks / name) == before
    streamed(unlearning)(job, walks / f"run to {name}", save_importance=walks / "new", overwrite=True)


def test_importances_of_a_run_that_was_given_up_hold_no_place(job: Job, walks: Path) -> None:
    unlearning(job, walks / "run to kept", overwrite=True)
    importance(job, walks / "kept")
    assert (walks / "kept" / "importance.safetensors").exists()
    unlearning(job, walks / "run to kept", save_importance=walks / "kept", overwrite=True)


def test_the_same_command_goes_on(job: Job, walks: Path) -> None:
    report = streamed(unlearning)(job, walks / "run to kept", save_importance=walks / "kept")
    assert isinstance(report, pf.Report) and report.resumed == 1
    assert sorted(path.name for path in (walks / "kept").iterdir()) == ["forget", "retain"]


@pytest.mark.parametrize("how", ["resume", "the same command"])
def test_a_walk_that_had_no_work_yet(how: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    with monkeypatch.context() as patched:
        patched.setattr("perta_fast.files.new_directory.remove", lambda _: None)  # as if killed
        patched.setattr("perta_fast.files.new_directory.forget", lambda _: None)
        stop_walk(job, out, keep, steps=0)
    assert (tmp_path / ".kept.perta-partial").exists()
    with pytest.raises(pf.InputError, match="which keeps its importances here was stopped"):
        importance(job, keep)
    if how == "resume":
        pf.resume(out, progress=False)
    else:
        streamed(unlearning)(job, out, save_importance=keep)
    assert sorted(path.name for path in keep.iterdir()) == ["forget", "retain"]


def test_a_walk_stopped_when_its_importances_have_their_name(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        streamed(unlearning)(job, out, save_importance=keep)
    assert keep.exists()
    shutil.copytree(keep, tmp_path / "copy")
    kept(job, keep, overwrite=True)  # of another run
    with pytest.raises(pf.InputError, match="does not hold the importances that the run has written"):
        pf.resume(out, progress=False)
    shutil.rmtree(keep)
    (tmp_path / "copy").rename(keep)
    pf.resume(out, progress=False)
    assert sorted(path.name for path in keep.iterdir()) == ["forget", "retain"]
    assert pf.verify(out, progress=False).problems == []
