"""``started`` of a report is when the run began, not when the subtraction did; ``finished``, when all was done."""

from pathlib import Path
from typing import Any

import pytest

from perta_fast import Report, apply, choose, resume, unlearn
from perta_fast.errors import Interrupted
from perta_fast.records import versions
from perta_fast.runs.checked_rows import Rows
from perta_fast.subtraction import to_directory
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")
BEGUN, LATER, LAST = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))
MODULES = ("runs.unlearn", "runs.apply", "runs.check_result", "sweeping.run", "subtraction.to_directory")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("started"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The time, in every module that asks for it: what is in the list now."""
    time = [BEGUN]
    for module in MODULES:
        monkeypatch.setattr(f"perta_fast.{module}.now", lambda: time[0])
    return time


def later(clock: list[str], monkeypatch: pytest.MonkeyPatch, target: Any, name: str, time: str = LATER) -> None:
    """The clock goes on when this function is called."""
    function = getattr(target, name)

    def called(*arguments: Any, **settings: Any) -> Any:
        clock[0] = time
        return function(*arguments, **settings)

    monkeypatch.setattr(target, name, called)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


WAYS: dict[str, dict[str, Any]] = {
    "the default, with a search": {},
    "tv": {"rule": "tv", "lam": 1.0},
    "importances": {"rule": "fisher", "lam": 1.0},
    "streamed": {"rule": "fisher", "lam": 1.0, "stream": True},
    "preconditioned and streamed": {"lam": 1.0, "stream": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_unlearn(way: str, job: Job, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    later(clock, monkeypatch, Rows, "measure")
    later(clock, monkeypatch, to_directory, "describe_inputs")
    later(clock, monkeypatch, versions, "installed_versions")
    monkeypatch.setattr("perta_fast.subtraction.report_entries.installed_versions", versions.installed_versions)
    data = {"forget": job.forget, "retain": job.retain}
    report = unlearn(*job.checkpoints, **data, out=tmp_path / "out", progress=False, **WAYS[way])
    assert (report.started, report.finished) == (BEGUN, LATER)


def test_apply(job: Job, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    later(clock, monkeypatch, to_directory, "describe_inputs")
    report = apply(*job.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    assert (report.started, report.finished) == (BEGUN, LATER)


def test_finished_is_after_the_check(
    job: Job, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Rows.measure

    def measured(self: Rows, subject: Any, role: str, when: str, most: int | None = None) -> Any:
        clock[0] = LAST if when == "after" else BEGUN
        return measure(self, subject, role, when, most)

    monkeypatch.setattr(Rows, "measure", measured)
    unlearn(*job.checkpoints, job.forget, job.retain, rule="tv", lam=1.0, out=tmp_path / "out", progress=False)
    assert Report.load(tmp_path / "out").finished == LAST


@pytest.mark.parametrize("stream", [False, True])
def test_a_resumed_run(
    stream: bool, job: Job, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"rule": "fisher", "lam": 1.0, "stream": stream}
    with monkeypatch.context() as patched:
        patched.setattr(to_directory, "describe_output", interrupted)
        with pytest.raises(Interrupted):
            unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "out", progress=False, **settings)
    clock[0] = LAST
    resume(tmp_path / "out", progress=False)
    report = Report.load(tmp_path / "out")
    assert (report.started, report.finished, report.resumed) == (BEGUN, LAST, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chosen_setting(
    stream: bool, job: Job, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring, which takes most of the time, is part of the run; also if it was stopped meanwhile."""
    settings: dict[str, Any] = {"rules": "tv", "lams": [1, 20, 400], "target_retain_loss": 1000, "stream": stream}
    data = (*job.checkpoints, job.forget, job.retain)
    with monkeypatch.context() as patched:
        patched.setattr("perta_fast.sweeping.run.write_best", interrupted)
        with pytest.raises(Interrupted):
            choose(*data, out=tmp_path / "out", progress=False, **settings)
    clock[0] = LAST
    report = choose(*data, out=tmp_path / "out", progress=False, **settings)
    assert (report.started, report.finished) == (BEGUN, LAST)
