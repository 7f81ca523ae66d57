"""The trade-off plot, forgetting against retaining, which sweeps and reports both draw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.files.own import own_file
from perta_fast.scoring.criteria import LOSS
from perta_fast.sweeping.results import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_NAME = "sweep.png"
DPI = 150
_LARGEST = 1e6  # larger values are not drawn
_LONGEST = 40  # characters of a label


def draw(sweep: Sweep, path: Path) -> bool:
    """Write the plot of ``sweep`` to ``path``; return whether matplotlib is installed."""
    curves = {
        label: [(row.lam, row.retain, row.forget) for row in (sweep.original, *rows)]
        for label, rows in sweep.curves().items()
    }
    gold = [] if sweep.gold is None else [("gold", (sweep.gold.retain, sweep.gold.forget))]
    bound = sweep.limit if sweep.metric == LOSS else sweep.floor
    try:
        figure = trade_off(curves, gold, sweep.metric, bound)
    except ImportError:
        return False
    with open(path, "wb", opener=own_file) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return True


def trade_off(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    points: Sequence[tuple[str, tuple[float, float]]],
    metric: str = LOSS,
    bound: float | None = None,
) -> "Figure":
    """Draw a line for each curve and a black mark for each point, without values that are not finite.

    curves: lam, retain and forget of each setting, by label; lam 0 is the model as it is. points: label, retain
    and forget. bound: on retain, a dashed line. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for label, settings in curves.items():
        drawn = sorted(setting for setting in settings if all(map(is_drawable, setting[1:])))
        retain, forget = [setting[1] for setting in drawn], [setting[2] for setting in drawn]
        (line,) = axes.plot(retain, forget, marker="o", markersize=4, label=drawable(label))
        beside: dict[str, Any] = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 7}
        for lam, x, y in drawn:
            if lam != 0:
                axes.annotate(f"{lam:g}", (x, y), color=line.get_color(), **beside)
    originals = [setting[1:] for settings in curves.values() for setting in settings if setting[0] == 0]
    marks = [("original (λ = 0)", point) for point in originals[:1]] + list(points)
    for k, (label, point) in enumerate(marks):
        if all(map(is_drawable, point)):
            axes.plot(*point, "*PXDvs"[k % 6], color="black", markersize=10, label=drawable(label))
    if bound is not None:
        axes.axvline(bound, color="gray", linestyle="--", label="limit")
    unit = " (nats)" if metric == LOSS else ""
    axes.set_xlabel(f"retain {metric}{unit}")
    axes.set_ylabel(f"forget {metric}{unit}")
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2, "frameon": False}
    for text in axes.legend(**below).get_texts():  # where no curve is
        text.set_parse_math(False)  # a name may hold a dollar sign
    return figure


def is_drawable(value: float) -> bool:
    """Whether ``value`` is finite and not so large that an axis would show nothing else."""
    return math.isfinite(value) and abs(value) <= _LARGEST


def drawable(text: str) -> str:
    """``text`` as a label: short, and of printable characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(shown) > _LONGEST:  # paths differ at their ends
        shown = f"{shown[:12]}…{shown[13 - _LONGEST :]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels with _ out
