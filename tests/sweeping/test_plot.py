"""The trade-off plot: the choice ringed and named, the limit, a legend off the curves, labels apart from each other."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.plot import CHOSEN, draw, trade_off
from perta_fast.sweeping.results import Sweep

pytestmark = pytest.mark.usefixtures("plots")

LAMS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
LIMIT = 0.12


def curve(forget: float, retain: float) -> list[tuple[float, float, float]]:
    return [(0.0, 0.07, 0.08), *((lam, 0.07 + retain * lam**1.3, 0.08 + forget * lam**0.9) for lam in LAMS)]


FOUR = {f"rule {k}": curve(forget, 0.01 * (k + 1)) for k, forget in enumerate((2.0, 0.6, 0.9, 1.2))}
LONG = {"a very long name of a rule $x_{1}$ " * 3 + str(k): curve(0.3, 0.02 * (k + 1)) for k in range(8)}
CASES: dict[str, dict[str, Any]] = {
    "one rule": {"one": curve(0.9, 0.001)},
    "four rules": FOUR,
    "long names, and all the same": LONG | {"same": curve(0.3, 0.02)},
    "what is not finite": {"tv": [(0.0, 0.07, 0.08), (1, math.nan, 1.0), (2, 0.2, math.inf), (4, 1e30, 1e30)]},
}


@pytest.mark.parametrize("case", CASES)
def test_labels_and_legend(case: str) -> None:
    chosen = ("chosen: it", CASES[case].get("rule 0", [(0, 0.07, 0.08)])[-1][1:])
    figure = trade_off(CASES[case], [("gold", (0.09, 2.3)), chosen], bound=LIMIT)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 >= axes.bbox.x1 and legend.x1 <= figure.bbox.x1
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"original (λ = 0)", "gold", "chosen: it", "limit: 0.12"} <= set(shown)
    assert len(shown) == len(CASES[case]) + 4


def test_the_choice_and_the_limit() -> None:
    point = FOUR["rule 0"][4][1:]
    (axes,) = trade_off(FOUR, [("chosen: rule 0, λ 2", point)], bound=LIMIT).axes
    ring = next(line for line in axes.lines if str(line.get_label()).startswith(CHOSEN))
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == point
    assert ring.get_fillstyle() == "none"
    limit = next(line for line in axes.lines if str(line.get_label()).startswith("limit"))
    assert set(limit.get_xdata()) == {LIMIT}
    (squashed,) = trade_off(FOUR, [], bound=1e9).axes  # a limit that would leave no room for the curves
    assert squashed.get_xlim()[1] < 10 and not any("limit" in str(line.get_label()) for line in squashed.lines)
    texts = [text.get_text() for text in axes.texts]
    assert texts.count(CHOSEN) == 1
    assert texts.count("λ 32") == 4  # the end of each curve, and nothing between
    assert len(texts) == 5


def test_curves_are_told_apart_in_grey() -> None:
    (axes,) = trade_off({str(k): curve(1 + k, 0.01) for k in range(8)}, []).axes
    looks = {(line.get_marker(), line.get_linestyle()) for line in axes.lines if line.get_linestyle() != "None"}
    assert len(looks) == 8


@pytest.mark.parametrize(("metric", "scale"), [("loss", "log"), ("Q_A_Prob", "linear")])
def test_losses_that_lie_far_apart(metric: str, scale: str) -> None:
    (axes,) = trade_off({"one": curve(2.0, 0.01)}, [], metric).axes
    assert axes.get_yscale() == scale
    assert (trade_off({"one": curve(0.001, 0.001)}, [], metric).axes[0]).get_yscale() == "linear"
    better = ("further left: better kept", "higher: more forgotten")
    if metric != "loss":
        better = ("further right: better kept", "lower: more forgotten")
    assert axes.get_xlabel().endswith(better[0]) and axes.get_ylabel().endswith(better[1])


def test_a_sweep_rings_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perta_fast.sweeping import plot

    drawn: list[Any] = []
    monkeypatch.setattr(plot, "trade_off", lambda *given: drawn.append(given) or trade_off(*given))
    rows = [ScoredSetting("", 1, 1, 0, 0.08, 0.07, 0.08, 0.07, 0, 1)]
    rows += [ScoredSetting("tv", 1, 1, lam, y, x, y, x, 0.5, 1) for lam, x, y in curve(0.9, 0.01)[1:]]
    assert draw(Sweep(rows, "loss", LIMIT, None, "best-forget", {}, {}, {}, forget_limit=2.5), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    ((_, points, metric, bound, base),) = drawn
    assert (metric, bound, base) == ("loss", LIMIT, 2.5)
    assert points == [("chosen: tv, λ 2", curve(0.9, 0.01)[4][1:])]
