"""The script for GPUs and what it stands on, where there is none."""

import os
import re
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from bench.harness import gpu_tests
from bench.harness.contest import ROOT
from bench.harness.gpu_ready import absent, requirements
from tests.support.children import run_child

SCRIPT = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
STAGES = re.findall(r"^worth=\((.+)\)$", SCRIPT, re.MULTILINE)[0].split()
LIMITS = {name: int(seconds) for name, seconds in re.findall(r"\[([\w ]+)\]=(\d+)", SCRIPT)}
# Stands for python3: writes down what it is asked for, and fails to build if PERTA_CUDA is $UNBUILT.
PYTHON = """#!/bin/sh
echo "$PERTA_CUDA $*" >> "$ASKED"
case "$*" in *"pip install"*) test "$PERTA_CUDA" != "$UNBUILT" || exit 3 ;; esac
for word; do case "$word" in --benchmark-json=*) echo {} > "${word#*=}" ;; esac; done
"""


def run_script(folder: Path, *stages: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script with ``PYTHON``, and what that is asked for."""
    python = folder / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    asked = folder / "asked"
    asked.touch()
    path = f"{python.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "ASKED": str(asked)} | variables
    done = run_child([ROOT / "bench" / "gpu.sh", folder / "out", *stages], env=environment)
    return done, asked.read_text().splitlines()


def test_named_stages_alone_run(tmp_path: Path) -> None:
    done, asked = run_script(tmp_path, "eval", "tests")
    assert done.returncode == 0
    assert "bench/bench_eval.py" in asked[3] and "--bench-rounds 3" in asked[3]
    assert asked[4:] == ["1 -m bench.harness.gpu_tests", f"1 -m bench.record {tmp_path}/out/bench_eval.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bench_eval.json",
        "gpu.log",
        "RESULTS.md",
        "results.json",
    }


def test_all_stages_run_in_the_order_of_their_worth(tmp_path: Path) -> None:
    done, asked = run_script(tmp_path, PERTA_BENCH_SECONDS="3600")
    benchmarks = [name for name in STAGES if (ROOT / "bench" / f"bench_{name}.py").exists()]
    assert re.findall(r"bench/bench_(\w+)\.py", "".join(asked)) == benchmarks
    assert set(STAGES) - set(benchmarks) == {"tests", "sanitizer"}
    reported = done.stdout.partition("== summary")[2]
    assert [name for name in re.findall(r"^(\w+):", reported, re.MULTILINE) if name in STAGES] == STAGES
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done, asked = run_script(tmp_path, "test")
    assert (done.returncode, asked) == (2, [])
    assert "no stage test; there are tests " in done.stderr


@pytest.mark.parametrize(("unbuilt", "left"), [("1", True), ("0", True), ("", False)])
def test_without_cuda_where_that_does_not_build(unbuilt: str, left: bool, tmp_path: Path) -> None:
    done, asked = run_script(tmp_path, "tests", UNBUILT=unbuilt)
    built = [line[0] for line in asked if "pip install" in line]
    assert built == (["1", "0"] if unbuilt == "1" else ["1"])
    assert asked[-1] == f"{built[-1]} -m bench.harness.gpu_tests"
    assert ("without CUDA kernels" in done.stdout) == (unbuilt == "1")
    assert done.returncode == (unbuilt == "1")


def test_nothing_begins_without_time(tmp_path: Path) -> None:
    done, asked = run_script(tmp_path, PERTA_BENCH_SECONDS=str(LIMITS["record"] + 10))
    assert (done.returncode, asked) == (1, [])
    assert "conditions: not run, no time left" in done.stdout


def test_three_calls_have_time_for_all_stages() -> None:
    calls = [call.split() for call in re.findall(r"^#     bench/gpu\.sh FOLDER (.+)$", SCRIPT, re.MULTILINE)]
    assert [name for call in calls for name in call] == STAGES
    whole = int(re.findall(r"PERTA_BENCH_SECONDS:-(\d+)", SCRIPT)[0])
    assert whole <= 580
    for call in calls:
        assert sum(LIMITS[name] for name in ("conditions", "build", *call, "record")) <= whole


def test_the_tests_that_are_named_are_there() -> None:
    for path, name in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", SCRIPT):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_file_with_tests_for_a_gpu_is_named() -> None:
    """Those that need one, and no file that needs none but has its name."""
    marked = re.compile(r"skipif\(not torch\.cuda\.is_available\(\)|^@cuda$|^DEVICE = \"cuda\"", re.MULTILINE)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    found = [path for path in files if marked.search(path.read_text(encoding="utf-8"))]
    assert sorted(gpu_tests.FILES) == sorted(str(path.relative_to(ROOT)) for path in found)


def write_test(path: Path, body: str) -> str:
    path.write_text(f"import os, time\n\ndef test_cuda():\n    {body}\n\ndef test_another():\n    raise SystemExit\n")
    return str(path)


def test_a_process_that_dies_takes_no_other_tests_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bodies = {"aborts": "os.abort()", "holds": "pass", "fails": "assert 'this' == 'that'"}
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    files = {name: write_test(tmp_path / f"test_{name}.py", body) for name, body in bodies.items()}
    assert gpu_tests.main(list(files.values())) == 1
    shown = capsys.readouterr().out
    assert f"{files['aborts']}: FAILED with exit status -6" in shown
    assert f"{files['holds']}: passed" in shown
    assert f"{files['fails']}: FAILED with exit status 1" in shown and "'this' == 'that'" in shown


@pytest.mark.parametrize("name", ["nltk", "rouge_score"])
def test_tests_that_need_a_missing_package_are_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rouge-score imports nltk."""
    for module in [module for module in sys.modules if module.partition(".")[0] in ("nltk", "rouge_score")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    spec = spec_from_file_location("suites", ROOT / "tests" / "evaluation" / "test_suites.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(pytest.skip.Exception, match=name):
        spec.loader.exec_module(module_from_spec(spec))


def test_a_file_without_tests_here_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    file = tmp_path / "test_more.py"
    file.write_text("import pytest\n\npytest.importorskip('no_such_package')\n")
    assert gpu_tests.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{file}: skipped" in shown and "No module named 'no_such_package'" in shown


def test_tests_end_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERTA_BENCH_DEADLINE", "0")
    file = write_test(tmp_path / "test_holds.py", "pass")
    assert gpu_tests.main([file]) == 1
    monkeypatch.setenv("PERTA_BENCH_DEADLINE", str(time.time() + 1))
    assert gpu_tests.main([write_test(tmp_path / "test_hangs.py", "time.sleep(600)")]) == 1
    shown = capsys.readouterr().out
    assert "test_holds.py: not run, no time was left" in shown
    assert "test_hangs.py: stopped, no time was left" in shown


@pytest.mark.slow
def test_a_benchmark_says_that_it_had_no_time() -> None:
    options = ["-c", "bench/pytest.ini", "--bench-rounds", "2", "--bench-elements", "8", "-k", "memmove and bfloat16"]
    command = [sys.executable, "-m", "pytest", "bench/bench_accumulate.py", *options]
    done = run_child(command, cwd=ROOT, env=os.environ | {"PERTA_BENCH_DEADLINE": "0"})
    assert done.returncode == 124
    assert "\nrounds: at most 2, as far as the time went" in done.stdout


def test_what_is_missing_is_named() -> None:
    assert absent(["pytest>=1", "pytest>=1000", "no-such-package", "setuptools"]) == ["pytest>=1000", "no-such-package"]
    needed, optional = requirements()
    assert {"setuptools>=77", "blake3>=1"} <= set(needed)
    assert {"rouge-score>=0.1.2", "nltk"} <= set(optional)
    assert not absent([*needed, *optional])
