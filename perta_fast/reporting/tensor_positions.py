"""The position of a tensor in a model, from its name: stack of layers, layer, kind of module."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from perta_fast.records.report import TensorReport

_DIGITS = 6  # a longer number is not that of a layer
KINDS = 40  # columns that a reader can still tell apart


@dataclass(frozen=True)
class Position:
    """``model.layers.3.mlp.up_proj.weight`` is in stack ``model.layers``, in layer 3, of kind ``mlp.up_proj``."""

    stack: str
    layer: int
    kind: str


@dataclass(frozen=True)
class WeightGrid:
    """Mean w of one stack: ``rows[i][k]`` is that of ``layers[i]`` and ``kinds[k]``, NaN if there is none.

    left_out: the number of kinds beyond the ``KINDS`` with the most parameters.
    """

    stack: str
    layers: list[int]
    kinds: list[str]
    rows: list[list[float]]
    left_out: int


def position_of(name: str) -> Position | None:
    """The position of a tensor; None if it is outside all layers.

    The first number in ``name`` is the layer's. Later numbers, those of experts, become ``*``.
    """
    parts = name.split(".")
    for k, part in enumerate(parts[1:-1], start=1):
        if _is_number(part):
            kind = ".".join("*" if _is_number(later) else later for later in parts[k + 1 :])
            return Position(".".join(parts[:k]), int(part), kind.removesuffix(".weight"))
    return None


def weight_grids(tensors: Iterable[TensorReport]) -> list[WeightGrid]:
    """Mean w over elements, by layer and kind of module, one grid for each stack."""
    sums: dict[Position, tuple[float, float]] = {}
    for row in tensors:
        position = position_of(row.name)
        if position is None or row.mean_weight is None or not 0 <= row.mean_weight <= 1:  # outside: damaged
            continue
        elements = float(element_count(row.shape))
        total, weight = sums.get(position, (0.0, 0.0))
        sums[position] = total + elements, weight + elements * row.mean_weight
    stacks: dict[str, list[Position]] = {}
    for position, (total, _) in sums.items():
        if total:
            stacks.setdefault(position.stack, []).append(position)
    return [_grid(stack, positions, sums) for stack, positions in stacks.items()]


def _grid(stack: str, positions: list[Position], sums: dict[Position, tuple[float, float]]) -> WeightGrid:
    sizes: dict[str, float] = {}
    for position in positions:
        sizes[position.kind] = sizes.get(position.kind, 0.0) + sums[position][0]
    largest = set(sorted(sizes, key=lambda kind: -sizes[kind])[:KINDS])
    kinds = [kind for kind in sizes if kind in largest]
    layers = sorted({position.layer for position in positions})
    means = {(position.layer, position.kind): sums[position][1] / sums[position][0] for position in positions}
    rows = [[means.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    return WeightGrid(stack, layers, kinds, rows, len(sizes) - len(kinds))


def element_count(shape: Sequence[int]) -> int:
    """The number of elements of a tensor, at most 2^62, since a damaged report may have any shape."""
    return min(max(prod(shape), 0), 1 << 62)


def _is_number(part: str) -> bool:
    return len(part) <= _DIGITS and part.isascii() and part.isdecimal()
