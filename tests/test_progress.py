"""Progress as a callback and as a log, of whole runs and of one phase."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors import safe_open
from transformers.utils import logging as logging_of_transformers

import perta_fast as pf
from perta_fast import progress, progress_lines
from perta_fast.cli import main
from perta_fast.models.loading import load_subject
from tests.support.models import FORGET, RETAIN, Job

pytestmark = pytest.mark.usefixtures("one_thread")


class Listener:
    """Keeps what it is told, and raises ``error`` when a phase is done that is named ``stopping``.

    Its lock cannot be copied, as an open file or a window could not.
    """

    def __init__(self, stopping: str = "", error: BaseException | None = None) -> None:
        self.events: list[pf.Event] = []
        self.stopping, self.error = stopping, error
        self.busy = threading.Lock()

    def hear(self, event: pf.Event) -> None:
        assert self.busy.acquire(blocking=False), "called while another call is running"
        self.events.append(event)
        time.sleep(0)  # let another thread in
        self.busy.release()
        if event.phase == self.stopping and event.done == event.total:
            assert self.error is not None
            raise self.error

    def phases(self) -> dict[str, tuple[int, str]]:
        """Total and unit of each phase; each begins at nothing, only grows, and ends complete."""
        found = {}
        for phase, group in groupby(self.events, key=lambda event: event.phase):
            events = list(group)
            done = [event.done for event in events]
            assert done[0] == 0 and done == sorted(done) and done[-1] == events[0].total, phase
            assert len({(event.total, event.unit) for event in events}) == 1
            found[phase] = events[0].total, events[0].unit
        return found


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def data_bytes(directory: Path) -> int:
    """Bytes of all tensors, by the safetensors library."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def apply(job: Job, out: Path, **settings: Any) -> pf.Report:
    return pf.apply(*job.checkpoints, rule="tv", lam=0.5, out=out, **settings)


def test_bytes(job: Job, tmp_path: Path) -> None:
    listener = Listener()
    apply(job, tmp_path / "out", progress=listener.hear)
    inputs = [path for each in job.checkpoints for path in each.glob("*.safetensors")]
    inputs += [each / "model.safetensors.index.json" for each in job.checkpoints]
    outputs = shards(tmp_path / "out").values()
    assert listener.phases() == {
        "apply": (4 * data_bytes(job.model), "B"),  # three read, one written
        # What the subtraction has read and written was hashed by the way: headers and indexes are left.
        "hash inputs": (sum(path.stat().st_size for path in inputs) - 3 * data_bytes(job.model), "B"),
        "hash output": (sum(map(len, outputs)) - data_bytes(job.model), "B"),
    }


def unlearn(job: Job, out: Path, hear: Any, **settings: Any) -> None:
    pf.unlearn(
        *job.checkpoints, job.forget, job.retain, lam=1.0, out=out, progress=hear, **{"rule": "fisher"} | settings
    )


def sweep(job: Job, out: Path, hear: Any, bound: float | None = None) -> None:
    pf.sweep(*job.checkpoints, job.forget, job.retain, rule="tv", lams=[1], max_retain_rise=bound, progress=hear)


def bounded_sweep(job: Job, out: Path, hear: Any) -> None:
    """Its settings are scored one by one."""
    sweep(job, out, hear, bound=1000)


def evaluate(job: Job, out: Path, hear: Any) -> None:
    pf.evaluate(job.model, forget=job.forget, max_new_tokens=1, progress=hear)


def verify(job: Job, out: Path, hear: Any) -> None:
    apply(job, out, progress=False)
    pf.verify(out, progress=hear)


@pytest.mark.parametrize(
    "run, phases",
    [
        (unlearn, {"forget importance": (len(FORGET), "sample"), "retain importance": (len(RETAIN), "sample")}),
        # Embedding, two layers and head; each but the head is run through twice.
        (
            lambda *given: unlearn(*given, stream=True, rule="fisher"),
            {"unlearn": ((len(FORGET) + len(RETAIN)) * (2 * 3 + 1), "step")},
        ),
        (sweep, {"2 settings": (2 * 4 * (len(FORGET) + len(RETAIN)), "sample")}),  # in 4 parts of the model
        (
            bounded_sweep,
            {"tv, lambda 1, forget": (len(FORGET), "sample"), "tv, lambda 1, retain": (len(RETAIN), "sample")},
        ),
        (evaluate, {"forget": (len(FORGET), "sample"), "forget answers": (len(FORGET), "sample")}),
        (verify, {}),
    ],
    ids=["unlearn", "stream", "sweep", "bounded sweep", "evaluate", "verify"],
)
def test_every_kind_of_run(
    run: Callable[..., None],
    phases: dict[str, tuple[int, str]],
    job: Job,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    listener = Listener()
    run(job, tmp_path / "out", listener.hear)
    assert listener.events
    assert phases.items() <= listener.phases().items()
    assert "schedule" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt("mine"), pf.RunError("mine")])
def test_a_callback_stops_a_run_that_can_be_resumed(error: BaseException, job: Job, tmp_path: Path) -> None:
    apply(job, tmp_path / "whole")
    listener = Listener("hash output", error)
    with pytest.raises(type(error)) as raised:
        apply(job, tmp_path / "out", progress=listener.hear)
    assert raised.value is error or isinstance(raised.value, pf.Interrupted)
    assert not (tmp_path / "out").exists()
    assert pf.resume(tmp_path / "out", progress=Listener().hear).resumed == 1
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["hash inputs", "apply"])
def test_an_error_of_input_or_output_is_not_taken_for_the_disk(
    phase: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)  # so that it is raised in the thread that reads
    error = ConnectionError("no network")
    with pytest.raises(pf.RunError, match=r"^progress: the callback failed: no network$") as raised:
        apply(job, tmp_path / "out", progress=Listener(phase, error).hear)
    assert raised.value.__cause__ is error


def test_a_callback_stops_a_run_in_place(job: Job, tmp_path: Path) -> None:
    apply(job, tmp_path / "whole")
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    error = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as raised:
        pf.apply(model, job.base, job.tuned, rule="tv", lam=0.5, in_place=True, progress=Listener("change", error).hear)
    assert raised.value is error
    assert pf.resume(model, progress=Listener().hear).resumed == 1
    assert shards(model) == shards(tmp_path / "whole")


def test_at_most_ten_calls_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, listener = 1000.0, Listener()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    with progress.Bar(1000, "count", listener.hear) as bar:
        for step in range(1000):
            now = 1000 + step / 200  # five seconds in all
            bar.update(1)
    calls = [event.done for event in listener.events]
    assert calls[0] == 0 and calls[-1] == 1000
    assert 45 <= len(calls) <= 52


def test_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call in turn, although each thread would call at once."""
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    listener = Listener()
    with progress.Bar(400, "count", listener.hear, "sample") as bar, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(bar.update, 1) for _ in range(400)]:
            done.result()
    assert [event.done for event in listener.events] == [*range(401), 400]


def test_a_second_pass_counts_from_nothing() -> None:
    listener = Listener()
    with progress.Bar(4, "count", listener.hear, "sample") as bar:
        bar.update(4)
        bar.reset()
        bar.update(3)
    assert listener.events[-1] == pf.Event("count", 3, 4, "sample")


def test_log(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "perta_fast")
    report = pf.unlearn(
        *job.checkpoints,
        job.forget,
        job.forget,
        out=tmp_path / "out",
        max_length=40,
        progress=False,
        lam=1.0,
        rule="fisher",
    )
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "perta_fast"]
    phases = [text for level, text in lines if level == "INFO"]
    data = {
        when: [f"{when}, {role} data" for role in ("forget", "retain")] for when in ("base", "tuned", "before", "after")
    }
    names = ["forget importance", "retain importance", *data["base"], *data["tuned"], *data["before"]]
    names += ["apply", "hash inputs", "hash output", *data["after"]]
    assert [text.split(" begins: ")[0] for text in phases[::2]] == names
    assert [text.split(" is done: ")[0] for text in phases[1::2]] == names
    assert phases[0].endswith(f": {len(FORGET)} samples")
    assert report.warnings
    assert [text for level, text in lines if level == "WARNING"] == report.warnings


def test_log_of_a_phase_that_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "perta_fast")
    with pytest.raises(ZeroDivisionError), progress.Bar(9000, "count", False) as bar:
        bar.update(2000)
        raise ZeroDivisionError
    assert caplog.messages[0] == "count begins: 9 kB"
    assert caplog.messages[1].startswith("count was stopped: 2 kB in ")


def test_verbose(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, base, tuned = map(str, job.checkpoints)
    command = ["apply", "--model", model, "--base", base, "--tuned", tuned, "--rule", "tv", "--lam", "1"]
    assert main([*command, "--out", str(tmp_path / "silent")]) == 0
    silent = capfd.readouterr()
    assert main(["-v", *command, "--out", str(tmp_path / "told")]) == 0
    told = capfd.readouterr()
    assert silent.err == ""
    assert len(silent.out.splitlines()) == len(told.out.splitlines())
    lines = told.err.splitlines()
    assert len(lines) == 6
    assert "INFO apply begins: " in lines[0]
    assert logging.getLogger("perta_fast").level == logging.NOTSET


class Clock:
    """A clock that stands until it is moved, in place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress_lines, "time", clock)
    return clock


def test_lines_without_a_terminal(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    """After 10 s, then when both 30 s and a tenth of the phase have gone by; each says how far it has come."""
    with progress.Bar(1000, "count", True, "sample") as bar:
        for _ in range(1000):
            clock.now += 0.5
            bar.update(1)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "count: 20 of 1,000 samples (2%), 2 samples a second, 8.17 min left"
    assert [line.split(" of")[0] for line in lines] == [
        f"count: {done:,}" for done in [20, *range(120, 1000, 100), 1000]
    ]
    assert lines[-1] == "count: 1,000 of 1,000 samples (100%), done in 8.33 min"


def test_at_least_one_line_in_two_minutes(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(10**6, "count", True, "B") as bar:
        for _ in range(120):
            clock.now += 30
            bar.update(100)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" of")[0] for line in lines[:3]] == ["count: 100 B", "count: 500 B", "count: 900 B"]
    assert len(lines) == 1 + 119 // 4 + 1


def test_a_short_phase_writes_no_line(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(1000, "count", True) as bar:
        for _ in range(1000):
            clock.now += 0.0099
            bar.update(1)
    assert capfd.readouterr().err == ""


def test_a_line_of_a_resumed_phase_has_the_rate_of_this_run(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(1000, "count", True, "step", done=500) as bar:
        clock.now += 20
        bar.update(100)
    line = "count: 600 of 1,000 steps (60%), 5 steps a second, 80 s left\n"
    assert capfd.readouterr().err.startswith(line)


def test_a_second_pass_has_lines_of_its_own(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(4, "count", True, "sample") as bar:
        clock.now += 20
        bar.update(3)
        bar.reset()
        clock.now += 9
        bar.update(1)
        clock.now += 9
        bar.update(1, "loss 0.5")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1] == "count: 2 of 4 samples (50%), 0.111 samples a second, 18 s left; loss 0.5"
    assert lines[2] == "count: 2 of 4 samples (50%), done in 38 s; loss 0.5"


def test_a_phase_that_is_stopped_has_no_last_line(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.Bar(4, "count", True, "sample") as bar:
        clock.now += 20
        bar.update(3)
        raise ZeroDivisionError
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_lines_of_many_threads_stay_whole(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    def step(bar: progress.Bar) -> None:
        clock.now += 1
        bar.update(1)

    with progress.Bar(400, "count", True, "sample") as bar, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(step, bar) for _ in range(400)]:
            done.result()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) > 5
    assert all(line.startswith("count: ") and line.count(" of 400 samples") == 1 for line in lines)


@pytest.mark.parametrize("wanted", [False, Listener().hear])
def test_no_line_if_none_is_wanted(wanted: Any, clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(100, "count", wanted) as bar:
        clock.now += 100
        bar.update(50)
    assert capfd.readouterr().err == ""


def test_no_line_where_bars_are_switched_off(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on every rank but the first, by the command line."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress.Bar(100, "count", True) as bar:
        clock.now += 100
        bar.update(50)
    assert capfd.readouterr().err == ""


def test_a_log_that_cannot_be_written_ends_no_run(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))  # noqa: SIM115
    with progress.Bar(100, "count", True) as bar:
        clock.now += 100
        bar.update(50)
    monkeypatch.setattr("sys.stderr", None)
    with progress.Bar(100, "count", True) as bar:
        clock.now += 100
        bar.update(50)


def test_a_terminal_has_a_bar_and_no_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.Bar(100, "count", True, "sample") as bar:
        clock.now += 100
        bar.update(50, "loss 0.5")
    assert "count: " in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
    assert "left" not in terminal.getvalue()
    assert "\r" in terminal.getvalue()


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_transformers(
    shown: bool, job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only on a terminal, and if they are wanted; what they were before is what they are afterwards."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(logging_of_transformers, "_tqdm_active", shown)
    before = are_progress_bars_disabled()
    for wanted in (True, False):
        load_subject(job.base, "cpu", None, progress=wanted)
        assert "Loading weights" not in capfd.readouterr().err
        assert logging_of_transformers.is_progress_bar_enabled() is shown
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    for wanted in (True, False):
        load_subject(job.base, "cpu", None, progress=wanted)
        assert ("Loading weights" in capfd.readouterr().err) == (shown and wanted)
        assert logging_of_transformers.is_progress_bar_enabled() is shown
    assert are_progress_bars_disabled() is before


def test_a_quiet_command_leaves_bars_as_they_were(job: Job, tmp_path: Path) -> None:
    before = os.environ.get("TQDM_DISABLE")
    command = ["apply", "--model", job.model, "--base", job.base, "--tuned", job.tuned, "--rule", "tv", "--lam", 1]
    assert main([*map(str, command), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert os.environ.get("TQDM_DISABLE") == before
