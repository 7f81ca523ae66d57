"""What the benchmarks stand on: a command in its own process, and results as the program writes them."""

import sys
from pathlib import Path

import pytest
import torch

from bench import record
from bench.harness import contest
from bench.harness.conditions import processor
from bench.harness.contest import ROOT, Contender, Sample, Unavailable, alternate, another_build, run_child
from bench.inputs import arrays, stream_models


def test_a_command_in_a_process_of_its_own() -> None:
    sample = run_child([sys.executable, "-c", "print('heard by nobody')"])
    assert sample.seen["peak_rss"] > 0
    with pytest.raises(RuntimeError, match=r"exit status 3 .*\n.*what went wrong"):
        run_child([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])


def test_a_command_finds_packages_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_child([sys.executable, "-c", "import bench.harness, carried"])
    program = tmp_path / "other" / "perta_fast" / "__init__.py"
    program.parent.mkdir(parents=True)
    program.touch()
    run_child([sys.executable, "-c", "import carried"], variables=another_build(tmp_path / "other"))
    monkeypatch.delenv("PYTHONPATH")
    run_child([sys.executable, "-c", f"import os; assert os.environ['PYTHONPATH'] == {str(ROOT)!r}"])


class Clock:
    """Stands for the module time; it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time = self.monotonic = self.perf_counter = lambda: self.now

    def contender(self, seconds: float) -> Contender:
        def run() -> Sample:
            self.now += seconds
            return Sample(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the modules that measure."""
    clock = Clock()
    monkeypatch.setattr(contest, "time", clock)
    monkeypatch.setattr(arrays, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 4), (50, 4), (49, 3), (20, 1), (19, 0), (3, 0)])
def test_no_round_begins_that_would_end_late(
    seconds: int | None, rounds: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes ten seconds, as the warm-up does. What was measured is not lost."""
    if seconds is not None:
        monkeypatch.setenv("PERTA_BENCH_DEADLINE", str(clock.now + seconds))
    contenders = {"slow": clock.contender(8), "fast": clock.contender(2)}
    outcomes = alternate(contenders, 4)
    for name, took in (("slow", 8), ("fast", 2)):
        outcome = outcomes[name]
        if rounds:
            assert outcome == [Sample(took)] * rounds
        else:
            assert isinstance(outcome, Unavailable) and "no time" in str(outcome)
    assert clock.now == 1000 + (8 if seconds == 3 else 10 * (rounds + 1))


def test_times_are_printed_as_they_come(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []

    def listening() -> Sample:
        shown.append(capsys.readouterr().out)
        return Sample(0.25)

    alternate({"a": clock.contender(3), "b": listening}, 2)
    assert shown == ["a, warm-up: 3 s\n", "b, warm-up: 250 ms\na, round 1: 3 s\n", "b, round 1: 250 ms\n"]


@pytest.mark.parametrize(("seconds", "calls"), [(5.0, 1), (0.2, 1), (0.15, 2), (0.0625, 4), (0.001, 10), (0.0, 10)])
def test_work_that_takes_long_is_called_less_often(
    seconds: float, calls: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []

    def work() -> None:
        clock.now += seconds if called else 60  # the first call builds
        called.append(clock.now)

    measure = arrays.timed(work, "cuda")
    for expected in (2, calls, calls):
        before = len(called)
        assert measure().seconds == pytest.approx(seconds)
        assert len(called) - before == expected
    on_cpu = arrays.timed(work, "cpu")
    before = len(called)
    on_cpu()
    assert len(called) == before + 1


def test_a_backend_that_was_not_built_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "available_backends", lambda device: ("reference",))
    outcomes = arrays.contest("cpu", 1, moved=8, eager=list, compiled=list, ours=lambda backend: 1 / 0)
    assert str(outcomes["ours, cpp"]) == "no backend cpp here"
    assert isinstance(outcomes["torch, eager"], list)


def test_a_gpu_draws_weights_if_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def normal(seed: int, shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
        drawn.add(device)
        return torch.zeros(shape)

    monkeypatch.setattr(stream_models, "normal", normal)
    for device in ("cpu", "cuda"):
        drawn.clear()
        stream_models.write_stream_job(tmp_path / device, 64, 1, 1, 4, drawn_on=device)
        assert drawn == {device}


def test_another_build_is_run_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match="perta_fast"):
        another_build(tmp_path)  # there is none
    program = tmp_path / "perta_fast" / "__main__.py"
    program.parent.mkdir()
    program.with_name("__init__.py").touch()
    program.write_text("raise SystemExit('the other one')\n")
    with pytest.raises(RuntimeError, match="the other one"):
        run_child([sys.executable, "-m", "perta_fast"], variables=another_build(tmp_path))


def test_the_widest_instructions_are_named(tmp_path: Path) -> None:
    """Two processors of one model name may differ in them."""
    table = tmp_path / "cpuinfo"
    for flags, name in (("avx2 avx512f avx512_bf16", " with AVX-512 BF16"), ("fpu avx2", " with AVX2"), ("fpu", "")):
        table.write_text(f"processor\t: 0\nmodel name\t: A 1\nflags\t\t: {flags}\n\nmodel name\t: A 1\n")
        assert processor(table) == f"A 1{name}"


def test_the_results_are_what_the_program_writes() -> None:
    assert record.RESULTS.read_text(encoding="utf-8") == record.render(record.load())
