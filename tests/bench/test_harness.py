"""What the benchmarks stand on: a command in its own process, and results as the program writes them."""

import re
import sys
from pathlib import Path

import pytest

from bench import record
from bench.harness.conditions import processor
from bench.harness.contest import ROOT, another_build, run_child


def test_a_command_in_a_process_of_its_own() -> None:
    sample = run_child([sys.executable, "-c", "print('heard by nobody')"])
    assert sample.seen["peak_rss"] > 0
    with pytest.raises(RuntimeError, match=r"exit status 3 .*\n.*what went wrong"):
        run_child([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])


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


def test_the_script_for_gpus_measures_benchmarks_that_are_there() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    names = re.findall(r"^measure (\w+)", script, re.MULTILINE)
    tests = re.findall(r"\btests/[\w/.]+", script)
    assert names and tests
    assert all((ROOT / "bench" / f"{name}.py").exists() for name in names)
    assert all((ROOT / path).exists() for path in tests)
