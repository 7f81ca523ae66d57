"""The trade-off plot, forgetting against retaining, which sweeps and reports both draw."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.files.own import own_file
from perta_fast.scoring.criteria import LOSS
from perta_fast.sweeping.results import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_NAME = "sweep.png"
DPI = 150
CHOSEN = "chosen"  # the beginning of the label of the point that is ringed
_LARGEST = 1e6  # larger values are not drawn
_LONGEST = 40  # characters of a label
_WIDE = 20.0  # an axis of losses with a larger ratio of its ends is logarithmic
# Okabe and Ito's colours, which the colour-blind tell apart; marks and dashes tell curves apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS, _DASHES = "os^Dv<>p", ("-", "--", "-.", ":")
_ASIDE = ((1, 0.6), (1, -1.4), (-1, 0.6), (-1, -1.4), (1, -0.4), (-1, -0.4), (0, 1), (0, -2))  # of a mark

Settings = Sequence[tuple[float, float, float]]  # lam, retain and forget of each


def draw(sweep: Sweep, path: Path) -> bool:
    """Write the plot of ``sweep`` to ``path``; return whether matplotlib is installed."""
    curves = {
        label: [(row.lam, row.retain, row.forget) for row in (sweep.original, *rows)]
        for label, rows in sweep.curves().items()
    }
    points = [] if sweep.gold is None else [("gold", (sweep.gold.retain, sweep.gold.forget))]
    if (best := sweep.best) is not None:
        name = f"{sweep.label(best)}, λ {best.lam:.4g}" if best.rule else "the model as it is"
        points.append((f"{CHOSEN}: {name}", (best.retain, best.forget)))
    bound = sweep.limit if sweep.metric == LOSS else sweep.floor
    try:
        figure = trade_off(curves, points, sweep.metric, bound, sweep.forget_limit)
    except ImportError:
        return False
    with open(path, "wb", opener=own_file) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return True


def trade_off(
    curves: Mapping[str, Settings],
    points: Sequence[tuple[str, tuple[float, float]]],
    metric: str = LOSS,
    bound: float | None = None,
    base_loss: float | None = None,
) -> "Figure":
    """Draw a line for each curve and a mark for each point, without values that are not finite.

    curves: by label; lam 0 is the model as it is. The largest strength is written beside it, where there is room, and
    of one curve alone the smallest. points: label, retain and forget; one whose label begins with ``CHOSEN`` is ringed.
    bound: on retain, a dashed line, unless it is far too large to be drawn. base_loss: a limit on the forget loss, a
    dotted line in a plot of losses. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    beside: list[tuple[float, float, str, str]] = []
    styles = zip(cycle(_COLOURS), cycle(_MARKS), cycle(_DASHES), strict=False)
    for (label, settings), (colour, mark, dash) in zip(curves.items(), styles, strict=False):
        drawn = _drawn(settings)
        retain, forget = [setting[1] for setting in drawn], [setting[2] for setting in drawn]
        axes.plot(retain, forget, dash, color=colour, marker=mark, markersize=4.5, linewidth=1.4, label=drawable(label))
        changed = [setting for setting in drawn if setting[0] != 0]
        ends = (*changed[-1:], *(changed[:1] if len(curves) == 1 else ()))
        beside += [(x, y, f"λ {lam:g}", colour) for lam, x, y in dict.fromkeys(ends)]
    originals = [setting[1:] for settings in curves.values() for setting in settings if setting[0] == 0]
    _mark(axes, [("original (λ = 0)", point) for point in originals[:1]] + list(points))
    ringed = [point for label, point in points if label.startswith(CHOSEN) and all(map(is_drawable, point))]
    beside = [(*point, CHOSEN, "black") for point in ringed] + beside
    if bound is not None and is_drawable(bound):
        axes.axvline(bound, color="0.35", linestyle=(0, (6, 3)), linewidth=1.2, label=f"limit: {bound:.4g}")
    if metric == LOSS and base_loss is not None and is_drawable(base_loss):
        axes.axhline(base_loss, color="0.35", linestyle=":", linewidth=1.2, label=f"base: {base_loss:.4g}")
    _name_axes(axes, metric)
    # To the right of the axes, where no curve is.
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign
    _write_beside(figure, axes, beside)
    return figure


def _drawn(settings: Settings) -> list[tuple[float, float, float]]:
    return sorted(setting for setting in settings if all(map(is_drawable, setting[1:])))


def _mark(axes: "Axes", marks: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Black marks; a ring around what was chosen."""
    for k, (label, point) in enumerate(marks):
        if not all(map(is_drawable, point)):
            continue
        shown: dict[str, Any] = {"linestyle": "none", "color": "black", "zorder": 5, "label": drawable(label)}
        if label.startswith(CHOSEN):
            axes.plot(*point, "o", **shown | {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2})
        else:
            axes.plot(*point, "*PXDvs"[k % 6], **shown | {"markersize": 9})


def _name_axes(axes: "Axes", metric: str) -> None:
    """What they show and which way is better; logarithmic where losses lie far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter

    unit, left, up = " (nats)", "further left: better kept", "higher: more forgotten"
    if metric != LOSS:
        unit, left, up = "", "further right: better kept", "lower: more forgotten"
    axes.set_xlabel(f"retain {metric}{unit} — {left}")
    axes.set_ylabel(f"forget {metric}{unit} — {up}")
    points = _positions(axes)
    for axis, positions in ((axes.xaxis, [x for x, _ in points]), (axes.yaxis, [y for _, y in points])):
        smallest, largest = min(positions, default=0.0), max(positions, default=0.0)
        if metric == LOSS and smallest > 0 and largest / smallest > _WIDE:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def _write_beside(figure: "Figure", axes: "Axes", beside: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label at the first of some places that no other label, line or mark takes; none, if all are taken."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout moves the axes
    place, unit = axes.transData.transform, figure.dpi / 72
    taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in _along(axes, 5 * unit)]
    for x, y, text, colour in beside:
        at_x, at_y = place((x, y))
        height, gap = 9.0, 9.0 if text == CHOSEN else 6.0  # in points, as are the next
        width = 4.6 * len(text) + 2
        for side, row in _ASIDE:
            right, up = gap if side > 0 else -gap - width if side < 0 else -width / 2, row * height
            box = Bbox.from_bounds(at_x + right * unit, at_y + up * unit, width * unit, height * unit)
            corners = ((box.x0, box.y0), (box.x1, box.y1))
            if all(axes.bbox.contains(*corner) for corner in corners) and not box.count_overlaps(taken):
                how: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colour}
                axes.annotate(text, (x, y), xytext=(right, up), **how)
                taken.append(box)
                break


def _positions(axes: "Axes") -> list[tuple[float, float]]:
    """All marks, in the units of the axes."""
    lines: list[Any] = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    return [point for line in lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def _along(axes: "Axes", step: float) -> Iterator[tuple[float, float]]:
    """Points on all lines and of all marks, at most ``step`` apart, on the canvas."""
    lines: list[Any] = list(axes.lines)
    for line in lines:
        corners = line.get_transform().transform(list(zip(line.get_xdata(), line.get_ydata(), strict=True)))
        if len(corners):
            yield corners[-1]
        for (x, y), (next_x, next_y) in pairwise(corners):
            count = math.ceil(math.hypot(next_x - x, next_y - y) / step)
            yield from ((x + (next_x - x) * k / count, y + (next_y - y) * k / count) for k in range(count))


def is_drawable(value: float) -> bool:
    """Whether ``value`` is finite and not so large that an axis would show nothing else."""
    return math.isfinite(value) and abs(value) <= _LARGEST


def drawable(text: str) -> str:
    """``text`` as a label: short, and of printable characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(shown) > _LONGEST:  # paths differ at their ends
        shown = f"{shown[:12]}…{shown[13 - _LONGEST :]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels with _ out
