"""Recipes of whole jobs: checked before anything runs, run in order, stopped and taken up, never replaced unasked."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from perta_fast import cli
from perta_fast.cli.command import Command, Option
from perta_fast.cli.recipe_options import options_of, with_shared
from perta_fast.cli.recipe_sections import COMMANDS, sections_of
from perta_fast.errors import RunError
from perta_fast.records.recipe import LISTS, SECTIONS, Setting, read_recipe
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.scoring.setting import ScoredSetting
from tests.support.checkpoints import fingerprint
from tests.support.models import Job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = "model: model\nbase: base\ntuned: tuned\nforget: forget.jsonl\nretain: retain.jsonl\nquiet: true\n"
SWEEP = "sweep:\n  rule: tv\n  lams: 0.5,1\n  out: settings\n"
UNLEARN = "unlearn:\n  rule: tv\n  lam: 0.5\n  out: unlearned\n"
EVAL = "eval:\n  model: unlearned\n  max-new-tokens: 1\n  metrics: '*_loss'\n  out: scores.json\n"
REPORT = "report:\n  run: unlearned\n  sweep: [settings]\n  eval:\n    - scores.json\n  out: page.html\n"
JOB = SHARED + SWEEP + UNLEARN + EVAL + REPORT
RESULTS = ("settings", "unlearned", "scores.json", "page.html")
RECORD = ".run.yaml.perta-recipe"


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[Callable[..., None]]:
    """Plots are not drawn, which takes half of a job's time; gives what draws them."""
    savefig = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, file, **settings: file.write(b"a plot"))
        patch.setattr(Figure, "draw_without_rendering", lambda _: None)
        yield savefig


def run(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command says, without its start."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err[:14], err.count("\n")) == ("", "perta: error: ", 1)
    return err[14:-1]


@pytest.fixture
def home(job: Job, tmp_path: Path) -> Path:
    """A folder with inputs of its own, and the recipe ``run.yaml``."""
    for role in ("model", "base", "tuned"):
        shutil.copytree(getattr(job, role), tmp_path / role)
    for role in ("forget", "retain"):
        shutil.copy(getattr(job, role), tmp_path / f"{role}.jsonl")
    (tmp_path / "run.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture(scope="module")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, after a run."""
    folder = tmp_path_factory.mktemp("finished")
    for role in ("model", "base", "tuned"):
        shutil.copytree(getattr(job, role), folder / role)
    for role in ("forget", "retain"):
        shutil.copy(getattr(job, role), folder / f"{role}.jsonl")
    (folder / "run.yaml").write_text(JOB)
    assert run("recipe", "run", folder / "run.yaml") == 0
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "done", copy_function=shutil.copy2))


def change(home: Path, before: str, after: str) -> Path:
    path = home / "run.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    return path


def stop_at(call: str, monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> None:
    """Run the recipe ``path`` until ``call`` is made, which is interrupted."""
    with monkeypatch.context() as patched:
        patched.setattr(call, stop)
        assert run("recipe", "run", path, *more) == 130


def ways(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the lines of progress say of each section."""
    lines = re.findall(r"^step \d of \d, ([\w ]+): \S+ (.+)$", capsys.readouterr().out, re.MULTILINE)
    return dict(lines)


def test_a_whole_job(
    home: Path, undrawn: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What tune makes is read by the others; each makes what the command of its name does."""
    monkeypatch.setattr(Figure, "savefig", undrawn)
    shutil.rmtree(home / "tuned")
    tune = "tune:\n  epochs: 1\n  rank: 2\n  out: tuned\n"
    path = change(home, SWEEP, tune + SWEEP.replace("  rule: tv\n", ""))
    change(home, UNLEARN, UNLEARN.replace("  rule: tv\n", "  check: false\n"))
    assert run("recipe", "check", path) == 0
    assert capsys.readouterr().out == f"{path}: a whole job: tune, sweep, unlearn, eval, report\n"
    assert not (home / "tuned").exists()
    assert run("recipe", "run", path) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("step")] == [
        f"step {number} of 5, {name}: {home / result} is made"
        for number, (name, result) in enumerate(
            zip(SECTIONS, ("tuned", "settings", "unlearned", "scores.json", "page.html"), strict=True), 1
        )
    ]
    report = json.loads((home / "unlearned" / "perta_report.json").read_text())
    assert (report["recipe"]["tuned"], report["recipe"]["rule"]) == (str(home / "tuned"), "preconditioned")
    assert json.loads((home / "scores.json").read_text())["model"] == str(home / "unlearned")
    arguments = [f"--{role}={home / role}" for role in ("model", "base", "tuned")]
    arguments += [f"--{role}={home / role}.jsonl" for role in ("forget", "retain")]
    assert run("unlearn", *arguments, "--lam", "0.5", "--no-check", "--out", home / "again", "--quiet") == 0
    for file in (home / "again").glob("*.safetensors"):
        assert file.read_bytes() == (home / "unlearned" / file.name).read_bytes()


def test_what_is_done_is_left_as_it_is(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(done)
    capsys.readouterr()
    assert run("recipe", "run", done / "run.yaml") == 0
    assert ways(capsys) == dict.fromkeys(("sweep", "unlearn", "eval", "report"), "is done already")
    assert run("recipe", "run", done / "run.yaml", "--overwrite", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert fingerprint(done) == before


def test_what_is_missing_is_made(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other files of its section are replaced only if asked."""
    (done / "page.html").unlink()
    assert run("recipe", "run", done / "run.yaml") == 0
    assert ways(capsys)["report"] == "is made"
    assert (done / "page.html").exists()
    path = change(done, "  out: page.html", "  png: plots\n  out: page.html")
    assert run("recipe", "run", path, "--overwrite") == 0
    (done / "page.html").unlink()
    assert run("recipe", "run", path) == 2
    assert run("recipe", "run", path, "--overwrite") == 0


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


STOPS = {
    "sweep": ("perta_fast.sweeping.run.draw", "was begun, and goes on"),
    "unlearn": ("perta_fast.subtraction.to_directory.describe_output", "was begun, and goes on"),
    "eval": ("perta_fast.evaluation.in_memory._codes", "is made"),  # before a pass is finished
    "report": ("perta_fast.reporting.run.compose", "is made"),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_job_goes_on(
    name: str, home: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, how = STOPS[name]
    stop_at(call, monkeypatch, home / "run.yaml")
    capsys.readouterr()
    assert run("recipe", "run", home / "run.yaml") == 0
    said = ways(capsys)
    assert said[name] == how
    assert [way for section, way in said.items() if list(said).index(section) < list(said).index(name)] == [
        "is done already"
    ] * list(said).index(name)
    for file in (finished / "unlearned").glob("*.safetensors"):
        assert file.read_bytes() == (home / "unlearned" / file.name).read_bytes()
    hidden = {path.name for path in home.iterdir() if path.name.startswith(".")}
    assert hidden == {RECORD}


def test_a_section_that_ended_just_before_a_kill_is_done(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at("perta_fast.cli.recipe_run.state_of_result", monkeypatch, home / "run.yaml")
    before = fingerprint(home / "settings")
    capsys.readouterr()
    assert run("recipe", "run", home / "run.yaml") == 0
    assert ways(capsys) == {"sweep": "is done already"} | dict.fromkeys(("unlearn", "eval", "report"), "is made")
    assert fingerprint(home / "settings") == before


def test_the_status_and_the_name_of_a_section_that_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("no room")

    monkeypatch.setattr("perta_fast.runs.unlearn._run", fail)
    assert run("recipe", "run", home / "run.yaml") == 1
    assert capsys.readouterr().err.endswith(f"perta: error: {home / 'run.yaml'}, unlearn: no room\n")
    assert not (home / "scores.json").exists()


def another_setting(home: Path) -> None:
    change(home, "lam: 0.5", "lam: 0.25")


def another_row(home: Path) -> None:
    write_lines(home / "retain.jsonl", [{"text": "Another text."}])


def a_changed_result(home: Path) -> None:
    (home / "scores.json").write_text("{}")


def not_of_this_recipe(home: Path) -> None:
    (home / RECORD).unlink()


CHANGES: dict[Callable[[Path], None], tuple[str, list[str]]] = {
    another_setting: ("unlearn: unlearned: was made with another value of lam", ["unlearn", "eval", "report"]),
    another_row: ("sweep: settings: was made before retain changed", ["sweep", "eval", "report"]),
    a_changed_result: ("eval: scores.json: is no longer what this recipe has made", ["eval", "report"]),
    not_of_this_recipe: (
        "sweep: settings: is there, and not made by this recipe",
        ["sweep", "unlearn", "eval", "report"],
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_was_made_in_another_way_is_replaced_only_if_asked(
    changed: Callable[[Path], None], done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, again = CHANGES[changed]
    monkeypatch.chdir(done)
    changed(done)
    before = fingerprint(done)
    assert refusal(capsys, "recipe", "run", "run.yaml") == (
        f"run.yaml, {expected}; choose another out, or replace it with --overwrite"
    )
    assert fingerprint(done) == before
    assert run("recipe", "run", "run.yaml", "--overwrite") == 0
    said = ways(capsys)
    assert [name for name, way in said.items() if way == "is made again"] == (
        again if changed is not another_row else ["sweep", "unlearn", "eval", "report"]
    )
    assert run("recipe", "run", "run.yaml") == 0
    assert set(ways(capsys).values()) == {"is done already"}


def test_replacing_that_was_stopped_goes_on_without_being_asked_again(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    another_setting(done)
    stop_at("perta_fast.runs.unlearn._run", monkeypatch, done / "run.yaml", "--overwrite")
    capsys.readouterr()
    assert run("recipe", "run", done / "run.yaml", "--overwrite") == 0
    assert ways(capsys) == {"sweep": "is done already"} | dict.fromkeys(("unlearn", "eval", "report"), "is made again")


SWEEPS = {
    "sweep": ("  max-retain-rise: 99\n  in-place: true\n  out: settings\n", "settings"),
    "unlearn": ("  choose: max-retain-rise=99\n  out: unlearned\n", "unlearned"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_was_stopped_changed_and_stopped_again_goes_on(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it starts over with other strengths, it goes on without being asked again."""
    text, result = SWEEPS[name]
    path = home / "run.yaml"
    path.write_text(f"{SHARED}{name}:\n  rule: tv\n  lams: 50,100\n{text}")
    score = ScoredModel.score

    def stopping(model: ScoredModel, what: str) -> ScoredSetting:
        return stop() if what.endswith("lambda 100") else score(model, what)  # type: ignore[return-value]

    with monkeypatch.context() as patched:
        patched.setattr(ScoredModel, "score", stopping)
        assert run("recipe", "run", path) == 130
        change(home, "lams: 50,100", "lams: 25,100")
        capsys.readouterr()
        assert "was made with another value of lams; choose another out" in refusal(capsys, "recipe", "run", path)
        assert run("recipe", "run", path, "--overwrite") == 130
    monkeypatch.setattr(ScoredModel, "score", lambda model, what: score(model, what) if "25" not in what else stop())
    capsys.readouterr()
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {name: "was begun, and goes on"}
    assert (home / result).is_dir() and not list(home.rglob(".*partial"))
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {name: "is done already"}


def test_a_run_in_place_is_done_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SHARED + SWEEP + UNLEARN.replace("out: unlearned", "in-place: true") + EVAL.replace("unlearned", "model")
    (home / "run.yaml").write_text(text)
    assert run("recipe", "run", home / "run.yaml") == 0
    before = fingerprint(home)
    capsys.readouterr()
    assert run("recipe", "run", home / "run.yaml") == 0
    assert set(ways(capsys).values()) == {"is done already"}
    assert fingerprint(home) == before
    change(home, "lam: 0.5", "lam: 0.25")
    assert "model: was made with another value of lam" in refusal(capsys, "recipe", "run", home / "run.yaml")


IN_PLACE = SHARED + UNLEARN.replace("out: unlearned", "in-place: true")


@pytest.mark.parametrize("changed", [another_setting, another_row], ids=lambda change: change.__name__)
def test_a_model_is_never_changed_twice(
    changed: Callable[[Path], None], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even with --overwrite; with a copy of the old model in its place the job runs again."""
    path, kept = home / "run.yaml", home / "kept"
    shutil.copytree(home / "model", kept, copy_function=shutil.copy2)
    path.write_text(IN_PLACE)
    assert run("recipe", "run", path) == 0
    changed(home)
    before = fingerprint(home)
    capsys.readouterr()
    said = refusal(capsys, "recipe", "run", path, "--overwrite")
    assert said.endswith("; it would be changed a second time: put a copy of the model as it was in its place")
    assert fingerprint(home) == before
    shutil.rmtree(home / "model")
    kept.rename(home / "model")
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"unlearn": "is made"}


def test_a_model_half_changed_by_other_settings_is_finished_first(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "run.yaml"
    path.write_text(IN_PLACE)
    stop_at("perta_fast.subtraction.in_place._finish", monkeypatch, path)
    another_setting(home)
    capsys.readouterr()
    said = refusal(capsys, "recipe", "run", path, "--overwrite")
    assert f"a second time: finish that with: perta resume {home / 'model'}, or put a copy" in said
    assert run("resume", home / "model") == 0


def test_a_run_in_place_that_was_stopped_half_way_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "run.yaml"
    path.write_text(SHARED + SWEEP + IN_PLACE[len(SHARED) :] + EVAL.replace("unlearned", "model"))
    stop_at("perta_fast.subtraction.in_place._finish", monkeypatch, path)
    capsys.readouterr()
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"sweep": "is done already", "unlearn": "was begun, and goes on", "eval": "is made"}
    assert run("recipe", "run", path) == 0
    assert set(ways(capsys).values()) == {"is done already"}


def test_a_run_in_place_that_was_stopped_in_its_check_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "run.yaml"
    path.write_text(IN_PLACE)
    stop_at("perta_fast.runs.check_result._measure_result", monkeypatch, path)
    weights = {file: file.read_bytes() for file in (home / "model").glob("*.safetensors")}
    capsys.readouterr()
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"unlearn": "was begun, and goes on"}
    assert {file: file.read_bytes() for file in weights} == weights
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"unlearn": "is done already"}


def test_a_job_changes_a_model_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "run.yaml"
    path.write_text(IN_PLACE + IN_PLACE[len(SHARED) :].replace("unlearn:", "unlearn more:"))
    said = f"{path}, unlearn more: {home / 'model'} is what unlearn makes; a job changes a model once"
    assert refusal(capsys, "recipe", "check", path) == said


def test_a_run_in_place_that_was_killed_before_it_changed_anything_begins_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "run.yaml"
    path.write_text(IN_PLACE)
    (home / "model" / ".perta-journal").mkdir()
    (home / "model" / ".perta-journal" / "begun").touch()
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"unlearn": "is made"}
    assert not (home / "model" / ".perta-journal").exists()


def test_a_sweep_without_a_choice_is_not_done(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "run.yaml"
    path.write_text(
        SHARED + SWEEP.replace("0.5,1", "9999").replace("  out", "  max-retain-rise: 1e-9\n  in-place: true\n  out")
    )
    assert run("recipe", "run", path) == 1
    assert "not changed: nothing that was tried keeps the bound; nearest to it is" in capsys.readouterr().err
    said = f"{path}, sweep: {home / 'settings'}: is there, and has no setting that could be taken; choose another out"
    assert refusal(capsys, "recipe", "run", path).startswith(said)
    assert run("recipe", "run", path, "--overwrite") == 1


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_what_another_command_has_put_there_meanwhile(
    stopped: bool, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run by hand after the job was stopped, with another strength, is not taken for the job's own."""
    path = home / "run.yaml"
    path.write_text(SHARED + UNLEARN)
    stop_at("perta_fast.runs.unlearn._run", monkeypatch, path)
    arguments = [f"--{role}={home / role}" for role in ("model", "base", "tuned")]
    arguments += [f"--{role}={home / role}.jsonl" for role in ("forget", "retain")]
    with monkeypatch.context() as patched:
        if stopped:
            patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        status = run("unlearn", *arguments, "--rule", "tv", "--lam", "5", "--out", home / "unlearned", "--quiet")
        assert status == (130 if stopped else 0)
    capsys.readouterr()
    if stopped:
        assert run("recipe", "run", path) == 2
        assert capsys.readouterr().err.endswith("unlearned: was begun by another command with another value of lam\n")
    said = f"{home / 'unlearned'}: is there, made by another command with another value of lam; choose another out"
    assert said in refusal(capsys, "recipe", "run", path)
    assert run("recipe", "run", path, "--overwrite") == 0
    assert json.loads((home / "unlearned" / "perta_report.json").read_text())["recipe"]["lam"] == 0.5


def test_what_cannot_go_on_is_made_again_if_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "run.yaml"
    stop_at("perta_fast.sweeping.run.draw", monkeypatch, path)
    (state,) = (home / ".settings.perta-partial").rglob("begun.json")
    state.write_text("{}")
    capsys.readouterr()
    assert run("recipe", "run", path) == 2
    assert "is damaged" in capsys.readouterr().err
    assert run("recipe", "run", path, "--overwrite") == 0


def test_what_lies_beside_the_result_is_replaced_only_if_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "run.yaml"
    text = SHARED + UNLEARN.replace("rule: tv", "rule: grad").replace("  out", "  save-importance: both\n  out")
    path.write_text(text)
    (home / "both").mkdir()
    (home / "both" / "file").touch()
    assert refusal(capsys, "recipe", "run", path) == (
        f"{path}, unlearn: {home / 'both'}: is there already; choose another out, or replace it with --overwrite"
    )
    assert run("recipe", "run", path, "--overwrite") == 0
    assert ways(capsys) == {"unlearn": "is made again"}
    path.write_text(text.replace("out: unlearned", "in-place: true"))
    (home / "both" / "file").touch()
    assert run("recipe", "run", path, "--overwrite") == 0


def test_a_result_in_the_directory_of_an_input_changes_no_input(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(home, "out: scores.json", "out: unlearned/scores.json")
    change(home, "- scores.json", "- unlearned/scores.json")
    assert run("recipe", "run", path) == 0
    capsys.readouterr()
    assert run("recipe", "run", path) == 0
    assert set(ways(capsys).values()) == {"is done already"}


def test_names_of_the_hub_are_no_paths(home: Path) -> None:
    """Wherever a command takes such a name, its section does."""
    path = home / "run.yaml"
    names = dict.fromkeys(("model", "base", "tuned", "forget", "retain"), "org/name")
    holdout = "  holdout: org/name\n"
    path.write_text(
        "".join(f"{key}: {value}\n" for key, value in names.items())
        + "tune:\n  retain-kl: 1\n  out: made\n"
        + f"sweep:\n  lams: 1\n  gold: org/name\n{holdout}  out: settings\n"
        + f"unlearn:\n  choose: max-retain-rise=1\n{holdout}  out: unlearned\n"
        + f"eval:\n  reference-model: org/name\n{holdout}  out: scores.json\n"
    )
    sections = sections_of(read_recipe(path), path)
    assert [list(section.read()) for section in sections] == [[]] * 4
    for section in sections:
        assert {str(value) for key, value in vars(section.parsed()).items() if key in names and value} == {"org/name"}


def test_one_run_and_one_section_of_a_job(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe of one run goes by the same command; a command takes its own section of a job."""
    single = home / "single.yaml"
    single.write_text(SHARED + "rule: tv\nlam: 0.5\nout: single\n")
    assert run("recipe", "run", single) == 0
    assert run("unlearn", "--recipe", home / "run.yaml", "--out", home / "one") == 0
    for file in (home / "single").glob("*.safetensors"):
        assert file.read_bytes() == (home / "one" / file.name).read_bytes()
    assert run("recipe", "run", single) == 0
    assert ways(capsys) == {"unlearn": "is done already"}
    (home / "run.yaml").write_text(SHARED + SWEEP)
    expected = f"{home / 'run.yaml'}: has no section unlearn; its sections are sweep"
    assert refusal(capsys, "unlearn", "--recipe", home / "run.yaml") == expected


def test_an_evaluation_beside_that_of_a_gold_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sections of one command have names of their own, and the later one reads what the earlier one makes."""
    write_lines(home / "holdout.jsonl", [{"text": "What nobody has seen."}])
    shared = "forget: forget.jsonl\nretain: retain.jsonl\nholdout: holdout.jsonl\nmetrics: mia_min_k\n"
    gold = "eval gold:\n  model: base\n  out: gold.json\n"
    own = "eval:\n  model: model\n  reference: gold.json\n  metrics: privleak\n"
    path = home / "run.yaml"
    path.write_text(f"{shared}{own}  out: scores.json\n{gold}")
    said = f"line 7: reference: {home}/gold.json is made by eval gold, which does not come before eval"
    assert refusal(capsys, "recipe", "check", path) == f"{path}, {said}"
    path.write_text(f"{shared}{gold}{own}  out: gold.json\n")
    assert refusal(capsys, "recipe", "check", path) == (
        f"{path}, eval: {home}/gold.json is what eval gold makes; choose another out"
    )
    path.write_text(f"{shared}{gold}{own}  out: scores.json\n")
    assert run("recipe", "check", path) == 0
    assert capsys.readouterr().out == f"{path}: a whole job: eval gold, eval\n"
    asked = []

    def evaluate(model: Path, *, reference: Path | None, out: Path, **_: Any) -> Any:
        asked.append((model.name, reference))
        assert reference is None or reference.exists()
        out.write_text(model.name)
        return SimpleNamespace(notes=[], as_record=dict, summary=str)

    monkeypatch.setattr("perta_fast.runs.evaluate.evaluate", evaluate)
    assert run("recipe", "run", path) == 0
    assert asked == [("base", None), ("model", home / "gold.json")]
    capsys.readouterr()
    assert run("recipe", "run", path) == 0
    assert ways(capsys) == {"eval gold": "is done already", "eval": "is done already"}


def test_the_recipes_of_the_page_are_whole(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = re.findall(r"^```yaml\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    names = []
    for text in recipes:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        names.append([section.name for section in sections_of(read_recipe(path), path)])
    assert names == [["unlearn"], list(SECTIONS), ["eval gold", "eval"]]


FAULTS = {
    "a key misspelt": ("  lams: 0.5,1", "  lamz: 0.5,1", "'lamz' is no option of perta sweep; did you mean lams?"),
    "a shared key misspelt": ("retain: r", "retian: r", "'retian' is no option of any section; did you mean retain?"),
    "a shared output": ("quiet: true", "out: here", "out belongs into a section, since each makes something else"),
    "a section misspelt": ("eval:\n  m", "evil:\n  m", "'evil' must be a single value, not a table"),
    "a section without keys": ("quiet: true", "tune: x", "tune must hold the options of perta tune, each on a line"),
    "an empty section": ("quiet: true", "tune:", "tune must hold the options of perta tune, each on a line"),
    "a section that is a list": (
        "quiet: true",
        "tune: [1]",
        "tune must hold the options of perta tune, each on a line",
    ),
    "a section twice": ("report:", "eval:", "'eval' stands in line 15 already"),
    "a value of the wrong kind": ("  lam: 0.5", "  lam: half", "lam is 'half'; it must be a number"),
    "a list for one value": ("  lam: 0.5", "  lam: [1, 2]", "'lam' must be a single value, not a list"),
    "a list for one path": ("forget: forget.jsonl", "forget: [forget.jsonl]", "'forget' must be a single value"),
    "a table in a list": ("  sweep: [settings]", "  sweep: [{a: b}]", "'sweep': an entry must be a single value, not"),
    "missing data": ("forget: forget", "forget: no", "forget: {home}/no.jsonl: cannot be read: No such file"),
    "a missing model": ("model: model\nbase", "model: nil\nbase", "model: {home}/nil: does not exist"),
    "what a later section makes": ("  eval:\n    - scores.json", "  eval: other.json", "eval: {home}/other.json: does"),
    "what only prints": ("  lam: 0.5", "  lam: 0.5\n  stream: true\n  dry-run: true", "dry-run makes nothing that"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_section_is_refused_with_its_line(
    fault: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, expected = FAULTS[fault]
    path = change(home, before, after)
    begin = JOB[: JOB.index(before)].count("\n") + 1 + after.strip().count("\n") * ("dry-run" in after)
    said = refusal(capsys, "recipe", "run", path)
    assert said.startswith(f"{path}, line {begin}: {expected.format(home=home)}")
    if "section misspelt" not in fault:
        assert refusal(capsys, "recipe", "check", path) == said
    assert not any((home / name).exists() for name in (*RESULTS, RECORD))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("out: unlearned", "out: model", "line 1: model: {home}/model would be replaced by unlearn"),
        ("out: settings", "out: .", "line 1: model: {home}/model would be replaced by sweep"),
        (
            "out: page.html",
            "out: page.html\n  png: retain.jsonl",
            "line 5: retain: {home}/retain.jsonl would be replaced",
        ),
    ],
)
def test_what_the_job_reads_is_never_replaced(
    before: str, after: str, expected: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the first section begins."""
    path, inputs = change(home, before, after), fingerprint(home)
    said = refusal(capsys, "recipe", "run", path, "--overwrite")
    assert said.startswith(f"{path}, {expected.format(home=home)}")
    assert fingerprint(home) == inputs


WHOLE_FAULTS = {
    "no place": ("  out: settings\n", "", "sweep: is not a whole run; it does not say: out"),
    "what does not go together": ("lam: 0.5", "lams: 0.5", "unlearn: --lams is for a choice among settings"),
    "a number out of range": ("max-new-tokens: 1", "max-new-tokens: 0", "eval: max-new-tokens is 0"),
    "a number of tune out of range": (
        "sweep:\n  rule",
        "tune:\n  epochs: 0\n  out: made\nsweep:\n  rule",
        "tune: epochs is 0; it must be at least 1",
    ),
    "no strengths and no bound": ("  lams: 0.5,1\n", "", "sweep: give lams, or a bound up to which to search"),
    "one place for two": ("out: unlearned", "out: settings", "unlearn: {home}/settings is what sweep makes; choose"),
}


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_a_fault_of_a_whole_section_is_refused(fault: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, expected = WHOLE_FAULTS[fault]
    path = change(home, before, after)
    assert refusal(capsys, "recipe", "run", path).startswith(f"{path}, {expected.format(home=home)}")
    assert not any((home / name).exists() for name in (*RESULTS, RECORD))


def test_a_wrong_row_anywhere_is_refused_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "retain.jsonl").write_text('{"text": "a"}\n' * 500 + '{"txet": "b"}\n')
    said = refusal(capsys, "recipe", "run", home / "run.yaml")
    assert said.startswith(f"{home / 'run.yaml'}, line 5: retain: {home / 'retain.jsonl'}, line 501: ")


def test_a_damaged_record_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / RECORD).write_text("{}\n")
    assert refusal(capsys, "recipe", "run", done / "run.yaml").startswith(f"{done / RECORD}: is damaged")


def test_shared_retain_rows_are_for_tune_only_beside_their_weight() -> None:
    retain, weight = Setting("retain.jsonl", ""), Setting("0.1", "")
    command = Command("tune", "", (Option("retain"), Option("retain_kl")))
    assert with_shared(command, {"retain": retain}, {}) == {}
    assert with_shared(command, {"retain": retain}, {"retain-kl": weight}) == {"retain": retain, "retain-kl": weight}
    assert with_shared(command, {}, {"retain": retain}) == {"retain": retain}


def test_the_template_of_a_job_runs_once_it_is_filled(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "job.yaml"
    assert run("recipe", "init", "--job", "--out", path) == 0
    assert re.findall(r"^([a-z]+):  # required$", path.read_text(), re.MULTILINE) == [
        *("model", "base", "forget", "retain")
    ]
    assert refusal(capsys, "recipe", "check", path).startswith(f"{path}, tune: is not a whole run; it does not say: ba")
    text = path.read_text()
    for key, value in (("model", "model"), ("base", "base"), ("forget", "forget.jsonl"), ("retain", "retain.jsonl")):
        text = text.replace(f"{key}:  # required", f"{key}: {value}")
    path.write_text(text)
    assert run("recipe", "check", path) == 0
    for name in SECTIONS:
        assert f"\n{name}:\n" in text


def test_the_sections_are_commands_and_the_lists_their_options_with_several_values() -> None:
    assert tuple(COMMANDS) == SECTIONS
    options = [option for command in COMMANDS.values() for option in options_of(command).values()]
    assert {option.key for option in options if option.several} == set(LISTS)
