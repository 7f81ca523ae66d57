"""Sweeps that were stopped: what was scored is not scored again, and the outcome is that of one run."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, Interrupted, PertaError, RunError, Sweep, apply, cli, resume, sweep
from perta_fast.files.durable import read_record, write_record
from perta_fast.runs import estimate
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.sweeping import chosen_checkpoint as writing
from perta_fast.sweeping import run as sweeping_run
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.children import perta, signal_at
from tests.support.models import RETAIN, Job, write_job, write_lines
from tests.support.processors import have_instructions

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "rule": ["tv", "fisher"],
    "lams": [2, 8],
    "max_retain_rise": 1000,  # settings that may be skipped are scored one by one
    "select": "closest",
    "batch_size": 4,
    "progress": False,
}
SCORED = ["gold", "the model as it is"] + [f"{rule}, lambda {lam}" for rule in ("tv", "fisher") for lam in (2, 8)]


def run(job: Job, folder: Path, **changes: Any) -> Sweep:
    places = {"gold": job.tuned, "out": folder / "out", "checkpoint": folder / "chosen"}
    return sweep(*job.checkpoints, job.forget, job.retain, **SETTINGS | places | changes)


@pytest.fixture(scope="module")
def own_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One whose files may be changed."""
    return write_job(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def whole(own_job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """What is found without a stop, and the checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    return run(own_job, folder), folder / "chosen"


class Watch:
    """The scorings and estimates that take place.

    ``stop_at`` raises ``error`` instead of the scoring of that name, ``estimates_left`` instead of an estimate.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scored: list[str] = []
        self.estimates = 0
        self.stop_at: str | None = None
        self.estimates_left = 2
        self.error: BaseException = KeyboardInterrupt()
        score, estimate_on = ScoredModel.score, estimate.estimate_on

        def watched(model: ScoredModel, name: str) -> Any:
            if name == self.stop_at:
                raise self.error
            self.scored.append(name)
            return score(model, name)

        def counted(*arguments: Any, **settings: Any) -> Any:
            if self.estimates == self.estimates_left:
                raise self.error
            self.estimates += 1
            return estimate_on(*arguments, **settings)

        monkeypatch.setattr(ScoredModel, "score", watched)
        monkeypatch.setattr(estimate, "estimate_on", counted)

    def forget(self) -> None:
        """As in a new process."""
        self.scored, self.estimates, self.stop_at, self.estimates_left = [], 0, None, 2


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def assert_same(found: Sweep, folder: Path, whole: tuple[Sweep, Path]) -> None:
    """The outcome of an uninterrupted sweep, but for times, in memory and on the disk."""
    expected, checkpoint = whole
    assert [replace(row, seconds=0.0) for row in found.rows] == [replace(row, seconds=0.0) for row in expected.rows]
    assert [path.name for path in sorted(folder.iterdir())] == ["chosen", "out"]
    assert [path.name for path in (folder / "out").iterdir()] == ["sweep.json"]
    assert Sweep.read(folder / "out" / "sweep.json").rows == found.rows
    one, other = read_checkpoint(folder / "chosen"), read_checkpoint(checkpoint)
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)


Again = Callable[[Job, Path], Any]
AGAIN: dict[str, Again] = {"the same command": run, "resume": lambda _, folder: resume(folder / "out", progress=False)}


@pytest.mark.parametrize(
    ("place", "again"), [(SCORED[1], "the same command"), (SCORED[2], "resume"), (SCORED[5], "the same command")]
)
def test_stopped_at_a_scoring(
    place: str, again: str, own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch
) -> None:
    watch.stop_at = place
    with pytest.raises(Interrupted, match=rf"kept\. Go on with: perta resume {tmp_path}/out$"):
        run(own_job, tmp_path)
    assert watch.scored == SCORED[: SCORED.index(place)]
    assert [path.name for path in tmp_path.iterdir()] == [".out.perta-partial"]
    estimated = watch.estimates
    watch.forget()
    found = AGAIN[again](own_job, tmp_path)
    assert watch.scored == SCORED[SCORED.index(place) :]
    assert estimated + watch.estimates == 2
    assert_same(found, tmp_path, whole)


def test_stopped_between_two_estimates(own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch) -> None:
    watch.estimates_left = 1
    with pytest.raises(Interrupted):
        run(own_job, tmp_path)
    assert watch.scored == SCORED[:2]
    watch.forget()
    found = run(own_job, tmp_path)
    assert watch.estimates == 1 and watch.scored == SCORED[2:]
    assert_same(found, tmp_path, whole)


def test_killed(own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch) -> None:
    """By a signal that no process can catch, between two settings."""
    setup = 'import sys\nsys.modules["matplotlib.figure"] = None\n'
    setup += signal_at("SIGKILL", "scoring.live_model.apply_to_module_", earlier=2)  # at the second setting
    model, base, tuned = own_job.checkpoints
    done = perta(
        *("sweep", "--model", model, "--base", base, "--tuned", tuned),
        *("--forget", own_job.forget, "--retain", own_job.retain, "--gold", own_job.tuned),
        *("--rules", "tv,fisher", "--lams", "2,8", "--select", "closest", "--batch-size", 4, "--max-retain-rise", 1000),
        *("--out", tmp_path / "out", "--checkpoint", tmp_path / "chosen", "--quiet"),
        setup=setup,
    )
    assert done.returncode == -9, done.stderr
    assert cli.main(["resume", str(tmp_path / "out"), "--quiet"]) == 0
    assert watch.scored == SCORED[3:]
    assert_same(Sweep.read(tmp_path / "out" / "sweep.json"), tmp_path, whole)


def test_stopped_in_a_search(job: Job, tmp_path: Path, watch: Watch) -> None:
    """The strengths that were tried lead to the same next one."""
    left_out = dict.fromkeys(("lams", "max_retain_rise", "select", "checkpoint", "gold"))
    settings: dict[str, Any] = {"rule": "tv", "max_retain_increase": 10, **left_out}
    expected = run(job, tmp_path / "whole", **settings)
    watch.forget()
    watch.stop_at = f"tv, lambda {expected.rows[-3].lam:g}"
    with pytest.raises(Interrupted):
        run(job, tmp_path, **settings)
    before = len(watch.scored)
    watch.forget()
    found = run(job, tmp_path, **settings)
    assert before + len(watch.scored) == len(expected.rows)
    assert [(row.lam, row.retain_loss) for row in found.rows] == [(row.lam, row.retain_loss) for row in expected.rows]


def stop(*arguments: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "done"),
    [
        (writing, "apply_sources", []),  # before the checkpoint
        (Sweep, "save", ["chosen"]),  # after it
        (sweeping_run, "remove", ["chosen", "out"]),  # after everything
    ],
)
def test_stopped_after_the_last_scoring(
    owner: Any,
    name: str,
    done: list[str],
    own_job: Job,
    whole: tuple[Sweep, Path],
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, stop)
        run(own_job, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")] == done
    before = fingerprint(tmp_path / "chosen")
    times = {path: path.stat().st_mtime_ns for path in before}
    watch.forget()
    found = resume(tmp_path / "out", progress=False)
    assert watch.scored == [] and watch.estimates == 0
    assert isinstance(found, Sweep)
    assert_same(found, tmp_path, whole)
    if before:  # not written twice
        assert {path: path.stat().st_mtime_ns for path in fingerprint(tmp_path / "chosen")} == times
    with pytest.raises(InputError, match="there is no unfinished run to resume"):
        resume(tmp_path / "out")


def test_what_a_sweep_replaced_goes_when_it_is_resumed(
    own_job: Job, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last rename and the removal of the old directory."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweeping_run, "remove", stop)
        run(own_job, tmp_path, checkpoint=None)
    (tmp_path / ".out.perta-replaced").mkdir()
    resume(tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What is refused, or not kept.


@pytest.fixture
def stopped(own_job: Job, tmp_path: Path, watch: Watch) -> Path:
    """The directory of a sweep that was stopped before its last setting."""
    watch.stop_at = SCORED[-1]
    with pytest.raises(Interrupted):
        run(own_job, tmp_path)
    watch.forget()
    return tmp_path


def change_data(job: Job) -> Callable[[], object]:
    content = job.retain.read_bytes()
    write_lines(job.retain, RETAIN[1:])
    return lambda: job.retain.write_bytes(content)


def change_weights(job: Job) -> Callable[[], object]:
    shard = sorted(job.base.glob("*.safetensors"))[0]
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    os.utime(shard, ns=(times[0], times[1] + 1))
    return lambda: os.utime(shard, ns=times)


@pytest.mark.parametrize(
    ("change", "words"),
    [(change_data, r"retain\.jsonl: has changed"), (change_weights, r"base/.*\.safetensors: has changed")],
)
def test_changed_inputs_are_refused(
    change: Callable[[Job], Callable[[], object]],
    words: str,
    own_job: Job,
    whole: tuple[Sweep, Path],
    stopped: Path,
    watch: Watch,
) -> None:
    """Nothing is lost: with the old file back, the sweep goes on."""
    put_back = change(own_job)
    before = fingerprint(stopped)
    try:
        for again in AGAIN.values():
            with pytest.raises(InputError, match=f"{words} since the sweep began; put the old file back"):
                again(own_job, stopped)
    finally:
        put_back()
    assert fingerprint(stopped) == before
    assert_same(run(own_job, stopped), stopped, whole)
    assert watch.scored == SCORED[-1:]


def test_it_goes_on_in_its_type_on_a_processor_of_another_kind(
    own_job: Job, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_instructions(monkeypatch, True)
    whole = run(own_job, tmp_path / "whole"), tmp_path / "whole" / "chosen"
    watch.forget()
    watch.stop_at = SCORED[3]
    with pytest.raises(Interrupted):
        run(own_job, tmp_path / "stopped")
    watch.forget()
    have_instructions(monkeypatch, False)
    found = resume(tmp_path / "stopped" / "out", progress=False)
    assert watch.scored == SCORED[3:] and found.settings["dtype"] == "bfloat16"
    assert_same(found, tmp_path / "stopped", whole)


def test_an_input_that_goes_meanwhile(own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch) -> None:
    """What was scored is no less true."""
    watch.stop_at, watch.error = SCORED[-1], InputError("base: no such directory")
    with pytest.raises(RunError, match=rf"base: no such directory\. What was scored is kept; .* {tmp_path}/out$"):
        run(own_job, tmp_path)
    watch.forget()
    assert_same(run(own_job, tmp_path), tmp_path, whole)
    assert watch.scored == SCORED[-1:]


def test_another_sweep_to_the_same_place(own_job: Job, whole: tuple[Sweep, Path], stopped: Path, watch: Watch) -> None:
    before = fingerprint(stopped)
    with pytest.raises(InputError, match=r"another run to this place was stopped; finish it with: perta resume"):
        run(own_job, stopped, lams=[2, 8, 9])
    assert fingerprint(stopped) == before
    found = run(own_job, stopped, overwrite=True)
    assert watch.scored == SCORED and watch.estimates == 2
    assert_same(found, stopped, whole)


def test_a_sweep_of_given_rows_that_overwrites_goes_on_without(own_job: Job, tmp_path: Path, watch: Watch) -> None:
    """The call that began it would start over."""
    rows = [{"text": "Some words to forget."}]
    few: dict[str, Any] = {"rule": "tv", "gold": None, "select": None, "checkpoint": None}
    own = Job(*own_job.checkpoints, rows, own_job.retain)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    watch.stop_at = SCORED[3]
    with pytest.raises(Interrupted, match=r"Go on with: the same call, with the same rows, without overwrite$"):
        run(own, tmp_path, overwrite=True, **few)
    watch.forget()
    assert len(run(own, tmp_path, **few).rows) == 3
    assert watch.scored == SCORED[3:4]


def test_a_sweep_in_place_that_overwrites_goes_on_without(
    own_job: Job, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(own_job.model, tmp_path / "model")
    _, base, tuned = own_job.checkpoints
    command: list[object] = ["sweep", "--model", model, "--base", base, "--tuned", tuned, "--rule", "tv"]
    command += ["--forget", own_job.forget, "--retain", own_job.retain, "--max-retain-rise", 1000, "--lams", "2,8"]
    command += ["--gold", tuned, "--select", "closest", "--quiet", "--in-place", "--out", tmp_path / "out"]
    watch.stop_at = SCORED[3]
    assert cli.main([*map(str, command), "--overwrite"]) == 130
    assert "Go on with: the same command, without --overwrite\n" in capsys.readouterr().err
    watch.forget()
    assert cli.main(list(map(str, command))) == 0
    assert watch.scored == SCORED[3:4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_stopped_sweep_that_overwrites_goes_on(
    own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch
) -> None:
    """What it is to replace stays until then."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    watch.stop_at = SCORED[-1]
    with pytest.raises(Interrupted):
        run(own_job, tmp_path, overwrite=True)
    assert (tmp_path / "out" / "kept").exists()
    watch.forget()
    found = resume(tmp_path / "out", progress=False)
    assert isinstance(found, Sweep)
    assert watch.scored == SCORED[-1:]
    assert_same(found, tmp_path, whole)


def test_a_damaged_record_is_refused(own_job: Job, stopped: Path) -> None:
    record = stopped / ".out.perta-partial" / ".perta-sweep" / "begun.json"
    content = read_record(record)
    request, damaged = content["request"], "is damaged"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": "0"}, "begun by perta_fast 0, this is"),
        ({"format": "x"}, "is not the record of a sweep"),
        ({"format_version": 1}, rf"{damaged} \(format_version\)"),
        ({"rows": [1]}, rf"{damaged} \(rows\[0\] is 1"),
        (
            {"request": {**request, "save_tuned": "/tmp/\0"}},
            f"{damaged} .*holds a character that no file name can have",
        ),
        ({"plans": {"settings": {"batch_size": 0, "overlap": True, "most": 1}}}, rf"{damaged} \(batch_size is 0"),
        ({"request": {**request, "importance": [""]}}, rf"{damaged} \(a path is empty"),
    ]
    whole = record.read_bytes()
    for changes, words in cases:
        write_record(record, content | changes)
        for again in AGAIN.values():
            with pytest.raises(InputError, match=rf"begun\.json: .*{words}.* start over with overwrite"):
                again(own_job, stopped)
    record.write_bytes(whole[:-20])
    before = fingerprint(stopped)
    for again in AGAIN.values():
        with pytest.raises(InputError, match=r"begun\.json: is damaged: .*; start over with overwrite"):
            again(own_job, stopped)
    assert fingerprint(stopped) == before


def test_work_that_another_process_goes_on_with_meanwhile(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its record and the lock: one has scored a setting, another has finished."""
    hidden = stopped / ".out.perta-partial"
    record, vectors = hidden / ".perta-sweep" / "begun.json", sweeping_run.Vectors

    def score() -> None:
        content = read_record(record)
        write_record(record, content | {"rows": content["rows"][:-1]})

    def finish() -> None:
        hidden.rename(stopped / "out")

    def after(meanwhile: Callable[[], None], *given: Any) -> Any:
        meanwhile()
        return vectors(*given)

    for meanwhile in (score, finish):
        with monkeypatch.context() as patched:
            patched.setattr(sweeping_run, "Vectors", partial(after, meanwhile))
            with pytest.raises(RunError, match="out: another run has gone on with this sweep meanwhile"):
                resume(stopped / "out", progress=False)
        assert record.exists() == (meanwhile is score)
    assert [path.name for path in stopped.iterdir()] == ["out"]


def test_a_place_where_another_run_was_stopped(own_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_inputs", stop)
        apply(*own_job.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    before = fingerprint(tmp_path)
    for place in ({"out": tmp_path / "out"}, {"out": tmp_path / "new", "checkpoint": tmp_path / "out"}):
        with pytest.raises(InputError, match="another run to this place was stopped; finish it with"):
            run(own_job, tmp_path, **place)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "full"), r"the disk is full.*finish it with: perta resume"),
        (MemoryError(), "out of memory; what was scored is kept"),
    ],
)
def test_a_run_that_fails_keeps_what_was_scored(
    error: Exception, expected: str, own_job: Job, whole: tuple[Sweep, Path], tmp_path: Path, watch: Watch
) -> None:
    watch.stop_at, watch.error = SCORED[-1], error
    with pytest.raises(PertaError, match=expected):
        run(own_job, tmp_path)
    watch.forget()
    assert_same(run(own_job, tmp_path), tmp_path, whole)
    assert watch.scored == SCORED[-1:]


def test_a_record_cannot_make_resume_replace_what_no_run_wrote(
    own_job: Job, whole: tuple[Sweep, Path], stopped: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The record of a sweep that overwrites names directories, and others may have written it."""
    path = stopped / ".out.perta-partial" / ".perta-sweep" / "begun.json"
    record, mine = read_record(path), tmp_path_factory.mktemp("mine")
    (mine / "text").write_text("mine")
    inputs = own_job.model.parent
    (inputs / "forget").mkdir()  # as if importances had been kept there
    before = fingerprint(mine), fingerprint(inputs)
    for name, place, message in (
        ("out", mine, r"the sweep to finish is one to .*mine"),
        *((name, mine, "mine.*: holds what no run has written") for name in ("checkpoint", "save_tuned")),
        ("save_importance", mine, "mine.*: holds what no run has written"),
        *((name, stopped, "must lie apart, neither within the other") for name in ("checkpoint", "save_importance")),
        ("save_importance", inputs, "is or contains the input"),
        ("save_tuned", f"{mine.parent}//{mine.name}", "mine.*: holds what no run has written"),
    ):
        write_record(path, {**record, "request": {**record["request"], name: str(place), "overwrite": True}})
        with pytest.raises(PertaError, match=message):
            resume(stopped / "out", progress=False)
        assert (fingerprint(mine), fingerprint(inputs)) == before
    (inputs / "forget").rmdir()
    write_record(path, record)
    assert_same(resume(stopped / "out", progress=False), stopped, whole)  # type: ignore[arg-type]
