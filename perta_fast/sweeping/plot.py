"""The plot of forgetting against retaining."""

from pathlib import Path
from typing import Any

from perta_fast.sweeping.criteria import LOSS
from perta_fast.sweeping.results import Sweep

PLOT_NAME = "sweep.png"


def draw(found: Sweep, path: Path) -> bool:
    """Plot forgetting against retaining, a line a curve; return whether matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for label, rows in found.curves().items():
        shown = [row for row in [found.original, *rows] if row.is_finite and not row.skipped]
        shown.sort(key=lambda row: row.lam)
        (line,) = axes.plot(
            [row.retain for row in shown], [row.forget for row in shown], marker=".", label=label
        )
        near: dict[str, Any] = {
            "xytext": (4, 4),
            "textcoords": "offset points",
            "fontsize": 7,
            "color": line.get_color(),
        }
        for row in shown:
            if row.rule:
                axes.annotate(f"{row.lam:g}", (row.retain, row.forget), **near)
    points = [("original (λ = 0)", "*", found.original)]
    if found.gold is not None:
        points.append(("gold", "P", found.gold))
    for name, marker, row in points:
        axes.plot(row.retain, row.forget, marker, color="black", markersize=9, label=name)
    bound = found.limit if found.metric == LOSS else found.floor
    if bound is not None:
        axes.axvline(bound, color="gray", linestyle="--", label="limit")
    axes.legend()
    unit = " (nats)" if found.metric == LOSS else ""
    axes.set_xlabel(f"retain {found.metric}{unit}")
    axes.set_ylabel(f"forget {found.metric}{unit}")
    figure.savefig(path, dpi=150)
    return True
