"""Recipes: the same run as by the command line, every fault refused with its line, and runs done once more."""

import inspect
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perta_fast import Report, apply, cli, unlearn
from perta_fast.cli.recipe_options import options_of
from perta_fast.cli.unlearn import COMMAND
from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.runs import unlearn as unlearning
from tests.support.inputs import write_inputs
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDED = "model: m\nbase: b\ntuned: t\nlam: 1\nout: o\n"
Asked = dict[str, Any]


def run(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


def recipe(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command says, without its start."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (err[:14], err.count("\n")) == ("perta: error: ", 1)
    return err[14:-1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the command asks of ``unlearn``, which does nothing."""
    found: Asked = {}

    def note(**settings: Any) -> Report:
        found.clear()
        found.update(settings)
        return Report("tv", 1.0, 1.0, 1.0, None, {})

    monkeypatch.setattr(unlearning, "unlearn", note)
    return found


# The same run.


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run is done, in ``out``."""
    folder = tmp_path_factory.mktemp("recipe")
    for role in ("model", "base", "tuned"):
        (folder / role).symlink_to(getattr(job, role))
    for role in ("forget", "retain"):
        shutil.copy(getattr(job, role), folder / f"{role}.jsonl")
    settings = """
        model: model
        base: ./base
        lam: 0.75
        rule: grad
        at: model
        forget: forget.jsonl
        retain: retain.jsonl
        batch-size: 3
        dtype: float32
        save-importance: importance
        out: out
        link-unchanged: no
        drop-cache: no
        quiet: yes
    """
    text = f"{textwrap.dedent(settings)}tuned: {job.tuned}\n"
    assert run("unlearn", "--recipe", recipe(folder, text)) == 0
    return folder


def test_the_run_is_that_of_the_command_line(done: Path, job: Job, tmp_path: Path) -> None:
    how = ["--rule", "grad", "--lam", "0.75", "--at", "model", "--batch-size", "3", "--dtype", "float32"]
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    assert run("unlearn", *places, *how, "--out", tmp_path / "out") == 0
    assert len(weights_in(done / "out")) > 1
    assert weights_in(done / "out") == weights_in(tmp_path / "out")


def test_the_report_holds_the_resolved_recipe(done: Path, job: Job) -> None:
    paths = {
        "model": done / "model",
        "base": done / "base",
        "tuned": job.tuned,
        "forget": done / "forget.jsonl",
        "retain": done / "retain.jsonl",
        "out": done / "out",
        "save-importance": done / "importance",
    }
    flags = (
        "stream",
        "in-place",
        "overwrite",
        "link-unchanged",
        "drop-cache",
        "allow-zero",
        "leave-others",
        "common-rows",
    )
    expected = {"rule": "grad", "lam": 0.75, "alpha": 1.0, "at": "model", "batch-size": 3, "dtype": "float32"}
    expected["check"] = True
    expected |= {key: str(path) for key, path in paths.items()} | dict.fromkeys(flags, False)
    assert Report.load(done / "out").recipe == expected


def test_a_run_is_repeated_from_its_report(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = shutil.copy(done / "out" / "perta_report.json", tmp_path / "moved.json")
    monkeypatch.chdir(tmp_path)
    assert run("unlearn", "--recipe", report, "--out", "again", "--quiet") == 0
    assert weights_in(tmp_path / "again") == weights_in(done / "out")
    first, second = Report.load(done / "out"), Report.load(tmp_path / "again")
    assert first.recipe.pop("save-importance") == str(done / "importance")
    assert second.recipe == first.recipe | {"out": str(tmp_path / "again")}
    assert (second.settings, second.versions) == (first.settings, first.versions)


def test_a_new_place_is_needed_to_repeat_a_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("unlearn", "--recipe", done / "out" / "perta_report.json")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "perta unlearn: error: the following arguments are required: --out or --i"
    )


def test_calls_from_python_are_recorded_too(job: Job, tmp_path: Path, asked: Asked) -> None:
    how: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "batch_size": np.int64(5)}
    how |= {"threads": np.int64(2), "threshold": np.float32(0.5), "drop_cache": np.False_, "link_unchanged": np.True_}
    settings: dict[str, Any] = how | {"lam": 1.0, "progress": False}
    unlearn(*map(str, job.checkpoints), job.forget, job.retain, out=tmp_path / "a", **{"rule": "fisher"} | settings)
    unlearn(*job.checkpoints, rule="tv", lam=2, out=tmp_path / "b", progress=False)
    kept = [Report.load(tmp_path / name).recipe for name in "ab"]
    assert [kept[0][key] for key in ("model", "dtype", "device")] == [str(job.model), "float32", "cpu"]
    assert (kept[1]["rule"], kept[1]["lam"], "forget" in kept[1], "progress" in kept[1]) == ("tv", 2, False, False)
    assert run("unlearn", "--recipe", tmp_path / "a" / "perta_report.json", "--out", tmp_path / "c") == 0
    assert (asked["batch_size"], asked["dtype"], asked["device"]) == (5, torch.float32, "cpu")
    assert [asked[name] for name in ("threads", "threshold", "drop_cache", "link_unchanged")] == [2, 0.5, False, True]


def test_a_run_in_place_is_repeated_on_another_model_only(
    job: Job, tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    unlearn(model, model, job.tuned, rule="tv", in_place=True, progress=False, lam=1.0)
    report = shutil.copy(model / "perta_report.json", tmp_path / "r.json")
    with pytest.raises(SystemExit):
        run("unlearn", "--recipe", report, "--in-place")
    assert "error: the following arguments are required: --model, --base (" in capsys.readouterr().err
    assert run("unlearn", "--recipe", report, "--in-place", "--model", "copy", "--base", "copy") == 0
    assert (asked["model"], asked["tuned"], asked["in_place"]) == (Path("copy"), job.tuned, True)


def test_reports_without_a_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply(*write_inputs(tmp_path).all, rule="grad", out=tmp_path / "out", progress=False)
    report = tmp_path / "out" / "perta_report.json"
    expected = f"{report}: holds no recipe; only reports of perta unlearn do"
    assert refusal(capsys, "unlearn", "--recipe", report) == expected
    content = json.loads(report.read_text()) | {"recipe": {"lam": [1]}}
    report.write_text(json.dumps(content))
    assert refusal(capsys, "recipe", "check", report).startswith(f"{report}: is not a report that")
    report.write_text(json.dumps(content | {"recipe": {"base": "a\0"}}))
    assert refusal(capsys, "recipe", "check", report).startswith(f"{report}, recipe: base holds a character")
    report.write_text(json.dumps(content | {"recipe": {"lambada": 1}}))
    assert refusal(capsys, "recipe", "check", report).startswith(f"{report}, recipe: 'lambada' is no option")


# What comes first.


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_comes_before_the_recipe(first: bool, tmp_path: Path, asked: Asked) -> None:
    path = recipe(tmp_path, NEEDED + "batch-size: 4\ndrop-cache: true\nrule: grad\nthreads: 3\n")
    here = ["--lam", "2", "--batch-size", "8", "--no-drop-cache", "--model", "x"]  # 8 is the default too
    arguments = ["--recipe", path, *here] if first else [*here, "--recipe", path]
    assert run("unlearn", *arguments) == 0
    found = [asked[name] for name in ("lam", "batch_size", "drop_cache", "rule", "threads")]
    assert found == [2.0, 8, False, "grad", 3]
    assert (asked["model"], asked["base"]) == (Path("x"), tmp_path / "b")


def test_of_two_places_that_of_the_command_line_is_taken(tmp_path: Path, asked: Asked) -> None:
    in_place = NEEDED.replace("out: o", "in-place: true")
    for text, arguments, expected in (
        (NEEDED, ["--in-place"], (None, True)),
        (NEEDED, ["--out", "here"], (Path("here"), False)),
        (in_place, ["--out", "here"], (Path("here"), False)),
        (in_place, [], (None, True)),
        (NEEDED + "in-place: false\n", [], (tmp_path / "o", False)),
    ):
        assert run("unlearn", "--recipe", recipe(tmp_path, text), *arguments) == 0
        assert (asked["out"], asked["in_place"]) == expected


def test_values_are_read_as_on_the_command_line(tmp_path: Path, asked: Asked) -> None:
    path = recipe(tmp_path, "\ufeffmodel: 007\nbase: no-where\ntuned: 2024-01-01\nlam: 1e-3\nout: '-x = true'\np:\n")
    assert run("unlearn", "--recipe", path) == 0
    assert [asked[name] for name in ("model", "base", "tuned", "out")] == [
        tmp_path / name for name in ("007", "no-where", "2024-01-01", "-x = true")
    ]
    assert (asked["lam"], asked["p"]) == (0.001, None)


# What is refused.

FAULTS = {
    "a key misspelt": ("lambda: 2", "6: 'lambda' is no option of perta unlearn; did you mean lam?"),
    "an underscore": ("\nbatch_size: 2", "7: 'batch_size' is no option of perta unlearn; did you mean batch-"),
    "a strange key": ("xyzzy: 2", "6: 'xyzzy' is no option of perta unlearn; there are model, base, tuned, "),
    "a recipe in a recipe": ("recipe: x.yaml", "6: 'recipe' is no option of perta unlearn; "),
    "a negated flag": ("no-drop-cache: true", "6: 'no-drop-cache' is no option of perta unlearn; did you"),
    "a key twice": ("# so\nlam: 2", "7: 'lam' stands in line 4 already"),
    "a word for a number": ("p: much", "6: p is 'much'; it must be a number"),
    "a part for a whole": ("threads: 1.5", "6: threads is '1.5'; it must be a whole number"),
    "not a choice": ("rule: fish", "6: rule is 'fish'; it must be one of preconditioned, tv, grad, "),
    "a size without a number": ("memory: GiB", "6: memory: "),
    "a word for a flag": ("stream: 'true'", "6: stream is 'true'; it must be true or false"),
    "a flag for a path": ("save-importance: true", "6: save-importance is True; it must be a path; write"),
    "an empty path": ("save-importance: ''", "6: save-importance is ''; it must be a path"),
    "a list": ("\n\nforget: [a, b]", "8: 'forget' must be a single value, not a list"),
    "a table": ("forget: {a: b}", "6: 'forget' must be a single value, not a table"),
    "a list for a key": ("? [a]\n: b", "6: a key must be a single value, not a list"),
    "a section alone": ("tune: x", "6: tune must hold the options of perta tune, each on a line of its own"),
    "both places": ("in-place: true", "6: in-place cannot stand beside out"),
    "a tag": ("forget: !!python/object/apply:os.abort []", "6: 'forget' must be a single value, not a list"),
    "a tag on a text": ("forget: !!python/name:os.abort x", "6: 'forget' must be a plain value, not one"),
    "a merge": ("<<: *x", "6: is not YAML: found undefined alias"),
    "no YAML": ("forget: 'a", "7: is not YAML: while scanning a quoted scalar: found unexpected end of stream"),
    "two documents": ("--- \nlam: 2", "6: is not YAML: expected a single document in the stream: but "),
    "a control character": ("forget: \x01", "6: holds a character that YAML has no place for"),
    "a null in a name": ('forget: "a\\0"', "6: 'forget' holds a character that no name or number can have"),
    "half a character": ('forget: "\\ud800"', "6: 'forget' holds a character that no name or number can have"),
    "an impossible character": ('forget: "\\Uffffffff"', None),
    "deep nesting": ("forget: " + "[" * 500, None),
    "an alias to itself": ("forget: &x {a: *x}", "6: 'forget' must be a single value, not a table"),
    "aliases of aliases": (
        "p: &k0 [x, x]\n" + "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 99)),
        "6: 'p' must be a single value, not a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_its_line(
    fault: str, tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    line, expected = FAULTS[fault]
    path = recipe(tmp_path, f"{NEEDED}{line}\n")
    said = refusal(capsys, "unlearn", "--recipe", path)
    assert said.startswith(f"{path}: is " if expected is None else f"{path}, line {expected}")
    assert len(said) < len(str(path)) + 400
    assert refusal(capsys, "recipe", "check", path) == said
    assert asked == {}
    assert list(tmp_path.iterdir()) == [path]


def test_faults_in_what_the_command_line_overrides_are_told_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, NEEDED.replace("lam: 1", "lam: one"))
    expected = f"{path}, line 4: lam is 'one'; it must be a number"
    assert refusal(capsys, "unlearn", "--lam", "1", "--recipe", path) == expected


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, ": cannot be read: No such file or directory"),
    "a directory": (Path.mkdir, ": cannot be read: Is a directory"),
    "a pipe": (make_pipe, ": cannot be read: Not a regular file"),
    "an empty file": (Path.touch, ": is empty; perta recipe init writes a template"),
    "a comment": (lambda path: path.write_text("# lam: 1\n"), ": is empty; perta recipe init writes a template"),
    "a text": (lambda path: path.write_text("\n lam 1\n"), ", line 2: must hold lines such as lam: 1.0"),
    "a list": (lambda path: path.write_text("- lam\n"), ", line 1: must hold lines such as lam: 1.0"),
    "Latin 1": (lambda path: path.write_bytes(b"lam: 1\n# \xe9\n"), ", line 2: is not UTF-8 text (byte 9)"),
    "weights": (lambda path: path.write_bytes(b"#" * 2**17), ": is longer than 64 KiB; is this a recipe?"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_recipe_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = FILES[kind]
    path = tmp_path / "run.yaml"
    make(path)
    for arguments in (("unlearn", "--recipe", path), ("recipe", "check", path)):
        assert refusal(capsys, *arguments) == f"{path}{expected}"


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, NEEDED + "retain: r\nstream: true\n")
    assert run("recipe", "check", path) == 0
    assert capsys.readouterr().out == f"{path}: a whole run, 7 settings\n"
    recipe(tmp_path, "model: m\nin-place: false\nbase:\n")
    expected = f"{path}: is not a whole run; it does not say: base, tuned, out or in-place"
    assert refusal(capsys, "recipe", "check", path) == expected
    recipe(tmp_path, NEEDED)
    expected = f"{path}: rule preconditioned, which is the default, needs retain data; give a file of it as retain"
    assert refusal(capsys, "recipe", "check", path) == expected
    recipe(tmp_path, NEEDED.replace("lam: 1", "lam: .nan").replace(".nan", "nan"))
    assert refusal(capsys, "recipe", "check", path) == f"{path}: lam is nan; it must be a finite number"


# The template.


def keys_in(text: str) -> list[str]:
    return re.findall(r"^(?:# )?([a-z-]+):", text, re.MULTILINE)


def test_the_keys_are_the_options_that_the_help_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("unlearn", "--help")
    listed = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert run("recipe", "init") == 0
    keys = keys_in(capsys.readouterr().out)
    assert len(keys) == len(set(keys)) > 20
    assert listed - {"help", "recipe", "json"} == set(keys)


def test_every_argument_of_the_function_is_an_option_and_every_path_is_made_absolute() -> None:
    options = options_of(COMMAND)
    names = [name for name in inspect.signature(unlearn).parameters if name != "progress"]
    recorded = as_recipe({name: Path("here") for name in names})
    assert recorded.keys() <= options.keys()
    absolute = {key for key, value in recorded.items() if value == str(Path.cwd() / "here")}
    assert absolute == {key for key, option in options.items() if option.type is Path and option.name in names}


def test_the_template_is_a_recipe_once_it_is_filled(
    tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    assert run("recipe", "init", "--out", path) == 0
    blank = path.read_text()
    assert refusal(capsys, "recipe", "check", path).startswith(f"{path}: is not a whole run; it does not say: model,")
    needed = re.findall(r"^([a-z-]+):  # required$", blank, re.MULTILINE)
    assert needed == ["model", "base", "tuned", "forget", "retain", "out"]
    filled = re.sub(r"^(?:# )?(lam:) L$", r"\1 3", blank, flags=re.MULTILINE)
    filled = re.sub(r"^([a-z-]+):  # required$", r"\1: 3", filled, flags=re.MULTILINE)
    path.write_text(filled)
    assert run("recipe", "check", path) == 0
    assert run("unlearn", "--recipe", path) == 0
    of_recipe = dict(asked)
    places = [f"--{name}={tmp_path / '3'}" for name in needed]
    assert run("unlearn", *places, "--lam", "3") == 0
    assert of_recipe == asked


def test_every_default_in_the_template_is_the_option_s_own(
    tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taking the # away from what has a default changes nothing, but for the one that has three states."""
    assert run("recipe", "init") == 0
    lines = re.findall(r"^# ([a-z-]+: (?:false|[a-z]+|[\d.]+))$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) > 7
    assert run("unlearn", "--recipe", recipe(tmp_path, NEEDED)) == 0
    expected = asked | {"drop_cache": False}
    assert run("unlearn", "--recipe", recipe(tmp_path, NEEDED + "\n".join(lines))) == 0
    assert asked == expected


def test_a_file_is_replaced_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "mine")
    said = refusal(capsys, "recipe", "init", "--out", path)
    assert (said, path.read_text()) == (f"{path}: exists; choose another file or pass --overwrite", "mine")
    assert run("recipe", "init", "--out", path, "--overwrite") == 0
    assert "mine" not in path.read_text()
    weights = tmp_path / "model.safetensors"
    weights.write_text("mine")
    said = refusal(capsys, "recipe", "init", "--out", weights, "--overwrite")
    assert (said, weights.read_text()) == (f"{weights}: name a file that ends in .yaml or .yml", "mine")
    below = tmp_path / "no" / "run.yaml"
    assert refusal(capsys, "recipe", "init", "--out", below) == f"{below.parent}: is not a directory"
