"""``unlearn`` from the importance of all rows: the result is that of the retain rows, which are not run."""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import (
    Importance,
    InputError,
    Interrupted,
    Report,
    RunError,
    cli,
    estimate_importance,
    merge_importances,
    resume,
    unlearn,
    verify,
)
from perta_fast.data import chat
from perta_fast.importance.combining import Combination
from perta_fast.records.recipe import read_recipe
from perta_fast.runs import estimate
from perta_fast.streaming.write_behind import WriteBehind
from perta_fast.subtraction import report_entries, to_directory
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import FORGET, RETAIN, Job, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, Any] = {"grad": "grad", "fisher": "grad", "empirical-fisher": "empirical-fisher"}
ROWS = FORGET + RETAIN


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job in float32, with a file of all rows, ``whole.jsonl``, and of two requests."""
    folder = tmp_path_factory.mktemp("exact")
    job = write_job(folder, torch.float32)
    write_lines(folder / "whole.jsonl", ROWS)
    write_lines(folder / "first.jsonl", FORGET[:2])
    write_lines(folder / "second.jsonl", FORGET[2:])
    return job


@pytest.fixture(scope="module")
def wholes(exact: Job) -> Callable[[str], Path]:
    """The importance of all rows, by estimator; made once, and read-only."""
    places = exact.base.parent

    def of(estimator: str) -> Path:
        out = places / f"whole {estimator}"
        if not out.exists():
            estimate_importance(exact.base, places / "whole.jsonl", estimator, out=out, progress=False)  # type: ignore[arg-type]
        return out

    return of


def run(job: Job, out: Path | None, **settings: Any) -> Report:
    given = {"forget": job.forget, "lam": 1.0, "check": False, "rule": "fisher"} | settings
    return unlearn(*job.checkpoints, out=out, progress=False, **given)


def assert_close(found: Path, expected: Path) -> None:
    first, second = read_checkpoint(found), read_checkpoint(expected)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert float((first[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


# What comes out.


@pytest.mark.parametrize("way", ["in memory", "streamed", "in place", "in place, streamed"])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_as_with_the_retain_rows(
    rule: str, way: str, exact: Job, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = wholes(RULES[rule])
    before = fingerprint(whole)
    run(exact, tmp_path / "expected", retain=exact.retain, rule=rule)
    out: Path | None = tmp_path / "out"
    settings: dict[str, Any] = {"rule": rule, "whole_importance": whole, "stream": "streamed" in way}
    if "in place" in way:
        shutil.copytree(exact.model, tmp_path / "out")
        unlearn(
            tmp_path / "out",
            *exact.checkpoints[1:],
            exact.forget,
            in_place=True,
            lam=1.0,
            check=False,
            progress=False,
            **settings,
        )
    else:
        run(exact, out, **settings)
    assert_close(tmp_path / "out", tmp_path / "expected")
    assert fingerprint(whole) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_a_live_importance_is_taken_too(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    run(exact, tmp_path / "one", whole_importance=wholes("grad"))
    run(exact, tmp_path / "other", whole_importance=Importance.load(wholes("grad")))
    assert_close(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_rows_to_forget_are_run(
    stream: bool, exact: Job, wholes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = estimate.Estimation.describe

    def noted(how: estimate.Estimation, samples: Any, *rest: Any) -> Any:
        seen.append(len(samples))
        return original(how, samples, *rest)

    monkeypatch.setattr(estimate.Estimation, "describe", noted)
    run(exact, tmp_path / "out", whole_importance=wholes("grad"), stream=stream, retain=exact.retain)
    assert seen == [len(FORGET)]


def test_two_requests_one_after_the_other(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    """The second starts from the result, and from what remains of the importance."""
    places = exact.base.parent
    first = replace(exact, forget=places / "first.jsonl")
    whole, by_rule = wholes("empirical-fisher"), {"rule": "empirical-fisher"}
    run(first, tmp_path / "1", whole_importance=whole, save_importance=tmp_path / "kept 1", **by_rule)
    second = replace(exact, model=tmp_path / "1", forget=places / "second.jsonl")
    remaining = tmp_path / "kept 1" / "retain"
    kept = tmp_path / "kept 2"
    report = run(second, tmp_path / "2", whole_importance=remaining, save_importance=kept, **by_rule)
    expected = estimate_importance(exact.base, exact.retain, "empirical-fisher", progress=False)
    found = Importance.load(kept / "retain")
    for name, tensor in expected.tensors.items():
        assert float((found.tensors[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    assert found.metadata.rows_hash == expected.metadata.rows_hash
    assert report.removal is not None
    assert (report.removal.rows, report.removal.removed) == (len(ROWS) - 2, len(FORGET) - 2)
    with pytest.raises(InputError, match=r"2 of the 2 rows to forget are not among its rows .*removed before"):
        run(first, tmp_path / "again", whole_importance=remaining, **by_rule)
    assert not verify(tmp_path / "2", full=True, progress=False).problems


def test_a_model_in_bfloat16(job: Job, tmp_path: Path) -> None:
    """Its gradients are rounded, so squares that cancel may be a little negative; that is no reason to refuse."""
    data = write_lines(tmp_path / "whole.jsonl", ROWS)
    for estimator in ("grad", "empirical-fisher"):
        whole = estimate_importance(job.base, data, estimator, out=tmp_path / estimator, batch_size=5, progress=False)  # type: ignore[arg-type]
        rule = "fisher" if estimator == "grad" else estimator
        report = run(job, tmp_path / f"out {estimator}", whole_importance=whole, rule=rule, batch_size=2)
        assert report.counts == {"subtracted": len(whole.tensors)}


def test_the_search_and_the_check_take_the_retain_rows(
    exact: Job, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {"lam": None, "max_retain_rise": 0.5, "retain": exact.retain, "check": True}
    report = run(exact, tmp_path / "out", whole_importance=wholes("grad"), **settings)
    assert report.choice is not None and report.check is not None
    assert report.check.data["retain"].rows == len(RETAIN)
    assert report.data["retain"]["samples"] == len(RETAIN)
    assert report.settings["estimator"] == "grad"
    with pytest.raises(InputError, match="choosing lam needs retain data"):
        run(exact, tmp_path / "more", whole_importance=wholes("grad"), lam=None)


# Prompts.

TEMPLATE = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ date_string + '\n' }}{% for m in messages %}{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("date_string", [None, "April 10, 2025"])
def test_the_prompts_are_those_that_the_whole_had(
    date_string: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request comes on another day, and the template asks for the date."""
    job = write_job(tmp_path, torch.float32)
    for path in job.checkpoints:
        tokenizer(TEMPLATE).save_pretrained(path)
    data = write_lines(tmp_path / "whole.jsonl", ROWS)
    told = {"system_prompt": "Be brief.", "date_string": date_string}
    monkeypatch.setattr(chat, "_clock", lambda: datetime.datetime(2026, 3, 2))
    whole = estimate_importance(job.base, data, out=tmp_path / "whole", progress=False, **told)  # type: ignore[arg-type]
    run(job, tmp_path / "expected", retain=job.retain, **told)
    monkeypatch.setattr(chat, "_clock", lambda: datetime.datetime(2026, 5, 9))
    report = run(job, tmp_path / "out", whole_importance=whole)
    assert_close(tmp_path / "out", tmp_path / "expected")
    for record in report.importance.values():
        assert (record["system_prompt"], record["date"]) == ("Be brief.", date_string or "02 Mar 2026")
    recipe = read_recipe(tmp_path / "out" / "perta_report.json").settings
    assert recipe["date-string"].value == (date_string or "02 Mar 2026")
    arguments = ["unlearn", "--recipe", str(tmp_path / "out" / "perta_report.json"), "--out", str(tmp_path / "again")]
    assert cli.main(arguments) == 0
    assert_close(tmp_path / "again", tmp_path / "expected")
    with pytest.raises(InputError, match=r"had the system prompt 'Be brief\.', not 'Be long\.'; leave system_prompt"):
        run(job, tmp_path / "more", whole_importance=whole, system_prompt="Be long.")
    with pytest.raises(InputError, match=r"its prompts had the date .* not 2026-05-09; leave date_string out"):
        run(job, tmp_path / "more", whole_importance=whole, date_string="2026-05-09")


# What is reported.


def test_the_report(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    whole = wholes("grad")
    report = run(exact, tmp_path / "out", whole_importance=whole, save_importance=tmp_path / "kept")
    assert Report.load(tmp_path / "out") == report
    assert report.removal is not None
    assert (report.removal.whole, report.removal.rows, report.removal.removed) == (str(whole), len(ROWS), len(FORGET))
    assert set(report.inputs["whole_importance"]["files"]) == {path.name for path in whole.iterdir()}
    assert report.data.keys() == {"forget"}
    assert report.importance["retain_importance"]["sample_count"] == len(RETAIN)
    assert report.importance["retain_importance"]["combined"].startswith(f"{len(ROWS)} rows of ")
    assert report.recipe["whole-importance"] == str(whole)
    assert f"retain importance: {len(RETAIN)} rows, the {len(ROWS)} of {whole} without the {len(FORGET)}" in (
        report.summary()
    )
    assert list(report.phases)[:3] == ["load", "forget importance", "retain importance"]
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert f"without the {len(FORGET)} to forget" in (tmp_path / "page.html").read_text(encoding="utf-8")
    result = verify(tmp_path / "out", full=True, progress=False)
    assert not result.problems


def test_verify_sees_a_whole_that_has_changed(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    whole = Path(shutil.copytree(wholes("grad"), tmp_path / "whole"))
    run(exact, tmp_path / "out", whole_importance=whole)
    with (whole / "importance_rows.b3").open("a") as file:
        file.write("\n")
    assert verify(tmp_path / "out", progress=False).problems == [
        f"{whole / 'importance_rows.b3'} has changed since the run"
    ]
    shutil.rmtree(whole)
    result = verify(tmp_path / "out", progress=False)
    assert not result.problems
    assert any(line.startswith("whole_importance: ") for line in result.unchecked)


# What is refused, before the first gradient.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rule": "preconditioned"}, "rule preconditioned, which is the default, takes no importance; leave whole_"),
        ({"rule": "tv"}, "rule tv takes no importance; leave whole_importance out, or give one of: grad, fisher"),
        ({"rule": "empirical-fisher"}, "holds estimator grad, rule empirical-fisher needs empirical-fisher"),
        ({"forget": None}, "rule fisher needs forget data"),
        ({"at": "model"}, r"had other weights than .*model, where this run takes its gradients \(at model\)"),
        ({"dtype": torch.bfloat16}, "this run would take its gradients in bfloat16; run it with dtype float32"),
        ({"forget": "other.jsonl"}, r"1 of the 2 rows to forget are not among its rows \(.*other\.jsonl, line 2\)"),
        ({"forget": "twice.jsonl"}, r"1 of the 2 rows to forget are not among its rows \(.*twice\.jsonl, line 2\)"),
        ({"max_length": 32}, "5 of the 5 rows to forget are not among its rows"),
        ({"forget": "whole.jsonl"}, "has no other rows than those to forget, so there is nothing to retain"),
        ({"retain": "request.jsonl", "forget": "request.jsonl"}, "line 1: this and all other rows of retain are to be"),
        ({"retain": "reordered.jsonl"}, r"reordered\.jsonl, line 1: this and all other rows of retain are to be"),
        ({"whole_importance": "absent"}, "absent: no such directory"),
        ({"whole_importance": "old"}, "old: does not know its rows, as it is of an earlier version"),
        ({"out": "whole"}, "whole: is or contains"),
        ({"save_importance": "whole", "overwrite": True}, "whole: is or contains"),
    ],
)
def test_refusals(
    settings: dict[str, Any],
    reason: str,
    exact: Job,
    wholes: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(wholes("grad"), tmp_path / "whole")
    shutil.copytree(wholes("grad"), tmp_path / "old")
    importance = Importance.load(tmp_path / "old")
    for path in (tmp_path / "old").iterdir():
        path.unlink()
    Importance({"a": torch.ones(3)}, replace(importance.metadata, rows_hash="")).save(tmp_path / "old", overwrite=True)
    write_lines(tmp_path / "other.jsonl", [FORGET[0], {"question": "Who?", "answer": "No one."}])
    write_lines(tmp_path / "twice.jsonl", [FORGET[0], FORGET[0]])
    write_lines(tmp_path / "whole.jsonl", ROWS)
    write_lines(tmp_path / "request.jsonl", FORGET)
    write_lines(tmp_path / "reordered.jsonl", [*FORGET[:0:-1], FORGET[2]])
    before = fingerprint(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "accumulate", None)
    with pytest.raises(InputError, match=reason):
        run(exact, **{"out": Path("out"), "whole_importance": "whole"} | settings)
    assert fingerprint(tmp_path) == before
    assert not (tmp_path / "out").exists()


# What is left behind.


def fail(*arguments: Any, **settings: Any) -> Any:
    raise OSError(28, "No space left on device")


def interrupt(*arguments: Any, **settings: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [fail, interrupt])
@pytest.mark.parametrize("stage", ["removing", "shards", "hashes"])
def test_failure_at_any_stage(
    stage: str,
    action: Callable[..., Any],
    exact: Job,
    wholes: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is seen; once shards are done, the run is resumed."""
    whole, before = wholes("grad"), fingerprint(exact.base.parent)
    if stage == "removing":
        monkeypatch.setattr(Combination, "write", action)
    elif stage == "shards":
        monkeypatch.setattr(to_directory, "write_fully", action)
    else:
        monkeypatch.setattr(report_entries, "hash_files", action)
    with pytest.raises(KeyboardInterrupt if action is interrupt else RunError):
        run(exact, tmp_path / "out", whole_importance=whole)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    if stage == "hashes":
        report = resume(tmp_path / "out")
        assert report.removal is not None and report.inputs["whole_importance"]["files"]
        run(exact, tmp_path / "again", whole_importance=whole)
        assert_close(tmp_path / "out", tmp_path / "again")
    else:
        assert list(tmp_path.iterdir()) == []
    assert fingerprint(exact.base.parent) == before


# The command.


def test_by_command(
    exact: Job, wholes: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = [word for name in ("model", "base", "tuned") for word in (f"--{name}", str(getattr(exact, name)))]
    asked = ["unlearn", *three, "--forget", str(exact.forget), "--whole-importance", str(wholes("grad"))]
    asked += ["--rule", "grad", "--lam", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--stream", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the forget importance:\ndata: 5 forget samples of ")
    assert "\nthen the retain importance (" in text and "the retain importance:" not in text
    assert not (tmp_path / "out").exists()
    assert cli.main([*asked, "--rule", "preconditioned", "--stream", "--dry-run"]) == 2
    assert "rule preconditioned, which is the default, takes no importance" in capsys.readouterr().err
    assert cli.main([*asked, "--stream", "--memory", "2GiB"]) == 0
    assert "retain importance: 7 rows, the 12 of" in capsys.readouterr().out
    run(exact, tmp_path / "expected", retain=exact.retain, rule="grad")
    assert_close(tmp_path / "out", tmp_path / "expected")


def test_on_two_ranks(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    """The forget rows are dealt among them; the first one takes them out of the whole."""
    whole = wholes("grad")
    three = [word for name in ("model", "base", "tuned") for word in (f"--{name}", getattr(exact, name))]
    asked = ["unlearn", *three, "--forget", exact.forget, "--whole-importance", whole, "--rule", "grad", "--lam", "1"]
    ended = perta_on_ranks(2, *asked, "--out", tmp_path / "out", "--save-importance", tmp_path / "kept")
    assert [rank.status for rank in ended] == [0, 0], ended
    run(exact, tmp_path / "expected", retain=exact.retain, rule="grad")
    assert_close(tmp_path / "out", tmp_path / "expected")
    assert json.loads((tmp_path / "out" / "perta_report.json").read_text())["removal"]["removed"] == len(FORGET)
    rows = (tmp_path / "kept" / "forget" / "importance_rows.b3").read_text().splitlines()
    assert len(rows) == len(FORGET)
    forget = tmp_path / "kept" / "forget"
    combined = perta_on_ranks(2, "importance", "--whole", whole, "--remove", forget, "--out", tmp_path / "rest")
    assert [rank.status for rank in combined] == [2, 2]
    assert "--whole is done by one process; start it without torchrun" in combined[0].errors


@pytest.mark.parametrize("way", ["in memory", "streamed", "streamed, stopped and resumed"])
def test_what_a_run_keeps_can_be_added_up(
    way: str, exact: Job, wholes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"retain": exact.retain, "save_importance": tmp_path / "kept", "stream": "streamed" in way}
    if "stopped" in way:
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(WriteBehind, "end_step", stop_at(4, WriteBehind.end_step))
            run(exact, tmp_path / "out", **settings)
        resume(tmp_path / "out")
    else:
        run(exact, tmp_path / "out", **settings)
    kept = [tmp_path / "kept" / role for role in ("forget", "retain")]
    merged = merge_importances(kept, tmp_path / "merged", progress=False)
    whole = Importance.load(wholes("grad"))
    assert merged.metadata.rows_hash == whole.metadata.rows_hash
    assert merged.metadata.weights_hash == whole.metadata.weights_hash
    for name, tensor in whole.tensors.items():
        assert float((merged.tensors[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


def stop_at(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Interrupts the call of this number."""
    calls: list[int] = []

    def called(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    return called


def test_the_ratio_alone_may_be_kept(exact: Job, wholes: Callable[[str], Path], tmp_path: Path) -> None:
    settings = {"whole_importance": wholes("grad"), "importance_dtype": "float32"}
    run(exact, tmp_path / "by pair", **settings, save_importance=tmp_path / "pair")
    run(exact, tmp_path / "by ratio", **settings, save_importance=tmp_path / "ratio", save_as="ratio")
    assert_close(tmp_path / "by ratio", tmp_path / "by pair")
    for place in ("by pair", "by ratio"):
        assert not verify(tmp_path / place, progress=False).problems
    assert not list(tmp_path.glob(".*"))


def test_a_pair_that_the_next_request_needs_is_not_rounded(
    exact: Job, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {"whole_importance": wholes("grad"), "importance_dtype": "bfloat16"}
    with pytest.raises(InputError, match=r"importance_dtype bfloat16: the next request .* must be exact"):
        run(exact, tmp_path / "out", **settings, save_importance=tmp_path / "pair")
    run(exact, tmp_path / "out", **settings, save_importance=tmp_path / "ratio", save_as="ratio")
