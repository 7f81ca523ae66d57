"""Progress as a callback and as a log, of whole runs and of one phase."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

import perta_fast as pf
from perta_fast import progress
from perta_fast.cli import main
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


def sweep(job: Job, out: Path, hear: Any) -> None:
    pf.sweep(*job.checkpoints, job.forget, job.retain, rule="tv", lams=[1], progress=hear)


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
        (sweep, {"tv, lambda 1, forget": (len(FORGET), "sample"), "tv, lambda 1, retain": (len(RETAIN), "sample")}),
        (evaluate, {"forget": (len(FORGET), "sample"), "forget answers": (len(FORGET), "sample")}),
        (verify, {}),
    ],
    ids=["unlearn", "stream", "sweep", "evaluate", "verify"],
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
