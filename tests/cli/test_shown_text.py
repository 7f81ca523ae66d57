"""What a command shows: text from files is escaped, and no state of its output or of the keyboard shows a traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perta_fast import cli
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply
from tests.support.checkpoints import read_checkpoint, write_checkpoint, write_importance
from tests.support.children import perta
from tests.support.inputs import write_inputs
from tests.support.models import Job, write_lines
from tests.support.patience import HUNG

pytestmark = pytest.mark.usefixtures("one_thread")

HARM = "\x1b[2J\x1b]0;t\x07\r\x9b1m\u202e\u2066\b\x7f"
NAME = f"model.layers.0{HARM}\nNothing wrong was found."


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Whatever a test's commands show; nothing of it may be harmful, or begin a line with text from a file."""
    words: list[str] = []
    yield words
    captured = capfd.readouterr()
    text = captured.out + captured.err
    # transformers draws bars, each of which begins with a carriage return
    assert [letter for letter in text.replace("\r", "") if not letter.isprintable() and letter not in "\n\t"] == []
    assert "\nNothing wrong was found.\n" not in captured.err
    for word in words:
        assert word in text


def run(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with a harmful name, below which there are a model and what belongs to it, with harmful names."""
    folder = tmp_path / f"odd{HARM}'$(id)"
    tensors = {NAME: torch.ones(3, 4), "other": torch.zeros(2)}
    for role in ("model", "base", "tuned"):
        write_checkpoint(folder / role, {name: t * (2 if role == "tuned" else 1) for name, t in tensors.items()}, 2)
    for role in ("forget", "retain"):
        write_importance(folder / role, {name: t.abs() for name, t in tensors.items()}, note=NAME, one_by_one=NAME)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return [f"--{role}={folder / role}" for role in ("model", "base", "tuned")]


def importances(folder: Path) -> list[str]:
    return [f"--{role}-importance={folder / role}" for role in ("forget", "retain")]


def test_names_of_tensors_and_paths(odd: Path, shown: list[str]) -> None:
    out = odd / "out"
    assert run("-v", "apply", *checkpoints(odd), *importances(odd), "--rule", "grad", "--lam", 1, "--out", out) == 0
    assert run("inspect", out, "--tensors") == 0
    assert run("inspect", odd / "forget", "--tensors") == 0
    assert run("verify", out) == 0
    shown += ["\\x1b[2J", "\\x9b1m\\u202e", "\\nNothing wrong was found.", "written to "]


def test_errors_that_name_tensors_and_paths(odd: Path, shown: list[str]) -> None:
    write_checkpoint(odd / "less", {"other": torch.zeros(2)})
    write_checkpoint(odd / "wrong", {NAME: torch.ones(3, 5), "other": torch.zeros(2)})
    how = ["--rule", "tv", "--lam", 1, "--out", odd / "out"]
    for role in ("less", "wrong", "nowhere"):
        assert run("apply", *checkpoints(odd)[:2], "--tuned", odd / role, *how) == 2
    for command in ("verify", "resume", "inspect"):
        assert run(command, odd / f"no{HARM}") == 2
    with pytest.raises(SystemExit):
        run(f"no{HARM}")
    with pytest.raises(SystemExit):
        run("inspect", odd, f"--{HARM}")
    shown += ["\\x1b[2J"]


def test_fields_of_a_report(odd: Path, shown: list[str]) -> None:
    out = odd / "out"
    apply(*(odd / role for role in ("model", "base", "tuned")), rule="tv", lam=1.0, out=out, progress=False)
    content = json.loads((out / "perta_report.json").read_text())
    content |= {"rule": f"tv{NAME}", "started": NAME, "warnings": [NAME], "counts": {NAME: 1}}
    content["inputs"]["base"]["path"], content["memory"] = NAME, {}
    content["data"] = {NAME: {"path": NAME, "blake3": NAME, "samples": 1, "truncated": 0}}
    content["phases"] = {NAME: {"seconds": 1.0, "bytes": 1, "gb_per_s": 1.0}}
    (out / "perta_report.json").write_text(json.dumps(content))
    assert run("inspect", out) == 0
    assert run("verify", out) == 1
    assert Report.load(out).summary().count("\n") == 3
    shown += ["\\x1b[2J"]


def test_recipes(tmp_path: Path, shown: list[str]) -> None:
    for number, line in enumerate((f'"{NAME.encode("unicode_escape").decode()}": 1', f"lam: {HARM!r}", "lam: 1\n\x1b")):
        path = tmp_path / f"{number}{HARM}.yaml"
        path.write_text(line.replace("\\x9b", "\\x9b"), encoding="utf-8")
        assert run("recipe", "check", path) == 2
        assert run("unlearn", "--recipe", path, "--out", tmp_path / "out") == 2
    shown += ["\\x1b[2J"]


def test_data_and_templates(job: Job, tmp_path: Path, shown: list[str]) -> None:
    shutil.copytree(job.base, tmp_path / "base")
    data = tmp_path / f"data{HARM}.jsonl"
    for row in ({HARM: "x"}, {"text": 3, "note": NAME}, {"question": NAME}, {"messages": [{"role": NAME}]}):
        write_lines(data, [row])
        assert run("importance", "--model", tmp_path / "base", "--data", data, "--out", tmp_path / "out") == 2
    template = '{{ raise_exception("' + NAME.encode("unicode_escape").decode() + '") }}'
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    write_lines(data, [{"question": "a", "answer": "b"}])
    assert run("importance", "--model", tmp_path / "base", "--data", data, "--out", tmp_path / "out") == 2
    shown += ["\\x1b[2J", "the chat template refuses these messages"]


def test_the_command_that_resumes_can_be_copied(odd: Path, shown: list[str]) -> None:
    asked = ["apply", *checkpoints(odd), "--rule", "tv", "--lam", "1", "--out", str(odd / "out")]
    stop = "from perta_fast.subtraction import to_directory\ndef stop(*_):\n    raise KeyboardInterrupt\n"
    stopped = perta(*asked, setup=stop + "to_directory.describe_output = stop\n")
    assert stopped.returncode == 130
    assert stopped.stderr.strip().isprintable()
    command = stopped.stderr.strip().partition("Finish the run with: ")[2]
    assert command.startswith("perta resume ")
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": programs}, check=True, timeout=HUNG)
    assert bool((read_checkpoint(odd / "out")[NAME] == 0).all())


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``command`` in bash, with perta as $PERTA; buffered, as where it is not a test."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}
    environment |= {"PERTA": f"{sys.executable} -m perta_fast"} | variables
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, errors="replace", timeout=HUNG
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    ("redirected", "told"),
    [(">&-", ""), ("2>&-", None), (">&- 2>&- <&-", None), (">/dev/full", "No space left"), ("2>/dev/full", None)],
)
def test_a_run_ends_well_wherever_its_output_goes(redirected: str, told: str | None, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    names = " ".join(f"--{role} {inputs[role]}" for role in ("model", "base", "tuned"))
    expected = tmp_path / "expected"
    apply(*inputs.checkpoints, rule="tv", lam=1.0, out=expected, progress=False)
    found = shell(f"$PERTA -v apply {names} --rule tv --lam 1 --out {tmp_path / 'out'} {redirected}")
    assert found.returncode == 0
    for path in expected.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr
    if told is not None:
        assert told in found.stderr
    assert shell(f"$PERTA apply {names} --rule tv --lam 1 --out {tmp_path / 'out'} {redirected}").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_result_that_could_not_be_printed_is_a_failure(job: Job, tmp_path: Path) -> None:
    for command in (f"inspect {job.model}", "recipe init"):
        found = shell(f"$PERTA {command} >/dev/full")
        assert found.returncode == 1
        assert found.stderr == "perta: standard output could not be written: No space left on device\n"
    assert shell(f"$PERTA inspect {job.model} >&-").returncode == 0


def test_head_takes_what_it_wants(job: Job) -> None:
    found = shell(f"$PERTA inspect --tensors {job.model} | head -1")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"{job.model}: checkpoint\n"


def test_a_terminal_that_knows_only_ascii(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "Höhe λ")
    names = " ".join(f"--{role} '{inputs[role]}'" for role in ("model", "base", "tuned"))
    out = tmp_path / "Höhe λ" / "out"
    found = shell(f"$PERTA -v apply {names} --rule tv --lam 1 --out '{out}'", **ASCII)
    assert (found.returncode, found.stderr.isascii()) == (0, True)
    assert "Traceback" not in found.stderr
    assert read_checkpoint(out).keys() == inputs.tensors["model"].keys()
    for command in (f"inspect '{out}'", f"verify '{out}'", "tune --help", "--help", "recipe init"):
        found = shell(f"$PERTA {command}", **ASCII)
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.isascii()
    found = shell(f"$PERTA inspect '{out}x'", **ASCII)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1


MODULES = ["argparse", "perta_fast.cli.main", "numpy", "perta_fast.subtraction.compute", "perta_fast.runs.apply"]
INTERRUPTED = "perta: interrupted; the inputs are untouched and no partial output is left. Run the same command again"


@pytest.mark.parametrize("program", ["console", "module"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGINT)", "raise KeyboardInterrupt"])
def test_ctrl_c_during_imports(how: str, name: str, program: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"class Stopping:\n    def find_spec(self, name, *_):\n        if name == {name!r}:\n            {how}\n"
        "sys.meta_path.insert(0, Stopping())\n"
    )
    inputs = write_inputs(tmp_path / "inputs")
    asked = ["apply", *(f"--{role}={inputs[role]}" for role in ("model", "base", "tuned")), "--rule=tv", "--lam=1"]
    asked.append(f"--out={tmp_path / 'out'}")
    start = (
        [str(Path(sys.executable).with_name("perta"))] if program == "console" else [sys.executable, "-m", "perta_fast"]
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([*start, *asked], env=environment, capture_output=True, text=True, timeout=HUNG)
    assert found.returncode == 128 + signal.SIGINT
    assert found.stderr.startswith(INTERRUPTED)
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
