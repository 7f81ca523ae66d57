"""What ``perta resume`` could finish is given up by no other command unless it is asked to start over."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast import cli
from perta_fast.demo import run_demo
from perta_fast.reporting import write_page
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
    return pf.unlearn(*job.checkpoints, job.forget, job.retain, out=out, progress=False, **more)


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
    return write_page(out.with_name("done"), out, progress=False, **more)


def plots(job: Job, out: Path, **more: Any) -> object:
    return write_page(out.with_name("done"), out.with_name("elsewhere.html"), png=out, progress=False, **more)


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
        patched.setattr("perta_fast.files.new_directory._forget", lambda _: None)
        patched.setattr("perta_fast.subtraction.to_directory.copy_companions", stop)
        applied(job, tmp_path / "out")
    assert (tmp_path / ".out.perta-partial" / ".perta-run" / "job.json").exists()
    applied(job, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out")


def test_an_evaluation_that_is_saved_by_hand(job: Job, folder: Path) -> None:
    result = evaluation(job, folder / "other.json")
    assert isinstance(result, pf.Evaluation)
    with pytest.raises(pf.InputError, match="another run to this place was stopped"):
        result.save(folder / "out.json")
