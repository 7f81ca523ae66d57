"""The plots of a page, as PNG. Matplotlib is imported for the first plot."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError
from perta_fast.records.report import TensorReport
from perta_fast.records.setting_choice import SettingChoice, TriedSetting
from perta_fast.records.strength_choice import StrengthChoice
from perta_fast.reporting.evidence import Curve
from perta_fast.reporting.tensor_positions import WeightGrid, position_of
from perta_fast.reporting.weight_distribution import BINS, Distribution
from perta_fast.scoring.criteria import LOSS
from perta_fast.sweeping import plot
from perta_fast.sweeping.plot import DPI, drawable, is_drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = 40  # labels beside one axis
STACKS = 4  # stacks of layers in one figure
_WIDE, _LARGEST_LAM = 8, 1e6  # strengths that need a logarithmic axis, and that it can hold
_LEAST_ROOM = 1e-3  # nats; what differs by less is drawn as one
_CHANGES = (1e-12, 1e12)  # relative changes that an axis can hold


@dataclass(frozen=True)
class Plot:
    """A PNG, the name of its file without the ending, and a caption of one sentence."""

    name: str
    caption: str
    png: bytes


def check_matplotlib() -> None:
    """Raise InputError naming the extra if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: pip install 'perta-fast[plots]'")


def trade_off(curves: Sequence[Curve], points: Sequence[tuple[str, tuple[float, float]]]) -> Plot:
    """Forget loss against retain loss: a line for each curve, and ``points``, each a label and (retain, forget)."""
    figure = plot.trade_off(
        {curve.label: [(row.lam, row.retain_loss, row.forget_loss) for row in curve.rows] for curve in curves}, points
    )
    caption = (
        "Forget loss (higher is more forgotten) against retain loss (lower is better kept); "
        "the largest λ stands at the end of a curve."
    )
    return Plot("trade-off", caption, _png(figure))


def strength_choice(choice: StrengthChoice) -> Plot:
    """Both losses of every strength that was tried, the limit, and the one that was chosen."""
    figure = _figure(6.4, 4.6)
    panels = figure.subplots(2, sharex=True)
    tried = sorted(choice.tried, key=lambda each: each.lam)
    limit = None if choice.before.retain_loss is None else choice.before.retain_loss + choice.max_retain_rise
    for axes, role in zip(panels, ("forget", "retain"), strict=True):
        name = f"{role}_loss"
        points = [(each.lam, getattr(each, name)) for each in tried]
        points = [(lam, loss) for lam, loss in points if loss is not None and is_drawable(loss) and is_drawable(lam)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label="tried")
        before, after = getattr(choice.before, name), getattr(choice.after, name)
        if before is not None and is_drawable(before):
            axes.axhline(before, color="gray", linewidth=1, linestyle=":", label="the model as it was")
        if after is not None and is_drawable(after) and is_drawable(choice.after.lam):
            axes.plot(
                choice.after.lam, after, "*", color="black", markersize=13, label=f"chosen: λ = {choice.after.lam:.4g}"
            )
        axes.set_ylabel(f"{role} loss (nats)")
    if choice.base_forget_loss is not None and is_drawable(choice.base_forget_loss):
        panels[0].axhline(choice.base_forget_loss, color="tab:red", linestyle="--")
    if limit is not None and is_drawable(limit):
        panels[1].axhline(limit, color="tab:red", linestyle="--", label="limit")
        shown = [each.retain_loss for each in (choice.before, choice.after, *tried) if each.lam <= choice.after.lam]
        panels[1].set_ylim(*_around([limit, *(loss for loss in shown if loss is not None and is_drawable(loss))]))
    lams = [each.lam for each in tried]
    if lams and 0 < lams[0] * _WIDE < lams[-1] < _LARGEST_LAM:
        panels[1].set_xscale("log", base=2)
        panels[1].xaxis.set_major_formatter(lambda lam, _: f"{lam:g}")
    aim = "the higher the better" if choice.base_forget_loss is None else "the limit is the loss of the base"
    panels[0].set_title(f"to be forgotten: {aim}", fontsize=9)
    panels[1].set_title("to be kept: must stay below the limit", fontsize=9)
    panels[1].set_xlabel("strength λ")
    panels[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4, frameon=False, fontsize=8)
    return Plot(
        "strength",
        "Every strength λ that was tried, with the loss on the rows to forget and on those to keep.",
        _png(figure),
    )


def _around(losses: Sequence[float]) -> tuple[float, float]:
    """A range that shows all of them, with some room below, and more above, where larger strengths lie."""
    low, high = min(losses), max(losses)
    room = max(high - low, _LEAST_ROOM)
    return low - 0.5 * room, high + 1.5 * room


def setting_choice(choice: SettingChoice) -> Plot:
    """Every setting of a choice: a line for each curve, the bound, and the chosen one."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for each in choice.tried:
        curves.setdefault(each.curve, [_point(choice.before)]).append(_point(each))
    marked = {"chosen": choice.after} | ({} if choice.gold is None else {"gold": choice.gold})
    points = [(label, _point(each)[1:]) for label, each in marked.items()]
    bound = choice.limit if choice.metric == LOSS else choice.floor
    figure = plot.trade_off(curves, points, choice.metric, bound, choice.base_forget_loss)
    return Plot(
        "choice",
        "Every setting that was scored, and the one that was chosen; the largest λ stands at the end of its curve.",
        _png(figure),
    )


def _point(setting: TriedSetting) -> tuple[float, float, float]:
    """λ, retain and forget; not a number where it is not known."""
    retain, forget = (math.nan if value is None else value for value in (setting.retain, setting.forget))
    return setting.lam, retain, forget


def weight_maps(grids: Sequence[WeightGrid]) -> Plot:
    """A heat map of mean w for each of at most ``STACKS`` stacks of layers."""
    heights = [min(1.6 + 0.22 * len(grid.layers), 12.0) for grid in grids]
    figure = _figure(max(4.8, 1.5 + 0.45 * max(len(grid.kinds) for grid in grids)), sum(heights) + 1.2)
    panels = figure.subplots(len(grids), squeeze=False, height_ratios=heights)[:, 0]
    for axes, grid in zip(panels, grids, strict=True):
        drawn = axes.imshow(grid.rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        kinds = [drawable(kind) for kind in grid.kinds]
        axes.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=8, parse_math=False)
        step = -(-len(grid.layers) // _TICKS)
        shown = range(0, len(grid.layers), step)
        axes.set_yticks(shown, [str(grid.layers[k]) for k in shown], fontsize=8)
        axes.set_ylabel("layer")
        axes.set_title(drawable(grid.stack), fontsize=9, parse_math=False)
    figure.colorbar(drawn, ax=panels, label="mean w")
    return Plot("weights-by-layer", "Mean w by layer and kind of module: 1 subtracts all, 0 nothing.", _png(figure))


def weight_histogram(distribution: Distribution) -> Plot:
    """The share of parameters by w."""
    import numpy as np

    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    axes.stairs(100 * distribution.counts / max(distribution.total, 1), np.linspace(0, 1, BINS + 1), fill=True)
    axes.axvline(0.5, color="gray", linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xlabel("w")
    axes.set_ylabel("parameters (%)")
    return Plot("weight-histogram", f"Parameters by their w, in {BINS} equal parts of [0, 1].", _png(figure))


def relative_changes(tensors: Sequence[TensorReport]) -> Plot | None:
    """A dot for each tensor and a line through the medians, for at most ``STACKS`` stacks; None if nothing changed."""
    import numpy as np

    by_layer: dict[str, dict[int, list[float]]] = {}
    for row in tensors:
        position, change = position_of(row.name), row.relative_change
        if position is not None and change is not None and _CHANGES[0] < change < _CHANGES[1]:
            by_layer.setdefault(position.stack, {}).setdefault(position.layer, []).append(change)
    if not by_layer:
        return None
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    for stack, layers in list(by_layer.items())[:STACKS]:
        numbers = sorted(layers)
        dots = [(layer, change) for layer in numbers for change in layers[layer]]
        (drawn,) = axes.plot(*zip(*dots, strict=True), ".", alpha=0.5)
        medians = [float(np.median(layers[layer])) for layer in numbers]
        axes.plot(numbers, medians, color=drawn.get_color(), label=drawable(stack))
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative change")
    axes.locator_params("x", integer=True)
    if len(by_layer) > 1:
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
    return Plot(
        "relative-change",
        "‖θ_out − θ_full‖ / ‖θ_full‖ of each changed tensor within the layers; the line is the median of the layer.",
        _png(figure),
    )


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
