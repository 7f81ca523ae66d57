"""Where a tensor belongs in a model, from its name: stack of layers, layer, kind of module."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from perta_fast.records.report import TensorReport

_DIGITS = 6  # a longer number does not count layers
KINDS = 40  # columns that a reader can still tell apart


@dataclass(frozen=True)
class Place:
    """``model.layers.3.mlp.up_proj.weight`` stands in stack ``model.layers``, layer 3, as ``mlp.up_proj``."""

    stack: str
    layer: int
    kind: str


@dataclass(frozen=True)
class WeightGrid:
    """Mean w of one stack: ``rows[i][k]`` is that of ``layers[i]`` and ``kinds[k]``, NaN where there is none.

    left_out: kinds beyond the ``KINDS`` with the most parameters.
    """

    stack: str
    layers: list[int]
    kinds: list[str]
    rows: list[list[float]]
    left_out: int


def place_of(name: str) -> Place | None:
    """Where a tensor belongs; None if outside all layers. The first number in ``name`` is the layer's.

    Later numbers, those of experts, become ``*``.
    """
    parts = name.split(".")
    for k, part in enumerate(parts[1:-1], start=1):
        if _is_number(part):
            kind = ".".join("*" if _is_number(later) else later for later in parts[k + 1 :])
            return Place(".".join(parts[:k]), int(part), kind.removesuffix(".weight"))
    return None


def weight_grids(tensors: Iterable[TensorReport]) -> list[WeightGrid]:
    """Mean w by layer and kind of module, one grid for each stack. A cell is the mean over its elements."""
    sums: dict[Place, tuple[float, float]] = {}
    for row in tensors:
        place = place_of(row.name)
        if place is None or row.mean_weight is None or not 0 <= row.mean_weight <= 1:  # damaged
            continue
        elements = float(element_count(row.shape))
        total, weight = sums.get(place, (0.0, 0.0))
        sums[place] = total + elements, weight + elements * row.mean_weight
    stacks: dict[str, list[Place]] = {}
    for place, (total, _) in sums.items():
        if total:
            stacks.setdefault(place.stack, []).append(place)
    return [_grid(stack, places, sums) for stack, places in stacks.items()]


def _grid(stack: str, places: list[Place], sums: dict[Place, tuple[float, float]]) -> WeightGrid:
    sizes: dict[str, float] = {}
    for place in places:
        sizes[place.kind] = sizes.get(place.kind, 0.0) + sums[place][0]
    largest = set(sorted(sizes, key=lambda kind: -sizes[kind])[:KINDS])
    kinds = [kind for kind in sizes if kind in largest]
    layers = sorted({place.layer for place in places})
    means = {(place.layer, place.kind): sums[place][1] / sums[place][0] for place in places}
    rows = [[means.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    return WeightGrid(stack, layers, kinds, rows, len(sizes) - len(kinds))


def element_count(shape: Sequence[int]) -> int:
    """Elements of a tensor, at most 2^62: a damaged report may claim anything."""
    return min(max(prod(shape), 0), 1 << 62)


def _is_number(part: str) -> bool:
    return len(part) <= _DIGITS and part.isascii() and part.isdecimal()
