"""The head of the page: it says what came of the run in words and numbers, and whether the files are those of it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import choose, cli, unlearn
from perta_fast.data.formats import hash_data
from perta_fast.records.check import CheckedData, Measured
from perta_fast.records.report import Report
from perta_fast.records.strength_choice import StrengthChoice, TriedStrength
from perta_fast.reporting import answers, figures
from perta_fast.reporting.choice import choice_of
from perta_fast.reporting.measured import Measurement, chance, meaning, measured, number
from perta_fast.reporting.verdict import Verdict, title, verdict
from perta_fast.reporting.verified import not_asked, verify_for_page
from tests.support.models import FORGET, RETAIN, Job, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")
UNKNOWN = ["Not known if forgotten", "Not known if kept"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with a finished run, ``out``, that has searched for its strength."""
    folder = tmp_path_factory.mktemp("judged")
    made = write_job(folder, torch.float32)
    data = (*made.checkpoints, made.forget, made.retain)
    unlearn(*data, out=folder / "out", rule="tv", max_retain_rise=0.02, progress=False)
    return made


@pytest.fixture
def report(job: Job) -> Report:
    return Report.load(job.model.parent / "out")


def judged(report: Report, run: str = "/runs/out", answers: Any = None) -> Verdict:
    return verdict(report, Path(run), not_asked(Path(run)), answers)


def data(before: float | None, after: float | None, exact: tuple[int, int] = (4, 4)) -> CheckedData:
    return CheckedData(5, 9, 4, Measured(before, exact[0]), Measured(after, exact[1]))


@pytest.mark.parametrize(
    ("forget", "retain", "heads", "tones"),
    [
        (data(0.1, 3.0, (4, 0)), data(0.1, 0.12), ["Forgotten", "Kept"], ["good", "good"]),
        (data(0.1, 3.0, (4, 4)), data(0.1, 2.0, (4, 0)), ["Forgotten in part", "Lost"], ["open", "bad"]),
        (data(0.1, 0.1), data(0.1, 0.1), ["Not forgotten", "Kept"], ["bad", "good"]),
        (data(0.1, None, (4, 0)), data(0.1, 0.1), ["Forgotten", "Kept"], ["good", "good"]),
        (data(None, None), data(None, None), UNKNOWN, ["open", "open"]),
        (data(None, 3.0, (4, 0)), data(None, 3.0, (4, 0)), UNKNOWN, ["open", "open"]),
    ],
)
def test_the_outcome(
    forget: CheckedData, retain: CheckedData, heads: list[str], tones: list[str], report: Report
) -> None:
    assert report.check is not None
    report.check.data = {"forget": forget, "retain": retain}
    found = judged(report)
    assert [tile.head for tile in found.tiles[:2]] == heads
    assert [tile.tone for tile in found.tiles[:2]] == tones
    assert forget.after is not None and retain.after is not None
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["rows measured"] == ("5 of 9", "5 of 9")
    assert rows["answers exact before"] == ("4 of 4", "4 of 4")
    assert rows["answers exact after"] == (f"{forget.after.exact} of 4", f"{retain.after.exact} of 4")
    assert rows["loss before"] == (number(forget.before.loss), number(retain.before.loss))
    assert rows["loss after"][0] in ("3.00", "0.10", "not finite")
    assert "5 of 9 forget rows" in found.sentences[1]


def test_a_run_that_changed_nothing(report: Report) -> None:
    found = judged(replace(report, tensors=[replace(row, changed=0) for row in report.tensors]))
    assert found.lead.startswith("Nothing was changed")
    assert (found.tiles[0].head, found.tiles[0].tone) == ("Nothing changed", "bad")


def test_warnings_are_at_the_head(report: Report) -> None:
    assert judged(replace(report, warnings=["look"])).warnings == ["look"]


def test_what_was_asked(report: Report, job: Job) -> None:
    asked = dict(judged(report).asked)
    assert asked["Model"] == str(job.model.resolve()) and asked["Result"] == "/runs/out"
    assert asked["To be forgotten"] == f"{len(FORGET)} rows of {job.forget.resolve()}"
    assert asked["To be kept"] == f"{len(RETAIN)} rows of {job.retain.resolve()}"
    assert "rises by at most 0.02" in asked["Strength"] and f"{report.lam:.6g}" in asked["Strength"]
    times = {"started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T11:02:03+00:00", "resumed": 2}
    timed = dict(judged(replace(report, in_place=True, **times)).asked)  # type: ignore[arg-type]
    assert timed["Run"].startswith("2026-01-01 10:00:00 UTC to 2026-01-01 11:02:03 UTC (1 h 2 min 3 s), stopped and")
    assert timed["Result"] == "the model itself, changed in place"
    bare = dict(judged(replace(report, data={}, started="once", finished="twice", choice=None)).asked)
    assert bare["To be kept"] == "no data was named" and "given" in bare["Strength"]
    assert bare["Run"].startswith("once to twice;")
    report.data["forget"]["path"] = ""
    given = judged(report)
    assert f"forget the {len(FORGET)} rows given in Python and keep the" in given.lead
    assert dict(given.asked)["To be forgotten"] == f"{len(FORGET)} rows given in Python"


def test_numbers_of_the_choice_stand_in_for_the_check(report: Report) -> None:
    report.check = None
    found = measured(report)
    assert isinstance(found, Measurement) and report.choice is not None
    assert found.data["forget"].before.loss == report.choice.before.forget_loss
    after = found.data["retain"].after
    assert after is not None and after.loss == report.choice.after.retain_loss
    assert (
        found.how == "Measured when the strength was chosen, with the model in memory. Exact answers were not counted."
    )
    assert [row[0] for row in judged(report).rows if "exact" in row[0]] == []
    report.choice = None
    assert "did not look" in str(measured(report))
    assert [tile.head for tile in judged(report).tiles[:2]] == ["Not measured"] * 2


def test_what_a_loss_means() -> None:
    assert [chance(loss).replace("\N{NO-BREAK SPACE}", " ") for loss in (0.0, 0.08, 4.62, 20.0, None)] == [
        "100 %",
        "92 %",
        "0.99 %",
        "under 0.001 %",
        "–",
    ]
    said = meaning(Measurement({"forget": data(0.08, 4.62)}, "")).replace("\N{NO-BREAK SPACE}", " ")
    assert "it was 0.08" in said and "a chance of 92 %" in said and "4.62: a chance of 0.99 %" in said
    assert "chance" not in meaning(Measurement({"forget": data(0.08, None)}, ""))


def test_the_name_of_a_model_of_the_hub(report: Report) -> None:
    report.inputs["model"]["path"] = "/cache/models--org--name/snapshots/0123"
    assert title(report) == "Unlearning report: org/name"


# Whether the files are those of the run.


def test_verified(job: Job, tmp_path: Path) -> None:
    run = shutil.copytree(job.model.parent / "out", tmp_path / "run")
    found = verify_for_page(run, False)
    assert (found.head, found.tone, found.problems) == ("Verified", "good", [])
    assert "computed again from the inputs, agreed bit for bit" in found.sentences[0]
    assert "When this page was made, on 20" in found.sentences[0]
    shard = next(run.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = verify_for_page(run, False)
    assert (found.head, found.tone) == ("Not as the run left it", "bad")
    assert found.problems == [f"{shard} has changed since the run."]
    assert len(found.sentences) == 1  # the list of hashes is no evidence of these files


def test_without_what_it_was_made_from(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "out", rule="tv", lam=1.0, progress=False)
    shutil.rmtree(job.tuned)
    found = verify_for_page(tmp_path / "out", False)
    assert (found.head, found.tone) == ("Hashes agree", "good")
    assert any("tuned" in line for line in found.limits)


def test_what_no_run_has_written(tmp_path: Path, report: Report) -> None:
    del report.inputs["base"]
    report.save(tmp_path)
    found = verify_for_page(tmp_path, False)
    assert (found.head, found.tone) == ("Not verified", "bad") and "names no base" in found.sentences[0]


def page(run: Path, out: Path, *arguments: object) -> str:
    assert cli.main(["report", str(run), "--out", str(out), "--quiet", *map(str, arguments)]) == 0
    return out.read_text(encoding="utf-8")


def test_no_file_is_read_if_nobody_wants_it(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perta_fast.reporting.run.verify_for_page", lambda *_: pytest.fail("was called"))
    assert "Not verified" in page(job.model.parent / "out", tmp_path / "page.html", "--no-verify")


# Answers.


def test_answers_to_rows_of_the_run(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions to forget and one to keep, with what the data says."""
    said = {str(job.model): "before", str(job.model.parent / "out"): "word " * 100}
    monkeypatch.setattr(
        "perta_fast.models.greedy_answers.greedy_answers",
        lambda module, _, asked, **__: [said[module.config._name_or_path]] * len(asked),
    )
    text = page(job.model.parent / "out", tmp_path / "page.html", "--show-text")
    head, rest = text.split('<section id="choice">')
    for row in (FORGET[0], FORGET[2], RETAIN[0]):
        assert row["question"] in head and row["answer"] in head
    assert head.count("To be forgotten: Who wrote") == 2 and head.count("To be kept: Where is") == 1
    assert "[…]" in head and "[…]" not in rest and "word " * 100 in rest
    assert " open>" not in text  # what was cut does not lengthen the print
    lines = [{"question": f"Who is {number}?", "answer": "Nobody."} for number in range(5)]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    more = page(job.model.parent / "out", tmp_path / "more.html", "--show-text", "--prompts", prompts)
    assert more.count(" open>") == 1 and "Who is 4?" in more.split(" open>")[1]


def test_why_no_answers_are_shown(job: Job, tmp_path: Path, report: Report) -> None:
    run = job.model.parent / "out"
    assert f"perta report {run} --show-text" in page(run, tmp_path / "page.html")
    report.data["forget"]["blake3"] = "0" * 64
    assert "has changed since the run began" in str(answers.answer_own(report, run, False))
    report.data = {}
    assert "has no questions; give some with prompts" in str(answers.answer_own(report, run, False))
    shown = judged(report, answers="this is why")
    assert shown.no_answers == "Not shown: this is why." and not shown.command


# The curve, and paper.


def test_the_curve_has_the_limit_and_the_choice(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    choice, shown = report.choice, choice_of(report)
    assert choice is not None and shown is not None and choice.before.retain_loss is not None
    forget, retain = drawn[0].axes
    lines = {line.get_label(): line for line in retain.get_lines()}
    assert next(iter(lines["limit"].get_ydata())) == pytest.approx(choice.before.retain_loss + 0.02)
    assert list(lines["tried"].get_xdata()) == sorted(each.lam for each in choice.tried)
    star = lines[f"chosen: λ = {choice.after.lam:.4g}"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([choice.after.lam], [choice.after.retain_loss])
    assert "limit" not in {line.get_label() for line in forget.get_lines()}
    assert [row[-1] for row in shown.rows].count("chosen") == 1
    assert [row[0] for row in shown.rows] == sorted(row[0] for row in shown.rows)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("retain", "bound"),
    [
        ([2.0, 1.9, 1.85, 9.0], 0.05),  # it falls by three times the allowed rise
        ([2.0, 2.6, 1.9, 9.0], 0.05),  # the first strength breaks the bound
        ([2.0, 1.5, 1.6, 9.0], 0.0),
        ([2.0, 2.0, 2.0, 9.0], 0.0),
        ([2.0, 1.99, 2.04, 9.0], 0.05),
    ],
)
def test_the_curve_shows_all_strengths_up_to_the_chosen(
    retain: list[float], bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    before, *tried = (TriedStrength(float(lam), 1.0, loss) for lam, loss in enumerate(retain))
    figures.strength_choice(StrengthChoice(bound, "loss", {}, {}, before, tried[1], tried))
    low, high = drawn[0].axes[1].get_ylim()
    assert all(low < loss < high for loss in (*retain[:3], 2.0 + bound))
    assert 1e-3 < high - low < 3 and high < 9.0


@pytest.mark.parametrize("loss", [None, 1e300, float("nan")])
@pytest.mark.parametrize("lam", [0.0, -1e300, 1e300])
def test_a_hostile_choice_of_strength_is_drawn_or_left_out(loss: float | None, lam: float, report: Report) -> None:
    odd, plain = TriedStrength(lam, loss, loss), TriedStrength(1.0, 1.0, 1.0)
    for before, after in ((odd, plain), (plain, odd), (odd, odd)):
        tried = [odd, plain, TriedStrength(100.0, 1.0, 1.0)]
        report.choice = StrengthChoice(1e300, "<b>", {}, {}, before, after, tried)
        shown = choice_of(report)
        assert shown is not None and shown.plot.png.startswith(b"\x89PNG")
        report.check = None
        assert judged(report).lead


def test_only_what_was_asked_for_is_unfolded(job: Job, tmp_path: Path) -> None:
    """So that the page prints on two sheets."""
    data = (*job.checkpoints, job.forget, job.retain)
    settings: dict[str, Any] = {"rules": "tv", "lams": [1, 50, 400], "target_retain_loss": 1000, "progress": False}
    choose(*data, out=tmp_path / "out", **settings)
    plain = page(tmp_path / "out", tmp_path / "plain.html", "--no-verify")
    assert plain.count("<details") == 10 and " open>" not in plain
    assert plain.index('id="verdict"') < plain.index('id="choice"') < plain.index("<details class")
    swept = page(tmp_path / "out", tmp_path / "swept.html", "--no-verify", "--sweep", tmp_path / "out.sweep")
    assert swept.count(" open>") == 1 and '<details class="fold" open><summary><h2>Trade-off' in swept


def test_rows_of_text_have_no_question(tmp_path: Path, report: Report) -> None:
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    report.data = {"forget": report.data["forget"] | {"path": str(path), "blake3": hash_data(path)}}
    assert "has no questions" in str(answers.answer_own(report, tmp_path, False))
