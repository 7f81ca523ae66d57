"""``--json``: standard output is one JSON object, the record that is on the disk where there is one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import cli, resuming
from perta_fast.cli.options import JSON
from perta_fast.records.report import Report
from perta_fast.runs import inspect
from tests.cli.test_parser import ALL
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

# Their result is a file or what they show; they have no record.
WITHOUT = {"demo", "report", "recipe", "recipe init", "recipe run", "completion", "help"}
# What lies on the disk beside or in the output, by the command that writes it.
ON_DISK = {
    "apply": "out/perta_report.json",
    "unlearn": "out/perta_report.json",
    "tune": "out/perta_tune.json",
    "merge": "out/perta_report.json",
    "precondition": "out/perta_precondition.json",
    "sweep": "out/sweep.json",
    "eval": "out.json",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with an output of ``perta apply``, importances, an adapter and a recipe, in directories beside it."""
    folder = tmp_path_factory.mktemp("home")
    job = write_job(folder, torch.float32)
    model, base, tuned = map(str, job.checkpoints)
    weights = ["--model", model, "--base", base, "--tuned", tuned]
    assert cli.main(["apply", *weights, "--rule=tv", "--lam=1", "--out", str(folder / "applied"), "--quiet"]) == 0
    for role, data in (("forget", job.forget), ("retain", job.retain)):
        asked = ["--model", base, "--data", str(data), "--out", str(folder / f"i-{role}")]
        assert cli.main(["importance", *asked, "--quiet"]) == 0
    tuning = ["--base", base, "--forget", str(job.forget), "--out", str(folder / "adapter"), "--epochs=1"]
    assert cli.main(["tune", *tuning, "--quiet"]) == 0
    lines = [f"{option[2:]}: {value}" for option, value in zip(weights[::2], weights[1::2], strict=True)]
    (folder / "run.yaml").write_text("\n".join([*lines, "rule: tv", "lam: 1", "out: x"]))
    return job


def arguments(case: str, job: Job, out: Path) -> list[str]:
    """A command line of each command, with ``out`` for its output."""
    home = job.model.parent
    weights = ["--model", job.model, "--base", job.base, "--tuned", job.tuned]
    data = ["--forget", job.forget, "--retain", job.retain]
    importances = ["--forget-importance", home / "i-forget", "--retain-importance", home / "i-retain"]
    streamed = ["--stream", "--dry-run"]
    rows = ["--model", job.base, "--data", job.forget]
    cases: dict[str, list[object]] = {
        "apply": [*weights, "--rule=tv", "--lam=1", "--out", out],
        "unlearn": [*weights, *data, "--rule=grad", "--lam=1", "--out", out],
        "unlearn --dry-run": [*weights, *data, "--rule=grad", "--lam=1", "--out", out, *streamed],
        "tune": ["--base", job.base, "--forget", job.forget, "--out", out, "--epochs=1"],
        "merge": ["--base", job.base, "--tuned", home / "adapter", "--out", out],
        "importance": [*rows, "--out", out],
        "importance --merge": ["--merge", home / "i-forget", home / "i-retain", "--out", out],
        "importance --dry-run": [*rows, "--out", out, *streamed],
        "precondition": ["--base", job.base, "--tuned", job.tuned, *data[2:], "--out", out],
        "precondition --dry-run": ["--base", job.base, "--tuned", job.tuned, *data[2:], "--out", out, *streamed],
        "ratio": [*importances, "--out", out],
        "sweep": [*weights, *data, "--rule=tv", "--lams=1", "--out", out],
        "sweep --dry-run": [*weights, *data, "--rule=tv", "--lams=1", "--out", out, *streamed],
        "eval": ["--model", job.model, *data, "--metrics=*loss*", "--out", f"{out}.json"],
        "eval --dry-run": ["--model", job.model, *data, "--metrics=*loss*", *streamed],
        "inspect": [home / "applied", "--tensors", "--base", job.base],
        "verify": [home / "applied"],
        "recipe check": [home / "run.yaml"],
    }
    return [*case.split(" --")[0].split(), *map(str, cases[case]), "--json"]


CASES = (
    *("apply", "unlearn", "unlearn --dry-run", "tune", "merge", "importance", "importance --merge"),
    *("importance --dry-run", "precondition", "precondition --dry-run", "ratio", "sweep", "sweep --dry-run"),
    *("eval", "eval --dry-run", "inspect", "verify", "recipe check"),
)


def only_json(text: str) -> Any:
    """The one object in ``text``, which is strict JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("case", CASES)
def test_standard_output_is_the_record(
    case: str, home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(case, home, tmp_path / "out")) == 0
    record = only_json(capsys.readouterr().out)
    assert isinstance(record, dict) and record
    if case in ON_DISK:
        assert record == json.loads((tmp_path / ON_DISK[case]).read_text())
    if case.endswith("--dry-run"):
        assert all(walk["host"] and walk["seconds"] > 0 for walk in record["walks"])
        assert record["walks"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["apply", "verify", "inspect"])
def test_quiet_is_for_bars_and_not_for_the_record(
    case: str, home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--quiet"] if "quiet" in {option.name for option in ALL[case].options} else []
    assert cli.main([*arguments(case, home, tmp_path / "out"), *more]) == 0
    assert only_json(capsys.readouterr().out)


def test_every_command_that_reports_has_it() -> None:
    with_it = {name for name, command in ALL.items() if JSON in command.options}
    assert with_it == ALL.keys() - WITHOUT
    assert {name for name in ALL if name in {case.split(" --")[0] for case in CASES}} | {"resume"} == with_it
    assert {case.split(" --")[0] for case in CASES if case.endswith("--dry-run")} == {
        name for name, command in ALL.items() if any(option.name == "dry_run" for option in command.options)
    }


def test_what_a_resumed_run_reports(
    home: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home.model.parent / "applied"
    monkeypatch.setattr(resuming, "resume", lambda *_, **__: Report.load(path))
    assert cli.main(["resume", str(path), "--json"]) == 0
    assert only_json(capsys.readouterr().out) == json.loads((path / "perta_report.json").read_text())


def test_verify_says_what_is_wrong_and_exits_with_1(
    home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments("apply", home, tmp_path / "out"), "--quiet"]) == 0
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path / "out"), "--json"]) == 1
    (problem,) = only_json(capsys.readouterr().out)["problems"]
    assert problem.startswith(f"{path} has changed since the run")


@pytest.mark.parametrize("case", ["apply", "unlearn --dry-run", "inspect"])
def test_an_error_leaves_standard_output_empty(
    case: str, home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        word.replace(str(home.model.parent), str(tmp_path / "nowhere")) for word in arguments(case, home, tmp_path)
    ]
    assert cli.main(wrong) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("perta: error: ")


def inspected(record: dict[str, Any]) -> Callable[..., inspect.Inspection]:
    def found(*_: object, **__: object) -> inspect.Inspection:
        print("a library says something")
        return inspect.Inspection(record)

    return found


def test_what_is_not_finite_is_null_and_what_others_print_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect, "inspect", inspected({"a": [math.nan, 1.5], "b": {"c": math.inf}}))
    assert cli.main(["inspect", ".", "--json"]) == 0
    captured = capsys.readouterr()
    assert only_json(captured.out) == {"a": [None, 1.5], "b": {"c": None}}
    assert captured.err == "a library says something\n"


def test_rows_are_shown_to_a_person_only(home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments("importance", home, tmp_path / "out"), "--show-labels=1"]) == 2
    assert "leave out --json" in capsys.readouterr().err


def test_a_quiet_sweep_says_nothing(home: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments("sweep", home, tmp_path / "out")[:-1], "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "sweep.json").exists()
