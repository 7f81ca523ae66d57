"""The result of a choice is checked as that of a run with one setting, also if it was stopped."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import InputError, Interrupted, Report, choose, cli, resume, sweep, verify
from perta_fast.records.check import Check
from perta_fast.runs.check_result import PHASE
from perta_fast.runs.checked_rows import Rows
from perta_fast.subtraction import in_place, to_directory
from perta_fast.sweeping import run as sweeping_run
from tests.support.checked_runs import stop_in_the_check, watch_loads
from tests.support.models import FORGET, RETAIN, Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"max_retain_increase": 1000, "lams": [20.0, 50.0], "rules": "tv", "progress": False}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One whose model may be changed, with room for results beside it."""
    return write_job(tmp_path, torch.float32)


def run(job: Job, out: Path | None, **chosen: Any) -> Report:
    data: dict[str, Any] = {"forget": job.forget, "retain": job.retain}
    return choose(*job.checkpoints, **data | SETTINGS | {"out": out, "in_place": out is None} | chosen)


def checked(report: Report) -> Check:
    assert report.check is not None
    return report.check


@pytest.mark.parametrize("rules", [["tv"], ["preconditioned"], ["grad"]])
def test_the_numbers_are_those_of_a_run_with_the_chosen_setting(rules: list[str], job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", rules=rules, lams=[50.0])
    check, choice = checked(report), report.setting_choice
    assert choice is not None and check.is_whole
    for role, rows in (("forget", FORGET), ("retain", RETAIN)):
        data = check.data[role]
        assert data.after is not None and (data.rows, data.total) == (len(rows), len(rows))
        losses = [getattr(each, f"{role}_loss") for each in (choice.before, choice.after)]
        assert [data.before.loss, data.after.loss] == pytest.approx(losses, rel=1e-6)
    again = ["unlearn", "--recipe", tmp_path / "out" / "perta_report.json", "--out", tmp_path / "again", "--quiet"]
    assert cli.main([*map(str, again)]) == 0
    one = checked(Report.load(tmp_path / "again"))
    assert (one.data, one.base, one.tuned) == (check.data, check.base, check.tuned)


def test_where_it_is_said(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("model", "base", "tuned", "forget", "retain")
    words = [word for name in names for word in (f"--{name}", str(getattr(job, name)))]
    words += ["--choose", "max-retain-increase=1000", "--rule", "tv", "--lams", "50"]
    for name, more in (("with", []), ("without", ["--no-check"])):
        assert cli.main(["unlearn", *words, "--out", str(tmp_path / name), *more]) == 0
        report = Report.load(tmp_path / name)
        card, said = (tmp_path / name / "README.md").read_text(), capsys.readouterr().out
        assert (report.check is None, PHASE in report.phases) == ((True, False) if more else (False, True))
        assert ("orgotten: the loss" in card, "orgotten: the loss" in said) == (not more, not more)
        assert not verify(tmp_path / name, full=True, progress=False).problems


def test_a_streamed_choice_says_how(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(job, tmp_path / "out", stream=True, memory=1 << 34)
    line = next(line for line in report.summary().splitlines() if "not checked" in line)
    assert "the run was streamed" in line and line.endswith(f" --stream --memory {1 << 34}")
    assert cli.main(shlex.split(line.partition("To measure it: ")[2])[1:]) == 0
    assert "forget_loss" in capsys.readouterr().out


def test_a_sweep_is_checked_if_it_is_asked_to_be(job: Job, tmp_path: Path) -> None:
    data = (*job.checkpoints, job.forget, job.retain)
    settings: dict[str, Any] = {"rule": "tv", "lams": [50.0], "max_retain_increase": 1000, "progress": False}
    for name, check in (("plain", False), ("checked", True)):
        sweep(*data, **settings, checkpoint=tmp_path / name, out=tmp_path / f"{name}.sweep", check=check)
        assert (Report.load(tmp_path / name).check is not None) == check
    with pytest.raises(InputError, match="check is of a result; give checkpoint or in_place too"):
        sweep(*data, **settings, check=True)


def test_one_model_at_a_time(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = watch_loads(monkeypatch)
    run(job, tmp_path / "out")
    assert len(alive) >= 4


# What was stopped.


def stopped_at(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    return lambda monkeypatch: monkeypatch.setattr(owner, name, stop)


STOPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the result": stopped_at(sweeping_run, "write_best"),
    "before the check": stopped_at(Rows, "measure"),
    "as the result is made": stopped_at(to_directory, "describe_output"),
    "as the model is changed": stopped_at(in_place, "describe_output"),
    "in the check": stop_in_the_check,
}


@pytest.mark.parametrize(
    ("stop", "again"),
    [
        ("before the result", "out.sweep"),
        ("before the check", "the same call"),
        ("as the result is made", "out"),
        ("as the result is made", "out.sweep"),
        ("in the check", "the same call"),
        ("in the check", "out.sweep"),
    ],
)
def test_it_is_checked_when_it_goes_on(
    stop: str, again: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = checked(run(job, tmp_path / "whole")), tmp_path / "out"
    with monkeypatch.context() as patched:
        STOPS[stop](patched)
        with pytest.raises(Interrupted):
            run(job, out)
    if again == "the same call":
        run(job, out)
    else:
        resume(tmp_path / again, progress=False)
    assert checked(Report.load(out)).data == whole.data
    assert not verify(out, full=True, progress=False).problems


@pytest.mark.parametrize("again", ["the same call", "resume"])
@pytest.mark.parametrize("stop", ["before the check", "as the model is changed", "in the check"])
def test_it_is_checked_when_it_goes_on_in_place(
    stop: str, again: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checked(run(job, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        STOPS[stop](patched)
        with pytest.raises(Interrupted, match="the same command"):
            run(job, None)
    if again == "the same call" or stop == "before the check":
        run(job, None)
    else:
        resume(job.model if stop == "as the model is changed" else tmp_path / "model.sweep", progress=False)
    assert checked(Report.load(job.model)).data == whole.data
    assert not verify(job.model, progress=False).problems


def test_rows_given_in_python_are_there_for_the_same_call(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"forget": FORGET, "retain": RETAIN}
    with monkeypatch.context() as patched:
        stop_in_the_check(patched)
        with pytest.raises(Interrupted):
            run(job, tmp_path / "out", **given)
    assert checked(run(job, tmp_path / "out", **given)).is_whole
