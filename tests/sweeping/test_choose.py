"""Rule and strength chosen within a bound: importances, sweep, choice and result in one call."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import InputError, Interrupted, Report, RunError, Sweep, choose, cli, resume, verify
from perta_fast.importance.store import Importance
from perta_fast.records.setting_choice import SettingChoice
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.subtraction import to_directory
from perta_fast.sweeping import choose as choosing
from perta_fast.sweeping import run as sweeping_run
from perta_fast.sweeping.grid import DEFAULT_STRENGTHS
from perta_fast.sweeping.results import record_beside
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

LAMS = [1.0, 50.0, 100.0]
WITHIN: dict[str, Any] = {"max_retain_increase": 20, "lams": LAMS, "progress": False}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One whose files may be changed, with room for results beside them."""
    return write_job(tmp_path, torch.float32)


def run(job: Job, **chosen: Any) -> Report:
    return choose(*job.checkpoints, job.forget, job.retain, **WITHIN | chosen)


def same(one: Path, other: Path) -> bool:
    tensors, others = read_checkpoint(one), read_checkpoint(other)
    return tensors.keys() == others.keys() and all(same_bytes(tensors[name], others[name]) for name in tensors)


def outcome(report: Report) -> SettingChoice:
    """The choice, without what was scored on the way: whether a sweep walks twice depends on what was measured."""
    assert report.setting_choice is not None
    return replace(report.setting_choice, tried=[], skipped=0)


def left(folder: Path) -> set[str]:
    """What was made beside the inputs, hidden files too."""
    return {path.name for path in folder.iterdir()} - {"model", "base", "tuned", "forget.jsonl", "retain.jsonl"}


# What is chosen.


@pytest.mark.parametrize("stream", [True, False])
def test_the_result_is_that_of_the_best_setting(stream: bool, job: Job, tmp_path: Path) -> None:
    report = run(job, rules=["tv", "empirical-fisher", "preconditioned"], stream=stream, out=tmp_path / "out")
    found = Sweep.read(tmp_path / "out.sweep" / "sweep.json")
    limit = 1.2 * found.original.retain_loss
    kept = [row for row in found.rows if row.rule and not row.skipped and row.retain_loss <= limit]
    best = max(kept, key=lambda row: row.forget_loss)
    assert 1 < len(kept) < len(found.rows) - 1  # some are not
    assert {(row.rule, row.alpha) for row in found.rows if row.rule} == {
        *(("tv", 1), ("preconditioned", 1), ("empirical-fisher", 1), ("empirical-fisher", 16))
    }
    choice = report.setting_choice
    assert choice is not None and (choice.bound, choice.value, choice.limit) == ("max_retain_increase", 20, limit)
    assert (choice.select, choice.metric, choice.streamed) == ("best-forget", "loss", stream)
    assert choice.rows == {"forget": 5, "retain": 7}
    assert (choice.after.rule, choice.after.lam, choice.after.alpha) == (best.rule, best.lam, best.alpha)
    scored = [row for row in found.rows if row.rule and not row.skipped]
    assert [(each.lam, each.forget, each.retain, each.changed) for each in choice.tried] == [
        (row.lam, row.forget, row.retain, row.changed) for row in scored
    ]
    assert choice.skipped == len(found.rows) - 1 - len(scored)
    assert choice.before.retain_loss == found.original.retain_loss
    assert report.rule == best.rule and report.lam == best.lam
    assert set(choice.lines()) <= set(report.summary().splitlines())
    assert left(tmp_path) == {"out", "out.sweep"}
    assert verify(tmp_path / "out", progress=False).problems == []


@pytest.mark.parametrize("rules", [["preconditioned"], ["grad"]])
def test_the_report_is_a_recipe_of_the_chosen_setting_alone(rules: list[str], job: Job, tmp_path: Path) -> None:
    report = run(job, rules=rules, alphas=None if "preconditioned" in rules else 4, stream=True, out=tmp_path / "out")
    assert (report.recipe["rule"], report.recipe["lam"]) == (rules[0], report.lam)
    again = ["unlearn", "--recipe", tmp_path / "out" / "perta_report.json", "--out", tmp_path / "again", "--quiet"]
    assert cli.main([*map(str, again)]) == 0
    assert same(tmp_path / "out", tmp_path / "again")
    repeated = Report.load(tmp_path / "again")
    assert repeated.setting_choice is None and repeated.chosen_rule() == report.chosen_rule()


def test_in_place(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job, stream=True, out=tmp_path / "out")
    let = stopping(monkeypatch, sweeping_run, "write_best")
    with pytest.raises(Interrupted, match=r"what was scored is kept\. Go on with: the same command$"):
        run(job, stream=True, in_place=True)
    let()
    with pytest.raises(InputError, match=r"are not all scored: go on with: the same command$"):
        resume(job.model, progress=False)
    other = "another sweep to this place was stopped; finish it with the command that began it, which is to change"
    with pytest.raises(InputError, match=other):
        run(job, stream=True, in_place=True, lams=[3])
    assert cli.main(command(job, "--stream", "--choose", "max-retain-rise", "--in-place", "--dry-run")) == 2
    assert other in capsys.readouterr().err
    report = run(job, stream=True, in_place=True)
    assert report.in_place and report.setting_choice is not None
    assert same(job.model, tmp_path / "out")
    assert left(tmp_path) == {"out", "out.sweep", "model.sweep"}
    assert Report.load(job.model).setting_choice == report.setting_choice


def given_to_sweep(monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> dict[str, Any]:
    """The arguments of the sweep that a choice begins."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(choosing, "sweep", lambda *_, **settings: calls.append(settings))
    monkeypatch.setattr(choosing.Report, "load", lambda directory: directory)
    places: dict[str, Any] = {} if "in_place" in chosen else {"out": "there/out"}
    made = choose("m", "b", "t", "f", "r", **places | chosen)
    (settings,) = calls
    return settings | {"made": made}


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given_to_sweep(monkeypatch)
    assert (found["rule"], found["mu"], found["alpha"], found["lams"]) == ("preconditioned", None, 1.0, None)
    assert (found["max_retain_rise"], found["max_retain_increase"], found["up_to_base"]) == (0.05, None, None)
    assert (found["checkpoint"], found["out"]) == ("there/out", Path("there/out.sweep").absolute())
    assert found["made"] == Path("there/out")
    weighed = given_to_sweep(monkeypatch, rules=["tv", "grad"], target_retain_loss=1, in_place=True)
    assert (weighed["alpha"], weighed["target_retain_loss"], weighed["max_retain_rise"]) == ((1.0, 16.0), 1, None)
    assert not weighed["up_to_base"] and not given_to_sweep(monkeypatch, up_to_base=False)["up_to_base"]
    assert (weighed["checkpoint"], weighed["out"]) == (None, Path("m.sweep").absolute())
    assert given_to_sweep(monkeypatch, rules="grad", alphas=[3.0])["alpha"] == [3.0]


def test_a_streamed_choice_tries_a_row_of_strengths(job: Job, tmp_path: Path) -> None:
    run(job, lams=None, rules="empirical-fisher", alphas=1, stream=True, out=tmp_path / "out")
    rows = Sweep.read(tmp_path / "out.sweep" / "sweep.json").rows
    assert {row.lam for row in rows if row.rule} >= set(DEFAULT_STRENGTHS)


@pytest.mark.parametrize("page", ["streaming", "sweep"])
def test_the_documentation_names_these_strengths(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert ", ".join(f"{lam:g}" for lam in DEFAULT_STRENGTHS) in " ".join(text.split())


def test_the_record_of_a_result_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for result in ("out", "out/", "./out", tmp_path / "out"):
        assert record_beside(result) == tmp_path / "out.sweep"
    assert record_beside(".") == tmp_path.with_name(f"{tmp_path.name}.sweep")
    with pytest.raises(InputError, match=r"/: cannot be a result"):
        record_beside("/")


# What is not.


def test_nothing_keeps_the_bound(job: Job, tmp_path: Path) -> None:
    before = fingerprint(job.model)
    with pytest.raises(
        RunError, match=r"out: not written: nothing that was tried keeps .*; nearest .* is in .*/out\.sweep"
    ):
        run(job, rules="tv", lams=[1000], stream=True, out=tmp_path / "out")
    with pytest.raises(
        RunError, match=r"model: not changed: nothing that was tried keeps .*; nearest .* is in .*/model\.sweep"
    ):
        run(job, rules="tv", lams=[1000], stream=True, in_place=True)
    assert left(tmp_path) == {"out.sweep", "model.sweep"}
    assert fingerprint(job.model) == before


def test_a_setting_that_is_not_finite_is_named_and_others_go_on(job: Job, tmp_path: Path) -> None:
    report = run(job, rules="grad", alphas=1, lams=[1, 20, 1e40], stream=True, out=tmp_path / "out")
    choice = report.setting_choice
    assert choice is not None and (choice.tried[-1].lam, choice.tried[-1].retain_loss) == (1e40, None)
    assert choice.after.lam == 20
    assert any("lambda 1e+40" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "give either out, a directory to make, or in_place"),
        ({"out": "out", "in_place": True}, "give either out, a directory to make, or in_place"),
        ({"out": "out", "max_retain_rise": 0.1}, "give only one of max_retain_rise and max_retain_increase"),
        ({"out": "out", "rules": "fish"}, "rule is 'fish'; it must be one of preconditioned, tv, grad"),
        ({"out": "out", "alphas": [1, 16]}, "rule preconditioned, which is the default, has no weights"),
        ({"out": "out", "max_retain_increase": None, "retain_floor": 0.5}, "retain_floor is for a metric that falls"),
        ({"out": "out", "stream": True, "metric": "Q_A_ROUGE"}, "needs answers that the model generates"),
        (
            {"out": "out", "save_tuned": "out/kept"},
            "out .*/out and save_tuned .*/out/kept must lie apart, neither within",
        ),
    ],
)
def test_bad_arguments(chosen: dict[str, Any], message: str, job: Job, tmp_path: Path) -> None:
    places = {name: tmp_path / place for name, place in chosen.items() if name in ("out", "save_tuned")}
    with pytest.raises(InputError, match=message):
        run(job, **chosen | places)
    assert left(tmp_path) == set()


# What was stopped.


def stopping(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[], None]:
    """Interrupt the next call; returns what lets later calls be."""

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    whole = getattr(owner, name)
    monkeypatch.setattr(owner, name, stop)
    return lambda: monkeypatch.setattr(owner, name, whole)


@pytest.mark.parametrize("again", ["the same call", "resume"])
def test_stopped_before_the_result_is_made(
    again: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job, stream=True, out=tmp_path / "whole")
    let = stopping(monkeypatch, sweeping_run, "write_best")
    out, record = tmp_path / "out", tmp_path / "out.sweep"
    with pytest.raises(Interrupted, match=rf"what was scored is kept\. Go on with: perta resume {record}$"):
        run(job, stream=True, out=out)
    let()
    assert left(tmp_path) == {"whole", "whole.sweep", ".out.sweep.perta-partial"}
    with pytest.raises(InputError, match=rf"are not all scored: go on with: perta resume {record}$"):
        resume(out, progress=False)
    monkeypatch.setattr(ScoredModel, "score", None)  # nothing is scored again
    if again == "resume":
        resume(record, progress=False)
        report = Report.load(out)
    else:
        report = run(job, stream=True, out=out)
    assert report.setting_choice is not None
    assert same(out, tmp_path / "whole")
    assert left(tmp_path) == {"whole", "whole.sweep", "out", "out.sweep"}


@pytest.mark.parametrize("first", ["out", "out.sweep"])
def test_stopped_while_the_result_is_made(
    first: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is finished by either name, and then by the other."""
    run(job, stream=True, out=tmp_path / "whole")
    let = stopping(monkeypatch, to_directory, "write_model_card")
    with pytest.raises(Interrupted, match=r"perta resume \S*/out\.sweep$"):
        run(job, stream=True, out=tmp_path / "out")
    let()
    assert (tmp_path / ".out.perta-partial").exists()
    if first == "out":
        resume(tmp_path / first, progress=False)
    resume(tmp_path / "out.sweep", progress=False)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert left(tmp_path) == {"whole", "whole.sweep", "out", "out.sweep"}


# The command.


def command(job: Job, *arguments: object) -> list[str]:
    model, base, tuned = job.checkpoints
    words = ("unlearn", "--model", model, "--base", base, "--tuned", tuned, *arguments)
    return [*map(str, words), "--forget", str(job.forget), "--retain", str(job.retain)]


@pytest.mark.parametrize("stream", [["--stream", "--memory", "2GiB"], []])
def test_the_command(stream: list[str], job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    chosen = ["--choose", "max-retain-increase=20%", "--rules", "tv,grad", "--alphas", "4", "--lams", "1,50,100"]
    keeping = ["--save-importance", tmp_path / "kept"]
    assert cli.main(command(job, *stream, *chosen, *keeping, "--out", out)) == 0
    assert Importance.load(tmp_path / "kept" / "forget").metadata.estimator == "grad"
    lines = capsys.readouterr().out.splitlines()
    choice = Report.load(out).setting_choice
    assert choice is not None and [line for line in lines if line in choice.lines()] == choice.lines()
    assert lines[-2:] == [f"written to {out}", f"every setting that was scored: {tmp_path / 'out.sweep'}"]
    assert {each.alpha for each in choice.tried if each.rule == "grad"} == {4}
    expected = run(job, rules=["tv", "grad"], alphas=4, stream=bool(stream), out=tmp_path / "python")
    assert outcome(Report.load(out)) == outcome(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--choose", "rise=1"], "'rise' is not a bound; there are up-to-base, max-retain-increase"),
        (["--choose", "up-to-base=-1"], "'up-to-base=-1' needs a number of nats that is at least 0, as in up-to-base"),
        (["--choose", "up-to-base=nan"], "'up-to-base=nan' needs a number of nats that is at least 0"),
        (["--choose", "up-to-base=5%"], "'up-to-base=5%' needs a number, as in up-to-base=0.5"),
        (["--choose", "max-retain-rise=5%"], "'max-retain-rise=5%' needs a number, as in max-retain-rise=0.5"),
        (["--choose", "retain-floor"], "'retain-floor' needs a number, as in retain-floor=0.5"),
        (["--choose", "max-retain-rise=much"], "'max-retain-rise=much' needs a number"),
        (["--choose", "max-retain-rise", "--lam", "1"], "--lam: not allowed with argument --choose"),
        (["--choose", "max-retain-rise", "--max-retain-rise", "1"], "not allowed with argument --choose"),
        (["--choose", "max-retain-rise", "--rule", "tv", "--rules", "tv"], "not allowed with argument --rule"),
        (["--choose", "max-retain-rise=-1"], "--choose max-retain-rise is -1.0; it must be at least 0 nats"),
        (["--choose", "max-retain-rise", "--link-unchanged"], "--link-unchanged is for a run with one setting"),
        (
            ["--choose", "max-retain-rise", "--as", "ratio"],
            "--as says how importances are kept; give --save-importance",
        ),
        (["--choose", "max-retain-rise", "--no-drop-cache"], "--drop-cache is for a run with one setting"),
        (["--choose", "max-retain-rise", "--memory", "1GiB"], "--memory is for streamed runs; add --stream"),
        (["--lams", "1,2"], "--lams is for a choice among settings; add --choose BOUND"),
        (["--metric", "Q_A_Prob"], "--metric is for a choice among settings"),
    ],
)
def test_bad_options(
    given: list[str], message: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(command(job, *given, "--out", tmp_path / "out"))
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2 and message in capsys.readouterr().err
    assert left(tmp_path) == set()


def test_both_data_sets_are_needed(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_forget = command(job, "--choose", "max-retain-rise", "--out", tmp_path / "out")[:-4]
    assert cli.main([*without_forget, "--retain", str(job.retain)]) == 2
    assert "give --forget and --retain" in capsys.readouterr().err


def test_a_dry_run(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--stream", "--choose", "max-retain-rise", "--rules", "preconditioned,grad", "--lams", "1,2"]
    assert cli.main(command(job, *chosen, "--out", tmp_path / "out", "--dry-run")) == 0
    text = capsys.readouterr().out
    for walk in ("forget importance, grad:", "retain importance, grad:", "rule preconditioned:", "7 settings:"):
        assert f"{walk}\n" in text
    assert text.count("memory: ") == 4
    assert "then the result is computed from files, chunk by chunk, as by perta apply" in text
    assert left(tmp_path) == set()


# A choice in a recipe.


def recipe(job: Job, **settings: Any) -> Path:
    files = {"forget": "forget.jsonl", "retain": "retain.jsonl", "out": "out"}
    entries = {name: name for name in ("model", "base", "tuned")} | files | settings
    path = job.model.parent / "run.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()))
    return path


def test_an_alpha_of_a_recipe(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only one to try, also if it is the default of one setting."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(choosing, "sweep", lambda **settings: calls.append(settings))
    path = recipe(job, choose="max-retain-rise", rule="grad", alpha=1)
    assert cli.main(["unlearn", "--recipe", str(path)]) == 2  # no result was made
    assert [settings["alpha"] for settings in calls] == [1]


def test_a_choice_from_a_recipe(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(job, choose="max-retain-increase=20", stream=True, rules="tv,grad", alphas="4", lams="1,50,100")
    assert cli.main(["recipe", "check", str(path)]) == 0
    assert cli.main(["unlearn", "--recipe", str(path), "--quiet"]) == 0
    expected = run(job, rules=["tv", "grad"], alphas=4, stream=True, out=tmp_path / "python")
    assert outcome(Report.load(tmp_path / "out")) == outcome(expected)
    capsys.readouterr()
    assert cli.main(["unlearn", "--recipe", str(path), "--lam", "2", "--out", str(tmp_path / "other"), "--quiet"]) == 2
    assert "add --choose BOUND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choose": "most"}, "run.yaml, line 7: choose: 'most' is not a bound"),
        ({"choose": "max-retain-rise", "lam": 1}, "run.yaml, line 7: choose cannot stand beside lam"),
        ({"choose": "max-retain-rise", "link-unchanged": True}, "--link-unchanged is for a run with one setting"),
        ({"lam": 1, "alphas": "1,2"}, "--alphas is for a choice among settings"),
    ],
)
def test_bad_recipes(settings: dict[str, Any], message: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "check", str(recipe(job, **settings))]) == 2
    assert message in capsys.readouterr().err
