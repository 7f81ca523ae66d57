"""The page of a small real run: every section, nothing private, nothing that could run, bad input refused."""

import base64
import html
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import choose, cli, sweep, unlearn
from perta_fast.records.check import outcomes
from perta_fast.records.report import Report
from perta_fast.reporting.answers import answer_prompts, read_prompts
from perta_fast.reporting.evidence import distinct
from perta_fast.reporting.html import templates
from perta_fast.reporting.measured import number
from perta_fast.reporting.page import Evidence, _measured, compose
from perta_fast.reporting.verified import not_asked
from perta_fast.reporting.weight_distribution import distribution
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping import plot
from tests.support.checkpoints import fingerprint
from tests.support.models import FORGET, RETAIN, Job, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = [
    "verdict",
    "choice",
    "trade-off",
    "evaluation",
    "answers",
    "run",
    "weights",
    "distribution",
    "change",
    "costs",
    "provenance",
]
HOSTILE = "model.layers.0.<script>alert(1)</script>$\\frac{\"'&.weight"
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """The text of each section, its images, and all tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.images: dict[str, list[bytes]] = {}
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        if tag == "section":
            self._section = values["id"] or ""
            self.texts[self._section] = ""
        if tag == "img":
            source = values["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.images.setdefault(self._section, []).append(base64.b64decode(source.partition(",")[2]))

    def handle_data(self, data: str) -> None:
        if self._section:
            self.texts[self._section] += data


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job whose model has a run with its importances kept, two sweeps and two evaluations beside it."""
    folder = tmp_path_factory.mktemp("reported")
    made = write_job(folder, torch.float32)
    unlearn(
        *made.checkpoints,
        made.forget,
        made.retain,
        out=folder / "out",
        save_importance=folder / "kept",
        lam=1.0,
        rule="fisher",
    )
    data = (*made.checkpoints, made.forget, made.retain)
    sweep(*data, rule="tv", lams=[1.0], out=folder / "tv", progress=False)
    sweep(
        *data,
        *(folder / "kept" / role for role in ("forget", "retain")),
        rule="fisher",
        lams=[1.0],
        out=folder / "fisher",
        progress=False,
    )
    hashes = {role: {"blake3": data["blake3"]} for role, data in Report.load(folder / "out").data.items()}
    secret = {"0": {"ground_truth": "a secret", "generation": "another secret"}}
    other = hashes | {"retain": {"blake3": "0" * 64}}
    for name, loss, data_hashes in (("gold", 6.5, hashes), ("broken", None, hashes), ("other", 6.5, other)):
        metrics = {
            "forget_loss": {"agg_value": loss, "value_by_index": secret},
            "retain_loss": {"agg_value": 0.1875, "value_by_index": {}},
        }
        content = {"format_version": 1, "metrics": metrics, "model": f"/models/{name}", "data": data_hashes}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return made


def perta(*arguments: object) -> int:
    return cli.main(["report", *map(str, arguments), "--quiet"])


def make(job: Job, page: Path, *arguments: object, run: Path | None = None) -> Page:
    assert perta(run or job.model.parent / "out", "--out", page, *arguments) == 0
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(job: Job) -> Page:
    """A page with all but answers, and its plots as files in ``plots``."""
    folder = job.model.parent
    return make(
        job,
        folder / "page.html",
        *("--sweep", folder / "tv", folder / "fisher"),
        *("--eval", folder / "gold.json", "--eval", folder / "broken.json", folder / "other.json"),
        *("--png", folder / "plots"),
    )


def test_what_was_forgotten_and_kept(job: Job, full: Page) -> None:
    check = Report.load(job.model.parent / "out").check
    assert check is not None
    for word in outcomes(check.data).values():
        assert word in full.texts["verdict"]
    for role, rows in (("forget", FORGET), ("retain", RETAIN)):
        data = check.data[role]
        assert data.after is not None and data.rows == len(rows)
        assert number(data.after.loss) in full.texts["verdict"]


def test_a_run_without_a_check(job: Job, tmp_path: Path) -> None:
    unlearn(
        *job.checkpoints,
        job.forget,
        job.retain,
        out=tmp_path / "out",
        lam=1.0,
        check=False,
        progress=False,
        rule="fisher",
    )
    assert "did not look" in make(job, tmp_path / "page.html", run=tmp_path / "out").texts["verdict"]


def test_every_section(job: Job, full: Page) -> None:
    folder, page = job.model.parent, full
    assert list(page.texts) == SECTIONS
    images = [image for section in page.images.values() for image in section]
    assert list(page.images) == ["trade-off", "weights", "distribution", "change"]
    assert all(image.startswith(PNG) for image in images)
    files = {"trade-off", "weights-by-layer", "weight-histogram", "relative-change"}
    assert {path.stem for path in (folder / "plots").iterdir()} == files
    assert sorted(path.read_bytes() for path in (folder / "plots").iterdir()) == sorted(images)
    report = Report.load(folder / "out")
    assert "fisher" in page.texts["run"]
    assert "w = I_f^p / (I_f^p + α · I_r^p)" in page.texts["run"]
    assert all(name in page.texts["costs"] for name in report.phases)
    for record in [*report.inputs.values(), report.output]:
        assert record["path"] in page.texts["provenance"]
        assert all(file["blake3"] in page.texts["provenance"] for file in record["files"].values())
    for data in report.data.values():
        assert data["blake3"] in page.texts["provenance"]
    assert "gold" in page.texts["evaluation"]
    assert "6.5" in page.texts["evaluation"]
    assert "0.1875" in page.texts["evaluation"]
    assert "gold: not drawn" not in page.texts["trade-off"]
    assert "broken: not drawn, as it has no forget_loss and retain_loss" in page.texts["trade-off"]
    assert "other: not drawn, as it was evaluated on other data" in page.texts["trade-off"]
    for name in ("tv", "fisher"):
        for row in json.loads((folder / name / "sweep.json").read_text())["rows"]:
            assert f"{row['forget_loss']:.4g}" in page.texts["trade-off"]


@pytest.mark.parametrize("metric", ["loss", "Q_A_Prob"])
def test_how_the_setting_was_chosen(
    metric: str, job: Job, full: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, in a table, and in a plot with the bound and a mark on what was chosen."""
    drawn: list[Any] = []
    trade_off = plot.trade_off
    monkeypatch.setattr(plot, "trade_off", lambda *given: (drawn.append(given), trade_off(*given))[1])
    data = (*job.checkpoints, job.forget, job.retain)
    settings: dict[str, Any] = {"rules": "fisher", "alphas": [1, 4], "lams": [1, 20, 400], "progress": False}
    choose(*data, **settings, metric=metric, target_retain_loss=1000, out=tmp_path / "out")
    choice = Report.load(tmp_path / "out").setting_choice
    assert choice is not None
    page = make(job, tmp_path / "page.html", run=tmp_path / "out")
    text = page.texts["choice"]
    first, second = choice.lines()
    assert f"{first[0].upper()}{first[1:]}." in text and f"{second[0].upper()}{second[1:]}." in text
    assert first in page.texts["run"]
    assert [image.startswith(PNG) for image in page.images["choice"]] == [True]
    assert text.count("chosen\n") == 2  # in the heading, and in one row
    for each in choice.tried:
        assert each.curve in text and f"{each.forget:.4g}" in text and f"{each.retain_loss:.4g}" in text
    curves, points, named, bound, base = drawn[-1]  # the sweep draws a plot of its own before
    assert base == choice.base_forget_loss
    assert list(curves) == ["fisher, p 2, α 1", "fisher, p 2, α 4"]
    of_chosen = [(each.lam, each.retain, each.forget) for each in choice.tried if each.curve == choice.after.curve]
    assert curves[choice.after.curve] == [(0.0, choice.before.retain, choice.before.forget), *of_chosen]
    assert points == [("chosen", (choice.after.retain, choice.after.forget))]
    assert (named, bound) == (metric, 1000 if metric == "loss" else None)
    assert ("which a plot of Q_A_Prob does not show" in text) == (metric != "loss")
    assert "It was given: λ was not searched for" in full.texts["choice"]


@pytest.mark.parametrize("changed", [None, "forget", "retain"])
def test_a_sweep_on_other_data(changed: str | None, job: Job, tmp_path: Path) -> None:
    """Further data that a sweep scores, which the report of what it has chosen names too, makes no difference."""
    more = {name: write_lines(tmp_path / f"{name}.jsonl", RETAIN[:2]) for name in ("also", "holdout")}
    out = tmp_path / "out"
    settings: dict[str, Any] = {"rules": "tv", "lams": [50], "target_retain_loss": 1000, "progress": False}
    choose(*job.checkpoints, job.forget, job.retain, **settings, **more, stream=True, out=out)
    report = Report.load(out)
    assert set(report.data) == {"forget", "retain", "also", "holdout"}
    if changed is not None:
        report.data[changed]["blake3"] = "0" * 64
        report.save(out)
    page = make(job, tmp_path / "page.html", "--sweep", tmp_path / "out.sweep", run=out)
    assert ("scored on other data than this run used" in page.texts["trade-off"]) == (changed is not None)


def test_a_hostile_choice_is_drawn_or_left_out(job: Job, tmp_path: Path) -> None:
    before = {"rule": HOSTILE, "mu": None, "p": 1, "alpha": 1, "lam": 1e300, "forget_loss": 1e300, "retain_loss": None}
    before |= {"forget": 1e300, "retain": None, "changed": -1e300}
    choice = {"bound": "<b>", "value": 1e300, "limit": 1e300, "floor": None, "metric": "loss", "select": "<script>"}
    choice |= {"streamed": True, "rows": {}, "before": before, "after": before, "tried": [before, before]}
    run = changed_report(job, tmp_path / "run", lambda content: content.update(setting_choice=choice))
    page = make(job, tmp_path / "page.html", run=run)
    assert list(page.texts) == SECTIONS and "script" not in page.tags and "b" not in page.tags
    assert HOSTILE in page.texts["choice"]


@pytest.mark.parametrize("kind", ["applied", "unlearned", "streamed", "in_place"])
def test_a_run_of_version_0_1_0(kind: str, job: Job, tmp_path: Path) -> None:
    run = Path(__file__).parents[1] / "records" / "written_by_0_1_0" / kind
    report = json.loads((run / "perta_report.json").read_text(encoding="utf-8"))
    texts = make(job, tmp_path / "page.html", run=run).texts
    assert report["rule"] in texts["run"] and report["started"] in texts["run"]
    for name, file in report["output"]["files"].items():
        assert name in texts["provenance"] and file["blake3"] in texts["provenance"]


def test_nothing_runs_and_nothing_is_loaded(job: Job, full: Page) -> None:
    assert not full.tags & {"script", "link", "iframe", "object", "a", "form"}
    assert full.attributes <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "id",
        "class",
        "scope",
        "alt",
        "src",
        "open",
    }
    assert not re.search(r"https?:|url\(|@import", (job.model.parent / "page.html").read_text())


@pytest.mark.usefixtures("full")
def test_no_text_unless_it_is_asked_for(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job.model.parent
    page = (folder / "page.html").read_text()
    texts = [text for row in FORGET + RETAIN for text in row.values()]
    assert not [text for text in [*texts, "secret"] if text in html.unescape(page)]
    assert perta(folder / "out", "--out", tmp_path / "page.html", "--prompts", job.forget) == 2
    assert "--show-text" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_answers_before_and_after(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"question": "Who is <b>she</b>?", "answer": "Nobody."}])
    answers = {str(job.model): "<i>before</i>", str(job.model.parent / "out"): "after \x00 \u202e it"}

    def answer(module: Any, *_: Any, **__: Any) -> list[str]:
        return [answers[module.config._name_or_path]]

    monkeypatch.setattr("perta_fast.models.greedy_answers.greedy_answers", answer)
    page = make(job, tmp_path / "page.html", "--prompts", prompts, "--show-text")
    expected = [
        "Who is <b>she</b>?",
        "Nobody.",
        "before\n<i>before</i>",
        "after\nafter \N{REPLACEMENT CHARACTER} \u202e it",
    ]
    places = [page.texts["verdict"].index(text) for text in expected]
    assert places == sorted(places)
    (tmp_path / "prompts.csv").write_text("q;reply\nWho is <b>she</b>?;Nobody.\n")
    named = ["--prompts", tmp_path / "prompts.csv", "--fields", "question=q,answer=reply", "--show-text"]
    shown, named_page = (each.texts["verdict"] for each in (page, make(job, tmp_path / "named.html", *named)))
    assert shown.split("Are the files")[0] == named_page.split("Are the files")[0]


def test_answers_where_the_model_of_before_is_gone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run in place."""
    monkeypatch.setattr("perta_fast.models.greedy_answers.greedy_answers", lambda *_, **__: ["this"] * len(FORGET))
    report = Report.load(job.model.parent / "out")
    report.inputs["model"]["kept"] = False
    found = answer_prompts(report, job.model.parent / "out", read_prompts(job.forget), False)
    assert (found.before, found.after) == ([], ["this"] * len(FORGET))
    assert found.questions == [row["question"] for row in FORGET]
    assert found.why is not None
    page, _ = compose(Evidence(report, Path("run"), not_asked(Path("run")), [], [], "none", found))
    assert f"(not asked: {html.escape(found.why)})" in page.decode()


def changed_report(job: Job, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((job.model.parent / "out" / "perta_report.json").read_text())
    change(content)
    folder.mkdir()
    (folder / "perta_report.json").write_text(json.dumps(content))
    return folder


def test_hostile_names_are_nothing_but_text(job: Job, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for row, name in zip(content["tensors"], (HOSTILE, "<img src=x onerror=alert(1)>", "_\ud800$"), strict=False):
            row["name"] = name
        content["inputs"]["base"]["path"] = '"><script>alert(1)</script>'
        content["inputs"]["forget_importance"]["kept"] = False
        content["overlap"] = {"<s>_hidden_seconds": 1.5}
        content["warnings"] = ["</section><script>alert(1)</script>"]

    run = changed_report(job, tmp_path / "run", change)
    page = make(job, tmp_path / "page.html", run=run)
    assert list(page.texts) == SECTIONS
    assert "script" not in page.tags
    assert "onerror" not in page.attributes
    assert "<s> hidden seconds1.5" in page.texts["costs"]
    assert "was not kept" in page.texts["distribution"]
    assert "distribution" not in page.images
    assert "<img src=x onerror=alert(1)>" in page.texts["weights"]
    assert '"><script>alert(1)</script>' in page.texts["provenance"]
    assert "</section><script>alert(1)</script>" in page.texts["verdict"]


def test_a_plain_subtraction_has_no_importances_in_its_formula(job: Job, tmp_path: Path) -> None:
    run = changed_report(job, tmp_path / "run", lambda content: content.update(rule="tv", p=1.0))
    page = make(job, tmp_path / "page.html", run=run)
    assert "θ_out = θ_full − λ · w ⊙ (θ_f − θ_0), w = 1" in page.texts["run"]
    assert "I_f^p" not in page.texts["run"]


MISSING: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "temporary": (lambda content: content["inputs"]["forget_importance"].update(kept=False), "--save-importance"),
    "gone": (lambda content: content["inputs"]["retain_importance"].update(path="/nowhere"), "is gone"),
    "changed": (
        lambda content: next(iter(content["inputs"]["retain_importance"]["files"].values())).update(blake3="0"),
        "has changed since the run",
    ),
    "not named": (lambda content: content["inputs"].pop("retain_importance"), "names no retain_importance"),
    "unlisted": (lambda content: content["inputs"]["retain_importance"].update(files={}), "was not there"),
    "tv": (lambda content: content.update(rule="tv", p=1.0), "w = 1 everywhere"),
}


@pytest.mark.parametrize("case", MISSING)
def test_why_there_is_no_histogram(case: str, job: Job, tmp_path: Path) -> None:
    change, reason = MISSING[case]
    found = distribution(Report.load(changed_report(job, tmp_path / "run", change)), progress=False)
    assert isinstance(found, str)
    assert reason in found


def damaged_sweep(**changes: Any) -> Callable[[Path, Path], list[object]]:
    def arguments(folder: Path, scratch: Path) -> list[object]:
        content = json.loads((folder / "tv" / "sweep.json").read_text())
        (scratch / "sweep.json").write_text(json.dumps(content | changes))
        return ["--sweep", folder / "tv", scratch]

    return arguments


def damaged_eval(text: str) -> Callable[[Path, Path], list[object]]:
    def arguments(_: Path, scratch: Path) -> list[object]:
        (scratch / "bad.json").write_text(text)
        return ["--eval", scratch / "bad.json"]

    return arguments


BAD: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "sweep without rows": (damaged_sweep(rows=[]), "is not a sweep that this version understands"),
    "sweep with text for a loss": (
        damaged_sweep(rows=[{"lam": 1.0, "forget_loss": "1", "retain_loss": 1.0, "changed": 0.0, "seconds": 0.0}]),
        "is not a sweep that this version understands",
    ),
    "row that is no object": (damaged_sweep(rows=[3]), "is not a sweep that this version understands"),
    "later sweep": (damaged_sweep(format_version=3), "is not a sweep that this version understands"),
    "sweep on other data": (damaged_sweep(data={}), "was scored on other data than"),
    "no sweep": (lambda _, scratch: ["--sweep", scratch], r"sweep.json: cannot be read"),
    "evaluation that is not JSON": (damaged_eval("{"), "bad.json: is not JSON"),
    "evaluation nested too deep": (damaged_eval("[" * 99999), "bad.json: is not JSON"),
    "evaluation that is a list": (damaged_eval("[]"), "bad.json: is not a file of results"),
    "evaluation without metrics": (damaged_eval('{"metrics": {}}'), "bad.json: has no metric"),
    "prompts without questions": (
        lambda _, scratch: ["--show-text", "--prompts", write_lines(scratch / "texts.jsonl", [{"text": "a"}])],
        r'texts.jsonl, line 1: has no "question"',
    ),
    "plots in a file": (lambda folder, _: ["--png", folder / "gold.json"], "gold.json: is not a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    folder, out = job.model.parent, tmp_path / "page.html"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert perta(folder / "out", "--out", out, *arguments(folder, scratch)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_a_changed_output_is_not_asked(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(job.model.parent / "out", tmp_path / "run")
    shard = next(run.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert perta(run, "--out", tmp_path / "p.html", "--prompts", job.forget, "--show-text") == 2
    assert f"{shard} has changed since the run" in capsys.readouterr().err


def test_what_may_be_written_over(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = job.model.parent / "out", tmp_path / "page.html"
    out.write_text("kept")
    assert perta(run, "--out", out) == 2
    assert out.read_text() == "kept"
    assert perta(run, "--out", run / "perta_report.json", "--overwrite") == 2
    assert "ends in .html" in capsys.readouterr().err
    assert Report.load(run).rule == "fisher"
    assert make(job, out, "--overwrite").texts
    assert list(tmp_path.iterdir()) == [out]


def test_no_input_is_replaced(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, prompts = job.model.parent / "out", tmp_path / "prompts.html"
    shutil.copyfile(job.forget, prompts)
    os.link(job.forget, tmp_path / "data.html")
    (tmp_path / "plots").mkdir()
    os.link(job.forget, tmp_path / "plots" / "trade-off.png")
    before = fingerprint(tmp_path)
    for out, more in (
        (prompts, ["--prompts", prompts, "--show-text"]),
        (tmp_path / "data.html", []),  # the run's own data, under another name
        (tmp_path / "new.html", ["--png", tmp_path / "plots"]),
    ):
        assert perta(run, "--out", out, "--overwrite", *more) == 2
        assert "is the input" in capsys.readouterr().err
        assert fingerprint(tmp_path) == before


def test_hidden_files_of_the_page_are_no_links(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = job.model.parent / "out", tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "plots").mkdir()
    for trap in (tmp_path / ".page.html.perta-partial", tmp_path / "plots" / ".weight-histogram.png.perta-partial"):
        trap.symlink_to(mine)
        before = sorted(tmp_path.rglob("*"))
        assert perta(run, "--out", tmp_path / "page.html", "--png", tmp_path / "plots") == 2
        assert f"{trap}: is a link" in capsys.readouterr().err
        assert mine.read_text() == "mine" and sorted(tmp_path.rglob("*")) == before
        trap.unlink()


def test_matplotlib_is_an_extra(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("perta_fast.reporting.figures.find_spec", lambda _: None)
    assert perta(job.model.parent / "out", "--out", tmp_path / "page.html") == 2
    assert "pip install 'perta-fast[plots]'" in capsys.readouterr().err
    assert "matplotlib" not in sys.modules


def test_files_of_one_name_are_told_apart_by_as_little_as_does_it() -> None:
    paths = [Path(path) for path in ("a/gold/run/scores.json", "a/full/run/scores.json", "b/other.json")]
    assert distinct(["scores", "scores", "other"], paths) == ["scores (gold/run)", "scores (full/run)", "other"]
    assert distinct(["scores"] * 2, [paths[0]] * 2) == ["scores (a/gold/run)"] * 2


def test_cells_break_where_they_may() -> None:
    """A narrow column keeps words whole, but for hashes, which have none."""
    table = templates().get_template("macros.html").make_module().table
    page = table("", ("metric", "hash"), [("retain_Q_A_Prob", "0" * 64), ("a_<b>", "-")])
    assert "<td>retain_<wbr>Q_<wbr>A_<wbr>Prob</td>" in page
    assert f'<td class="long">{"0" * 64}</td>' in page
    assert "<td>a_&lt;b&gt;</td>" in page


def test_skipped_strengths_have_no_numbers() -> None:
    row = ScoredSetting("tv", 1.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 0.5, 6.0)
    assert _measured(row) == (2.0, 3.0, 4.0, 50.0, 6.0)
    assert _measured(replace(row, skipped=True)) == (2.0, None, None, None, None)


def test_scores_under_stress_are_a_table_beside_the_metrics(job: Job, full: Page, tmp_path: Path) -> None:
    content = json.loads((job.model.parent / "gold.json").read_text())
    scores = {"before": {"forget": {"loss": 3.25}}, "relearn=20": {"forget": {"loss": None}, "retain": {"loss": 0.5}}}
    stress = {"rows": {}, "scores": scores, "codes": {"share": {"int4": 0.0625}}}
    (tmp_path / "stressed.json").write_text(json.dumps(content | {"stress": stress}))
    page = make(job, tmp_path / "page.html", "--eval", tmp_path / "stressed.json", job.model.parent / "gold.json")
    text = " ".join(page.texts["evaluation"].split())
    assert "Under stress" in text
    for row in ("forget loss, before3.25–", "forget loss, relearn=20––", "retain loss, relearn=200.5–"):
        assert row in text
    assert "share of codes that differ, int40.0625–" in text
    assert "Under stress" not in full.texts["evaluation"]
    for damaged in ([1], {"scores": [1]}, {"scores": {"int8": 1}}, {"scores": {"int8": {"forget": []}}, "codes": 7}):
        (tmp_path / "stressed.json").write_text(json.dumps(content | {"stress": damaged}))
        page = make(job, tmp_path / "page.html", "--eval", tmp_path / "stressed.json", "--overwrite")
        assert "Under stress" not in page.texts["evaluation"]
