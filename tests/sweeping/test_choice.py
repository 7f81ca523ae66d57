"""Which settings a sweep tries, what it says of them, which it chooses, and the checkpoint of that one."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from perta_fast import InputError, RunError, Sweep, apply, cli, estimate_importance, sweep, verify
from perta_fast.records.report import Report
from perta_fast.reporting.evidence import read_curves
from perta_fast.scoring.live_model import LiveModel
from perta_fast.scoring.search import CLOSER, LARGEST, SMALLEST, closer, search
from perta_fast.scoring.setting import Limits, ScoredSetting
from perta_fast.sweeping.grid import curves_of, measure_rising
from perta_fast.sweeping.results import as_notes
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import Job, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def row(lam: float, forget: float, retain: float, rule: str = "tv", /, **changes: Any) -> ScoredSetting:
    """One whose metric is the loss."""
    made = ScoredSetting(rule, 1.0, 1.0, lam, forget, retain, forget, retain, 0.5, 0.0)
    return replace(made, **changes)


ORIGINAL = row(0.0, 1.0, 0.0, "")


def table(*rows: ScoredSetting, **fields: Any) -> Sweep:
    """With the model as it is."""
    chosen: dict[str, Any] = {"metric": "loss", "limit": None, "floor": None, "select": None}
    return Sweep(rows=[ORIGINAL, *rows], settings={}, inputs={}, data={}, **chosen | fields)


def run(job: Job, *importances: Path, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, *importances, progress=False, **chosen)


# What is chosen.


def test_what_lies_beyond_a_broken_strength_is_not_chosen() -> None:
    """A live sweep skips it; a streamed one, which scores all at once, chooses the same."""
    first, broken = row(1.0, 2.0, 0.1), row(2.0, 3.0, 0.9)
    other = row(4.0, 2.5, 0.1, "fisher")
    beyond = row(4.0, 9.0, 0.1)
    for last in (beyond, replace(beyond, skipped=True)):
        assert table(first, broken, last, limit=0.5, select="best-forget").best == first
    assert table(first, broken, beyond, other, limit=0.5, select="best-forget").best == other
    assert table(row(-2.0, 0.5, 0.9), first, limit=0.5, select="best-forget").best == first
    assert table(broken, beyond, limit=0.5, select="best-forget").best == ORIGINAL


# What is tried.


def test_every_combination_once() -> None:
    found = curves_of(["grad", "tv", "empirical-fisher"], [None, 0.5], [1.0, 2.0], 0.25)
    combined = [(p, alpha, 0.25) for p in (1.0, 0.5) for alpha in (1.0, 2.0)]
    assert [(curve.name, *astuple(curve.rule.rescaling)) for curve in found] == [
        *(("grad", 0.0, *each) for each in combined),
        ("tv", 0.0, 1.0, 1.0, None),
        *(("empirical-fisher", 0.0, *each) for each in combined),
    ]


@given(st.dictionaries(st.integers(-20, 20).filter(bool), st.booleans(), min_size=1), st.randoms(use_true_random=False))
def test_larger_strengths_are_skipped_once_one_is_broken(kept: dict[int, bool], draw: Any) -> None:
    lams = [float(lam) for lam in kept]
    draw.shuffle(lams)
    measured: list[float] = []

    def measure(lam: float) -> ScoredSetting:
        measured.append(lam)
        return row(lam, 1.0, 0.0 if kept[int(lam)] else 1.0)

    rows = measure_rising(
        lams, measure, lambda lam: row(lam, 1.0, 0.0, skipped=True), lambda each: each.keeps(Limits(0.5))
    )
    assert [each.lam for each in rows] == sorted(lams)
    for each in rows:
        after = any(lam > 0 and lam < each.lam and not kept[int(lam)] for lam in lams)
        assert each.skipped == after == (each.lam not in measured)


def test_what_is_skipped_is_not_measured(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    measure = LiveModel.measure

    def counted(live: LiveModel, rule: Any, *more: Any) -> ScoredSetting:
        calls.append((rule.name, rule.rescaling.lam))
        return measure(live, rule, *more)

    monkeypatch.setattr(LiveModel, "measure", counted)
    out = tmp_path / "out"
    found = run(job, rule=["tv", "fisher"], lams=[300, 200, -1, 1], max_retain_increase=20, out=out)
    assert calls == [(rule, lam) for rule in ("tv", "fisher") for lam in (-1, 1, 200)]
    assert [each.lam for each in found.rows if each.skipped] == [300, 300]
    assert found.rows[3].retain_loss > 1.2 * found.original.retain_loss > found.rows[2].retain_loss
    lines = found.summary().splitlines()
    assert lines[5].split() == ["tv", "300", "skipped"]
    content = json.loads((out / "sweep.json").read_text())
    assert [(each["lam"], each["retain_loss"]) for each in content["rows"] if each["skipped"]] == [(300, None)] * 2


# The search for the largest strength.

Curve = Callable[[float], float]


def searched(curve: Curve, limit: float) -> list[ScoredSetting]:
    return search(
        lambda lam: row(lam, 1.0, curve(lam)), lambda each: each.excess(Limits(limit)), row(0.0, 1.0, limit - 1)
    )


def assert_guarantee(rows: Sequence[ScoredSetting], limit: float) -> None:
    """What is promised of any curve: see ``search``."""
    lams = [row.lam for row in rows]
    assert len(set(lams)) == len(lams) <= 20
    assert all(0 < lam <= LARGEST for lam in lams)
    best = max((row.lam for row in rows if row.retain_loss <= limit), default=0.0)
    larger = [lam for lam in lams if lam > best]
    assert best == LARGEST or (larger and (min(larger) <= 1.01 * best or best == 0))
    if best == 0:
        assert SMALLEST / 2 < min(lams) <= SMALLEST


@given(st.floats(2 * SMALLEST, LARGEST))
def test_search_on_a_rising_curve(crossing: float) -> None:
    rows = searched(lambda lam: lam, crossing)
    best = max(row.lam for row in rows if row.retain_loss <= crossing)
    assert best <= crossing < 1.01 * best or best == LARGEST
    assert_guarantee(rows, crossing)


@pytest.mark.parametrize("bend", [0.0, 0.5, 1.0])
def test_search_on_a_smooth_curve_is_short(bend: float) -> None:
    """A quarter less than halving takes."""
    lengths = halvings = 0
    for crossing in (1.2**k for k in range(-12, 12)):
        rows = searched(lambda lam, at=crossing: bend * lam / at + (1 - bend) * (lam / at) ** 2, 1.0)
        assert_guarantee(rows, 1.0)
        lengths += len(rows)
        high = next(2.0**k for k in range(5) if 2.0**k > crossing)
        low = 0.0 if high == 1 else high / 2
        halvings += 1 + int(math.log2(high))
        while high > 1.01 * low:
            halvings += 1
            middle = (low + high) / 2
            low, high = (middle, high) if middle <= crossing else (low, middle)
    assert lengths < 0.75 * halvings


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([2.0**k for k in range(-10, 11)]), st.sampled_from([0.0, 1.0, math.inf, -math.inf, math.nan])
    ),
    st.randoms(use_true_random=False),
)
def test_search_on_any_curve(some: dict[float, float], draw: Any) -> None:
    """A curve that is drawn as it is measured: broken and kept in any order, not a number here and there."""
    rows = searched(lambda lam: some.get(lam, draw.choice([0.0, 1.0, math.inf, math.nan])), 0.5)
    kept = [each for each in rows if math.isfinite(each.retain_loss) and each.retain_loss <= 0.5]
    finite = [each if each in kept else row(each.lam, 1.0, 1.0) for each in rows]
    assert_guarantee(finite, 0.5)


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_search_where_nothing_keeps_the_limit(value: float) -> None:
    rows = searched(lambda lam: value, 0.5)
    assert [row.lam for row in rows] == [2.0**-k for k in range(11)]


def test_search_where_everything_keeps_the_limit() -> None:
    assert [row.lam for row in searched(lambda lam: 0.0, 0.5)] == [2.0**k for k in range(11)]


@pytest.mark.parametrize("number", ["forget_loss", "forget", "retain"])
def test_a_number_that_is_not_finite_breaks_the_limit(number: str) -> None:
    def measure(lam: float) -> ScoredSetting:
        return row(lam, 1.0, 0.0, **{number: math.inf if lam > 3 else 1.0})

    rows = search(measure, lambda each: each.excess(Limits(0.5)), row(0.0, 1.0, 0.0))
    assert 2.97 < max(row.lam for row in rows if getattr(row, number) == 1.0) <= 3


def outcome(rows: Sequence[ScoredSetting], **fields: Any) -> str:
    """What is said of a search."""
    found = table(*sorted(rows, key=lambda row: row.lam), select="largest", **fields)
    assert found.best is not None
    return found.summary().splitlines()[-1]


def test_what_is_said_of_a_search() -> None:
    everything, nothing = searched(lambda lam: 0.0, 0.5), searched(lambda lam: 1.0, 0.5)
    assert outcome(everything, limit=0.5).startswith("Even lambda 1024 keeps the retain loss within 0.5, and no larger")
    assert outcome(nothing, limit=0.5) == (
        "No lambda that was tried keeps the retain loss within 0.5, down to 0.0009765625; none smaller is tried."
    )
    assert outcome(searched(lambda lam: lam, 1.5), limit=1.5) == (
        "Lambda 1.5 keeps the retain loss within 1.5, at 1.5; the next larger that was tried, 1.506, "
        "does not, at 1.506."
    )
    falling = search(
        lambda lam: row(lam, 1.0, 1.0, retain=1 - lam),
        lambda each: each.excess(Limits(retain=-1.5)),
        row(0.0, 1.0, 1.0, retain=1.0),
    )
    assert outcome(falling, metric="Q_A_Prob", floor=-1.5) == (
        "Lambda 2.5 keeps the retain Q_A_Prob at -1.5 or more, at -1.5; the next larger that was tried, "
        "2.51, does not, at -1.51."
    )


def test_what_is_said_of_a_search_up_to_the_base() -> None:
    limits = {"limit": 0.5, "forget_limit": 2.0}
    rows = search(
        lambda lam: row(lam, lam, lam / 10), lambda each: each.excess(Limits(0.5, forget_loss=2.0)), row(0.0, 0.0, 0.0)
    )
    assert outcome(rows, **limits) == (
        "Lambda 2.0 keeps the retain loss within 0.5 and the forget loss within that of base, 2, at 0.2 and 2; "
        "the next larger that was tried, 2.008, does not, at 0.2008 and 2.008."
    )
    found = table(row(1.0, 2.5, 0.3), select="best-forget", **limits)
    assert found.warnings() == [
        "nothing that was tried keeps the bound; nearest to it is tv, lambda 1.0, whose forget loss is 0.5 above that "
        "of base"
    ]
    worse = table(row(1.0, 2.5, 0.7), select="best-forget", **limits)
    assert worse.nearest().endswith("whose retain loss is 0.2 too high and forget loss is 0.5 above that of base")
    rates = {"metric": "Q_A_Prob", "floor": 0.5, "forget_limit": 2.0, "select": "best-forget"}
    low = table(row(1.0, 9.0, 0.7, forget=0.1, retain=0.3), **rates)
    assert low.nearest().endswith("whose retain Q_A_Prob is 0.2 too low and forget loss is 7 above that of base")


LOSSES = st.floats(0, 20) | st.just(math.inf)


@given(st.floats(1e-3, 1e3), st.floats(1.001, 100), LOSSES, LOSSES, st.floats(0, 3), st.floats(0, 3))
def test_closer_strengths_lie_between(
    low: float, ratio: float, retain: float, forget: float, least: float, known: float
) -> None:
    """Whatever they score; some are tried unless there is no room."""
    limits = Limits(least + 0.05, forget_loss=known + 0.1)
    original, kept = row(0.0, known, least, ""), row(low, known + 0.05, least + 0.01)
    high = low * ratio
    found = closer(kept, row(high, forget, retain), original, limits)
    assert all(low < lam < high for lam in found) and len(set(found)) == len(found) <= CLOSER
    assert found or ratio < 1.2
    assert closer(original, row(high, forget, retain), original, limits) == [high / 8, high / 4, high / 2]


@pytest.mark.parametrize("power", [0.7, 1, 2, 3])
@pytest.mark.parametrize("first", [3.0, 30.0])
def test_closer_strengths_lie_around_the_first_crossing(power: float, first: float) -> None:
    """first: where the retain loss breaks its limit; the forget loss does at 3.1."""
    original, limits = row(0.0, 0.0, 0.0, ""), Limits(0.1, forget_loss=2.0)

    def at(lam: float) -> ScoredSetting:
        return row(lam, 2 * (lam / 3.1) ** power, 0.1 * (lam / first) ** power)

    found = closer(at(2.0), at(4.0), original, limits)
    assert min(found) < min(first, 3.1) < max(found) and min(abs(lam - min(first, 3.1)) for lam in found) < 0.01


def test_closer_strengths_are_spread_where_no_power_fits() -> None:
    """A retain loss that first falls, then breaks its limit; with a forget loss that breaks its own, or does not."""
    original, limits = row(0.0, 0.0, 0.05, ""), Limits(0.1, forget_loss=2.0)
    for forget in (1.5, 2.5):
        found = closer(row(2.0, 1.0, 0.04), row(4.0, forget, 0.2), original, limits)
        ends = [2.0, *found, 4.0]
        assert [high / low for low, high in pairwise(ends)] == pytest.approx([2**0.2] * 5, rel=1e-3)


# What is chosen.

KEPT = row(1.0, 2.0, 0.3)
WORSE = row(2.0, 1.5, 0.4)
BROKEN = row(4.0, 5.0, 0.9)
OTHER = row(1.0, 1.8, 0.1, "grad")
RATES = [  # a probability: less of it is more forgotten
    row(1.0, 1.0, 1.0, forget=0.5, retain=0.9),
    row(2.0, 1.0, 1.0, forget=0.2, retain=0.7),
    row(4.0, 1.0, 1.0, forget=0.1, retain=0.3),
]


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        ([KEPT, BROKEN], {}, None),
        ([KEPT, WORSE, BROKEN, OTHER], {"select": "best-forget", "limit": 0.5}, KEPT),
        ([KEPT, WORSE, BROKEN, OTHER], {"select": "best-forget", "limit": 0.2}, OTHER),
        ([KEPT, WORSE, BROKEN, OTHER], {"select": "best-forget", "limit": 0.05}, ORIGINAL),
        ([KEPT, replace(BROKEN, skipped=True, forget=math.nan)], {"select": "best-forget", "limit": 1.0}, KEPT),
        ([KEPT, WORSE, BROKEN], {"select": "largest", "limit": 0.5}, WORSE),
        ([KEPT, WORSE, BROKEN, OTHER], {"select": "largest", "limit": 0.5}, OTHER),
        ([KEPT, WORSE, BROKEN], {"select": "closest", "gold": row(0, 1.6, 0.3)}, WORSE),
        ([KEPT, WORSE, BROKEN], {"select": "closest", "gold": row(0, 9.0, 0.9)}, BROKEN),
        ([KEPT, WORSE, BROKEN], {"select": "closest", "gold": row(0, 9.0, 0.9), "limit": 0.5}, KEPT),
        (RATES, {"metric": "Q_A_Prob", "select": "best-forget", "floor": 0.5}, RATES[1]),
        (RATES, {"metric": "Q_A_Prob", "select": "largest", "floor": 0.8}, RATES[0]),
    ],
)
def test_choices(rows: list[ScoredSetting], fields: dict[str, Any], expected: ScoredSetting | None) -> None:
    if fields.get("metric"):
        found = table(*rows, **fields)
        found.rows[0] = replace(ORIGINAL, forget=1.0, retain=1.0)
    else:
        found = table(*rows, **fields)
    assert found.best == expected


def test_what_is_said_of_a_choice() -> None:
    rows = [KEPT, row(2.0, 9.0, 0.9), OTHER, row(2.0, 9.0, 0.9, "grad")]
    assert table(*rows).summary().splitlines()[-1].startswith("grad")
    assert table(*rows, select="best-forget", limit=0.2).summary().splitlines()[-1] == (
        "Chosen by best-forget: grad, lambda 1.0, forget 1.8, retain 0.1."
    )
    searched_lines = table(*rows, select="largest", limit=0.5).summary().splitlines()
    assert searched_lines[-3].startswith("tv: Lambda 1.0 keeps the retain loss within 0.5, at 0.3; the next")
    assert searched_lines[-2].startswith("grad: Lambda 1.0 keeps the retain loss within 0.5, at 0.1; the next")
    assert searched_lines[-1] == "Chosen by best-forget: tv, lambda 1.0, forget 2, retain 0.3."
    nothing = table(BROKEN, select="closest", limit=0.5, gold=row(0.0, 2.0, 0.25)).summary().splitlines()
    assert nothing[-1] == "Chosen by closest: the model as it is, forget 1, retain 0."
    assert nothing[-2].split() == ["gold", "2.0000", "0.2500"]


def test_names_of_curves() -> None:
    rows = [
        row(1.0, 1.0, 1.0),
        *(row(1.0, 1.0, 1.0, "grad", alpha=alpha) for alpha in (1.0, 2.5)),
        *(row(1.0, 1.0, 1.0, "fisher", p=p, alpha=3.0) for p in (2.0, 0.5)),
    ]
    names = ["tv", "grad, α 1", "grad, α 2.5", "fisher, p 2", "fisher, p 0.5"]
    assert list(table(*rows).curves()) == names
    assert [line.split("  ")[0] for line in table(*rows).summary().splitlines()[2:]] == names


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        ([KEPT, BROKEN], {"select": "best-forget", "limit": 0.5}, []),
        ([row(-1.0, 0.5, 0.1), KEPT], {}, ["lambda -1 is less than 0: the task vector is added, which teaches"]),
        (
            [row(0.5, 5.0, 0.75), BROKEN],
            {"select": "best-forget", "limit": 0.5},
            ["nothing that was tried keeps the bound; nearest to it is tv, lambda 0.5, whose retain loss is 0.25 too"],
        ),
        (
            [row(0.5, math.nan, math.nan), replace(BROKEN, skipped=True, retain_loss=math.nan)],
            {"select": "best-forget", "limit": 0.5},
            ["nothing that was tried keeps the bound: at every strength the losses are no longer finite"],
        ),
        (
            RATES,
            {"metric": "Q_A_Prob", "select": "best-forget", "floor": 0.95},
            ["nothing that was tried keeps the bound; nearest to it is tv, lambda 1.0, whose retain Q_A_Prob is 0.05"],
        ),
        (
            RATES,
            {"metric": "Q_A_Prob", "select": "best-forget", "floor": 0.1},
            ["the chosen lambda, 4, is the largest that was tried; try larger ones too"],
        ),
        (RATES[:1], {"metric": "Q_A_Prob", "select": "best-forget", "floor": 0.1}, []),  # one strength is no grid
        (
            [row(1.0, 1.0 + alpha, 0.1, "grad", alpha=alpha) for alpha in (1.0, 4.0, 16.0)],
            {"select": "best-forget", "limit": 0.5},
            ["the chosen alpha, 16, is the largest that was tried; try larger ones too"],
        ),
        (
            [row(1.0, 3.0 - alpha, 0.1, "grad", alpha=alpha) for alpha in (0.25, 0.5, 0.75)],
            {"select": "best-forget", "limit": 0.5},
            ["the chosen alpha, 0.25, is the smallest that was tried; try smaller ones too"],
        ),
    ],
)
def test_what_is_to_be_doubted(rows: list[ScoredSetting], fields: dict[str, Any], expected: list[str]) -> None:
    found = table(*rows, **fields)
    if fields.get("metric"):
        found.rows[0] = replace(ORIGINAL, forget=1.0, retain=1.0)
    warnings = found.warnings()
    assert len(warnings) == len(expected)
    assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=True))


def test_a_sweep_says_what_is_to_be_doubted(job: Job) -> None:
    found = run(job, rule="tv", lams=[-1, 1, 2], target_retain_loss=1000)
    assert found.notes == as_notes(found.warnings()) and found.notes[0].startswith("warning: lambda -1 is less than 0")
    assert found.summary().endswith("\n".join(found.notes))


# What is written of it.


@pytest.mark.parametrize("handed", [True, False], ids=["importances given", "estimated"])
def test_the_checkpoint_of_what_is_chosen(handed: bool, job: Job, tmp_path: Path) -> None:
    """The closest to a gold model is that model itself, where a setting makes it."""
    made = [tmp_path / role for role in ("forget", "retain")]
    for path, data in zip(made, (job.forget, job.retain), strict=True):
        estimate_importance(job.base, data, out=path, progress=False)
    wanted: dict[str, Any] = {"rule": "grad", "alpha": 2.0, "lam": 8}
    apply(*job.checkpoints, *made, **wanted, out=tmp_path / "gold", progress=False)
    found = run(
        job,
        *(made if handed else []),
        rule=["fisher", "tv", "grad"],
        alpha=[0.5, 2.0],
        lams=[2, 8],
        select="closest",
        gold=tmp_path / "gold",
        out=tmp_path / "out",
        checkpoint=tmp_path / "chosen",
    )
    best = found.best
    assert best is not None and found.gold is not None
    assert (best.rule, best.alpha, best.lam) == ("grad", 2.0, 8)
    assert found.distance(best) == 0 < min(found.distance(each) for each in found.rows if each is not best)
    one, other = read_checkpoint(tmp_path / "chosen"), read_checkpoint(tmp_path / "gold")
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)
    assert verify(tmp_path / "chosen", progress=False).problems == []
    report = Report.load(tmp_path / "chosen")
    assert report.data == found.data
    made_by = {"sweep": str(tmp_path / "out"), "sweep_started": found.started, "select": "closest"}
    assert report.settings == found.settings | made_by | {"at": "base"}
    assert (report.settings["lams"], report.settings["alphas"]) == ([2.0, 8.0], [0.5, 2.0])
    assert (report.settings["threshold"], report.settings["overwrite"]) == (None, False)
    context = AutoConfig.from_pretrained(job.model).max_position_embeddings
    assert report.settings["max_length"] == context
    assert report.inputs["forget_importance"].get("kept", True) == handed
    left = {"gold", "out", "chosen", "forget", "retain"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"sweep.json", "sweep.png"}


@pytest.mark.usefixtures("plots")
def test_the_command(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, base, tuned = job.checkpoints
    arguments = [
        *("sweep", "--model", model, "--base", base, "--tuned", tuned),
        *("--forget", job.forget, "--retain", job.retain, "--metric", "Q_A_Prob"),
        *("--rules", "grad,tv", "--ps", "1,2", "--alphas", "0.5,2", "--lams", "8"),
    ]
    assert cli.main(list(map(str, arguments))) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = "rule lambda forget loss retain loss forget Q_A_Prob retain Q_A_Prob changed seconds"
    assert lines[0].split() == heads.split()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        *("original", "grad, p 1, α 0.5", "grad, p 1, α 2", "grad, p 2, α 0.5", "grad, p 2, α 2", "tv")
    ]
    apply(*job.checkpoints, rule="tv", lam=8, out=tmp_path / "gold", progress=False)
    places = ["--gold", tmp_path / "gold", "--out", tmp_path / "out", "--checkpoint", tmp_path / "chosen"]
    assert cli.main([*map(str, arguments), "--select", "closest", *map(str, places)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("Chosen by closest: tv, lambda 8.0, forget 0.00")
    assert lines[-2:] == [f"chosen checkpoint written to {tmp_path / 'chosen'}", f"written to {tmp_path / 'out'}"]
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    report = Report.load(tmp_path / "chosen")
    assert content["best"] | {"rule": report.rule, "p": report.p, "alpha": report.alpha} == content["best"]
    assert content["settings"]["ps"] == [1, 2] and report.lam == 8


def test_nothing_better_than_the_model_as_it_is(job: Job, tmp_path: Path) -> None:
    """Its scores are there nevertheless."""
    with pytest.raises(RunError, match=r"nothing that was tried keeps the bound; nearest .* is in .*/out"):
        run(job, rule="tv", lams=[1000], max_retain_increase=1, out=tmp_path / "out", checkpoint=tmp_path / "chosen")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(Sweep.read(tmp_path / "out" / "sweep.json").rows) == 2


def test_a_gold_model_that_cannot_be_compared(job: Job, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model)
    model.lm_head.weight.data.fill_(1e38)
    model.save_pretrained(tmp_path / "gold")
    tokenizer().save_pretrained(tmp_path / "gold")
    with pytest.raises(InputError, match=r"gold: what the gold model scores is not finite"):
        run(job, rule="tv", lams=[1], gold=tmp_path / "gold", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gold"]


# What is read again.


def test_the_record_is_read_again(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(job, rule=["tv", "grad"], lams=[-1, 1e40, 2], gold=job.base, out=out)
    again = Sweep.read(out / "sweep.json")
    assert again.importance == {}
    assert repr(again) == repr(replace(found, importance={}))  # NaN is not equal to itself
    curves = read_curves([out])
    assert [curve.label for curve in curves] == ["tv", "grad"]
    assert [[row.lam for row in curve.rows] for curve in curves] == [[-1, 0, 2, 1e40]] * 2


def test_a_record_written_by_0_1_0() -> None:
    """With a skipped setting and one that is not finite."""
    found = Sweep.read(Path(__file__).with_name("written_by_0_1_0") / "sweep.json")
    strengths = {name: [(row.lam, row.skipped) for row in rows] for name, rows in found.curves().items()}
    assert strengths == {
        "tv": [(1, False), (20, False), (1e38, True)],
        "fisher": [(1, False), (20, False), (1e38, False)],
    }
    assert found.original.retain_loss == 5.735042730967204
    assert [row.is_finite for row in found.rows] == [True, True, True, False, True, True, False]
    assert found.gold is not None and found.gold.forget == 5.701959860324859
    assert found.best is not None and (found.best.rule, found.best.lam) == ("tv", 1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_chosen_checkpoint_whose_settings_are_texts(version: int, tmp_path: Path) -> None:
    """As version 0.1.0 wrote them; the first reports of version 2 had them too."""
    texts = {
        "lams": "1.0, 2.0",
        "rules": "tv, fisher",
        "ps": "None, 2.0",
        "alphas": "1.0",
        "at": "base",
        "metric": "loss",
        "overwrite": "False",
        "batch_size": "8",
        "device": "cpu",
        "dtype": "float32",
        "sweep": "/written/sweep",
        "sweep_started": "2026-11-28T02:13:12+00:00",
        "select": "best-forget",
    }
    written = Path(__file__).parents[1] / "records" / "written_by_0_1_0" / "applied" / "perta_report.json"
    content = json.loads(written.read_text()) | {"settings": texts, "format_version": version}
    (tmp_path / "perta_report.json").write_text(json.dumps(content))
    report = Report.load(tmp_path)
    assert report.settings == texts and report.chosen_rule().name == "tv"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": None},
        {"rows": []},
        {"rows": [{"rule": "tv"}]},
        {"gold": {"rule": 1}},
        {"metric": 3},
        {"format_version": 1},
        {"more": 1},
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], job: Job, tmp_path: Path) -> None:
    found = table(KEPT)
    found.save(tmp_path)
    path = tmp_path / "sweep.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=r"sweep\.json: is not a sweep that this version understands"):
        Sweep.read(path)
