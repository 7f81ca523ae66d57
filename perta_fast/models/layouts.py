"""Two forms of one model's tensors, as the experts of a layer apart and joined: which elements are which.

A layout says of which stored tensors each entry of a state dict is made, by transformers' own conversions. So a tensor
of one layout is some ranges of those of another. No value is read.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.wrappers import by_plain_name
from perta_fast.errors import InputError, tensors_named
from perta_fast.models.stored_names import LoadedGroup, as_stored, loaded_groups, number_width, numbered, runs_of

_MOST_NUMBERS = 1 << 26  # of elements that are followed one by one: more are in another order for sure

Shapes = Mapping[str, Sequence[int]]
_Numbered = list[tuple[int, int, int]]  # runs: the number of a group's tensor, first element, count


@dataclass(frozen=True)
class Run:
    """``count`` consecutive elements of the tensor ``name``, from element ``first`` on."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Layout:
    """Of what each entry of a state dict is made. where: what messages call it.

    shapes: of the entries. runs: of the stored tensors that make an entry, one after another.
    """

    where: object
    shapes: dict[str, tuple[int, ...]]
    runs: dict[str, list[Run]]

    @classmethod
    def of_checkpoint(cls, model: Any, where: object, stored: Shapes, known: Collection[str]) -> "Layout":
        """How ``model``, which may be without weights, is made of ``stored`` tensors.

        Groups of tensors that are all ``known`` by these names on the other side are left out. Raises InputError if
        two are loaded to one place, one is missing within a group, or elements come in another order.
        """
        state, shapes, runs = model.state_dict(), {}, {}
        like = {plain: state[name] for plain, name in by_plain_name(state, "the module").items()}
        alike: dict[object, list[_Numbered]] = {}
        for group in loaded_groups(model, stored).values():
            if any(name not in known for name in group.stored):
                for entry, (shape, made) in _made(model, group, where, stored, like, alike).items():
                    shapes[entry], runs[entry] = shape, made
        return cls(where, shapes, runs)

    @classmethod
    def of_places(cls, places: Mapping[str, tuple[Sequence[int], Mapping[str, tuple[int, Sequence[int]]]]]) -> "Layout":
        """Of a module. places: by parameter, its shape and its ``stored_places``."""
        shapes = {entry: tuple(shape) for entry, (shape, _) in places.items()}
        runs = {
            entry: [Run(name, 0, math.prod(shape)) for name, (_, shape) in sorted(stored.items(), key=_first)]
            for entry, (_, stored) in places.items()
        }
        return cls("the module", shapes, runs)

    def placed(self, place: Callable[[str], str]) -> "Layout":
        """The same, with entries called by their ``place``."""
        shapes = {place(entry): shape for entry, shape in self.shapes.items()}
        return Layout(self.where, shapes, {place(entry): runs for entry, runs in self.runs.items()})

    def cut_from(self, other: "Layout") -> dict[str, list[Run]]:
        """The tensors of this layout as runs of those of ``other``, where that has all of their entries.

        Raises InputError if an entry has another shape and is not one tensor in both.
        """
        ranges: dict[str, list[tuple[int, str, int, int]]] = {}  # of entries, from which element of the tensor on
        for entry, runs in self.runs.items():
            begin = 0
            for run in runs:
                ranges.setdefault(run.name, []).append((run.first, entry, begin, run.count))
                begin += run.count
        return {
            name: _merged(
                run for _, entry, begin, count in sorted(parts) for run in self._cut(other, entry, begin, count)
            )
            for name, parts in ranges.items()
            if all(entry in other.runs for _, entry, _, _ in parts)
        }

    def _cut(self, other: "Layout", entry: str, begin: int, count: int) -> list[Run]:
        runs = other.runs[entry]
        if self.shapes[entry] == other.shapes[entry]:
            return _within(runs, begin, count)
        if len(runs) == len(self.runs[entry]) == 1:  # as of a vocabulary that was resized: tensors are compared later
            return runs
        raise InputError(
            f"{entry} has shape {list(self.shapes[entry])} in {self.where}, {list(other.shapes[entry])} in "
            f"{other.where}; these are not of one model"
        )


def values_of(runs: Sequence[Run], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The elements of these runs of ``tensors``, flat; they are copied if there is more than one run."""
    parts = [tensors[run.name].reshape(-1)[run.first : run.first + run.count] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _first(item: tuple[str, tuple[int, Sequence[int]]]) -> int:
    return item[1][0]


def _within(runs: Iterable[Run], begin: int, count: int) -> list[Run]:
    """Those of ``runs``, cut, that make ``count`` elements from element ``begin`` on."""
    result, position = [], 0
    for run in runs:
        start, stop = max(begin - position, 0), min(begin + count - position, run.count)
        if start < stop:
            result.append(Run(run.name, run.first + start, stop - start))
        position += run.count
    return result


def _merged(runs: Iterable[Run]) -> list[Run]:
    """The runs, with those made one that follow each other in a tensor."""
    result: list[Run] = []
    for run in runs:
        last = result[-1] if result else None
        if last is not None and last.name == run.name and last.first + last.count == run.first:
            result[-1] = Run(run.name, last.first, last.count + run.count)
        else:
            result.append(run)
    return result


def _made(
    model: Any,
    group: LoadedGroup,
    where: object,
    stored: Shapes,
    like: Mapping[str, torch.Tensor],
    alike: dict[object, list[_Numbered]],
) -> dict[str, tuple[tuple[int, ...], list[Run]]]:
    """The shapes of the entries that a group makes, and of which runs; see ``Layout.of_checkpoint``.

    alike: what was found for groups of the same kind, as those of other layers.
    """
    names = list(group.stored)
    if group.converter is None or any(pattern == name for name, pattern in group.stored.items()):
        if len(names) > 1:
            raise InputError(
                f"{where}: transformers loads {names[0]} and {names[-1]} to one place; remove the one that is out of "
                "date"
            )
        shape = tuple(stored[names[0]])
        return {group.target: (shape, [Run(names[0], 0, math.prod(shape))])}
    try:
        made = group.convert(model, {name: torch.empty(*stored[name], device="meta") for name in names})
    except Exception as error:  # shapes that do not fit together, or a missing tensor
        raise InputError(f"{where}: {_why_not(model, group, stored, like)}") from error
    shapes = {entry: tuple(tensor.shape) for entry, tensor in made.items()}
    if any(entry in like and like[entry].shape != shape for entry, shape in shapes.items()):
        raise InputError(f"{where}: {_why_not(model, group, stored, like)}")
    kind = (id(group.converter), *((pattern, tuple(stored[name])) for name, pattern in group.stored.items()))
    if kind not in alike:
        alike[kind] = _followed(model, group, {name: stored[name] for name in names}, shapes)
    runs = alike[kind]
    if not runs:
        advice = ""
        if isinstance(where, Path):
            write = conversion_command(where, save=", save_original_format=False")
            advice = f"; save it as it is in memory with: {write}"
        raise InputError(
            f"{where}: {group.target} has the elements of {names[0]} in another order, so a checkpoint that stores the "
            f"one cannot be matched with one that stores the other{advice}"
        )
    return {
        entry: (shape, [Run(names[number], first, count) for number, first, count in of_entry])
        for (entry, shape), of_entry in zip(shapes.items(), runs, strict=True)
    }


def _followed(model: Any, group: LoadedGroup, stored: Shapes, shapes: Shapes) -> list[_Numbered]:
    """Of which runs the entries of these ``shapes`` are made; nothing if it is not each stored element, in order."""
    width = number_width([*stored.values(), *shapes.values()])
    begins = [0, *accumulate(map(math.prod, stored.values()))]
    if begins[-1] // width > _MOST_NUMBERS:
        return []
    numbers = {
        name: numbered(shape, width, begin) for (name, shape), begin in zip(stored.items(), begins, strict=False)
    }
    try:
        made = group.convert(model, numbers)
    except Exception:  # of what transformers does with them, nothing is known
        return []
    runs = [runs_of(made[entry], shape, width) for entry, shape in shapes.items()]
    end = 0
    for first, count in sorted(run for of_entry in runs for run in of_entry):
        end = end + count if first == end else -1
    if end != begins[-1] or sum(map(len, runs)) > max(len(stored), len(shapes)):
        return []
    return [_by_tensor(of_entry, begins) for of_entry in runs]


def _why_not(model: Any, group: LoadedGroup, stored: Shapes, like: Mapping[str, torch.Tensor]) -> str:
    """Which tensors a group lacks, of those that transformers would save for its first entry; or what else is wrong."""
    try:
        needed = as_stored(model, {group.target: like[group.target]})
    except Exception:  # an entry that transformers cannot save alone
        needed = {}
    missing = [name for name in needed if name not in stored]
    if 0 < len(missing) < len(needed):
        return f"lacks {tensors_named(missing)}"
    return f"{group.why_not(stored)}; its config.json calls for {list(like[group.target].shape)}"


def _by_tensor(runs: Iterable[tuple[int, int]], begins: Sequence[int]) -> _Numbered:
    """Runs over tensors that follow each other as runs of each. begins: where each begins, and the last one ends."""
    result = []
    for first, count in runs:
        while count:
            number = bisect_right(begins, first) - 1
            part = min(count, begins[number + 1] - first)
            result.append((number, first - begins[number], part))
            first, count = first + part, count - part
    return result
