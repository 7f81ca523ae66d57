"""How records show themselves: a line when they are printed, escaped HTML in a notebook."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import perta_fast as pf
from perta_fast.evaluation.results import Evaluation, Metric
from perta_fast.records.check import Check, CheckedData, Measured
from perta_fast.records.notebook import Shown, number
from perta_fast.records.report import Report, TensorReport
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.results import Sweep

NASTY = "<script>alert(1)</script>\x1b[31m"


class Texts(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report() -> Report:
    tensors = [TensorReport("a", "F32", [2, 5], "subtracted", changed=4), TensorReport("b", "F32", [10], "copied")]
    check = Check(
        {
            "forget": CheckedData(24, 40, 24, Measured(0.08, 20), Measured(4.62, 1)),
            "retain": CheckedData(24, 90, 0, Measured(0.07, 0), Measured(None, 0)),
        },
        {},
        {},
        "",
        "perta eval",
    )
    output = {"path": f"/tmp/{NASTY}", "files": {}}
    return Report(
        "tv", 4.0, 1.0, 1.0, None, {}, tensors=tensors, check=check, output=output, warnings=[f"mind {NASTY}"]
    )  # type: ignore[arg-type]


def setting(lam: float, forget: float, retain: float, rule: str = "tv") -> ScoredSetting:
    return ScoredSetting(rule, 1.0, 1.0, lam, forget, retain, forget, retain, 0.25, 1.0)


def a_sweep(*notes: str) -> Sweep:
    rows = [setting(0, 0.1, 0.1, ""), setting(1, 2.0, 0.12), setting(4, 5.0, math.nan)]
    return Sweep(
        [*rows, replace(setting(8, 0, 0), skipped=True)], "loss", 0.15, None, "best-forget", {}, {}, {}, notes=[*notes]
    )


def test_a_report_prints_as_one_line() -> None:
    shown = str(report())
    assert shown == repr(report())
    assert shown.startswith("<Report: rule tv, lambda 4, 20.0% of the elements changed, /tmp/<script>")
    assert shown.isprintable()


def test_a_report_in_a_notebook() -> None:
    page = Texts(report()._repr_html_())
    assert set(page.tags) <= {"div", "strong", "br", "table", "thead", "tbody", "tr", "th", "td"}
    text = " ".join(page.texts)
    assert text.startswith("Forgotten: the loss on the forget rows rose from 0.08 to 4.62")
    for cells in (["forget, 24 of 40", "0.08", "4.62", "20", "1", "24"], ["retain, 24 of 90", "0.07", "not finite"]):
        at = page.texts.index(cells[0])
        assert page.texts[at : at + len(cells)] == cells
    assert "warning: mind <script>alert(1)</script>\\x1b[31m" in text.replace("warning:  ", "warning: ")


def test_a_report_of_what_was_not_measured() -> None:
    page = Texts(replace(report(), check=None)._repr_html_())
    assert page.texts[0] == "What was forgotten and kept was not measured."
    assert "table" not in page.tags


def test_a_sweep() -> None:
    sweep = a_sweep("read so", f"warning: {NASTY}")
    assert str(sweep) == "<Sweep: 3 settings on 1 curve, chosen: tv, lambda 1>"
    page = sweep._repr_html_()
    shown = Texts(page)
    assert shown.tags.count("tr") == 5
    at = shown.texts.index("tv", shown.texts.index("changed"))
    assert shown.texts[at : at + 5] == ["tv", "1", "2", "0.12", "25.0%"]
    assert "<strong>0.12</strong>" in page and "<strong>5</strong>" not in page  # what was chosen stands out
    assert "–" in shown.texts and "skipped" in shown.texts and "read so" in " ".join(shown.texts)
    assert "<script>" not in page


def test_an_evaluation() -> None:
    found = Evaluation(
        {"forget_loss": Metric(4.5, [{}, {}]), "b": Metric(math.nan), "c": Metric(1), "d": Metric(1)}, NASTY
    )
    assert str(found).endswith(": forget_loss 4.5, b nan, c 1 and 1 more>")
    page = Texts(found._repr_html_())
    assert "script" not in page.tags
    assert page.texts[4:10] == ["forget_loss", "4.5", "2", "b", "–", "–"]


def test_an_importance(tmp_path: Path) -> None:
    from tests.support.models import draw_samples, llama

    found = pf.estimate_importance(llama(), draw_samples(3), progress=False)
    assert repr(found) == "<Importance: estimator grad, 3 rows, 21 tensors, taken at live module, in memory>"
    ratio = pf.ImportanceRatio.of(found, found)
    assert repr(ratio).startswith("<ImportanceRatio: estimator grad, 3 forget and 3 retain rows, 21 tensors, in memory")


def test_a_long_table_is_cut() -> None:
    page = Shown("t", ("n",), [[str(k)] for k in range(500)]).as_html()
    assert page.count("<tr>") == 201
    assert "and 300 more" in page


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (math.nan, "–"), (0.12345, "0.1235"), (math.inf, "inf")])
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown
