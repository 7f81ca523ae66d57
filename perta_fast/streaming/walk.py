"""The walk over a model's parts, forward and back, with the weights of one in memory at a time.

Forward: the hidden states at the boundaries between layers are spilled. Back: each layer is run again from what
it was given, and what its parameters are due is complete before the layer below is touched.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from perta_fast.streaming.data_pass import DataPass, Means
from perta_fast.streaming.model.passage import Passage
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One part of the model, run for one group of samples.

    kind: ``embed`` and ``climb`` (a layer) forward; ``head``, ``layer`` and ``end`` (the embedding, and all
    that is left) back; ``again``, a layer climbed once more for a boundary that was not kept.
    """

    group: int
    kind: Literal["embed", "climb", "head", "again", "layer", "end"]
    layer: int = 0


def steps_of(layer_count: int, schedule: Schedule) -> list[Step]:
    """The whole walk in order."""
    steps = []
    for group in range(schedule.groups):
        steps.append(Step(group, "embed"))
        steps += [Step(group, "climb", layer) for layer in range(layer_count)]
        steps.append(Step(group, "head"))
        for layer in reversed(range(layer_count)):
            kept = layer - layer % schedule.every
            if layer == min(kept + schedule.every, layer_count) - 1:
                steps += [Step(group, "again", below) for below in range(kept, layer)]
            steps.append(Step(group, "layer", layer))
        steps.append(Step(group, "end"))
    return steps


def names_of(step: Step, structure: Structure) -> list[str]:
    """The parameters whose values a step needs, beside the resident ones."""
    if step.kind in ("embed", "end"):
        return [structure.embedding]
    if step.kind == "head":
        return [] if structure.head is None else [structure.head]
    return structure.by_layer[step.layer]


def handlings(layer_count: int, schedule: Schedule) -> int:
    """How often a walk runs each sample through a part of the model."""
    return len(steps_of(layer_count, schedule)) // schedule.groups


class Walk:
    """Takes data sets through a skeleton's parts together, so that each part is read once for all of them.

    Memory: the weights of one part (two with ``schedule.overlap``), 4 bytes for each of its parameters and each
    data set, and the activations of one batch in one layer. ``read_seconds``: time spent reading weights;
    ``waited_seconds``: the part of it that nothing else hid.
    """

    def __init__(
        self, skeleton: Skeleton, passage: Passage, passes: Sequence[DataPass], schedule: Schedule
    ) -> None:
        self._skeleton, self._passage, self._passes = skeleton, passage, passes
        self._overlap = schedule.overlap
        self.steps = steps_of(len(skeleton.layers), schedule)
        self.read_seconds = self.waited_seconds = 0.0

    def run(self, settle: Callable[[int, list[Means]], None], begin: int = 0) -> None:
        """Do all steps from number ``begin`` on.

        settle: called after each with the number of the next and what has become complete in it: means by
        parameter name for each data set, nothing where ``begin`` or a later group has still to add to them.
        """
        skeleton = self._skeleton
        with (
            self._passage.installed(),
            skeleton.in_memory(skeleton.resident),
            ThreadPoolExecutor(1) as reader,
        ):
            if begin == 0:
                with skeleton.in_memory(skeleton.vocabulary):
                    self._passes[0].check()
            ahead: Future[dict[str, Tensor]] | None = None
            for each in self._passes:
                each.begin(self.steps[begin].group if begin < len(self.steps) else 0)
            for number, step in enumerate(self.steps[begin:], begin):
                coming = ahead or reader.submit(self._read, step)
                if step.kind != "embed":
                    self._plan_outside()
                started = time.perf_counter()
                values = coming.result()
                self.waited_seconds += time.perf_counter() - started
                if self._overlap and number + 1 < len(self.steps):
                    ahead = reader.submit(self._read, self.steps[number + 1])
                with skeleton.holding(values):
                    del values, coming
                    means = [self._do(step, each) for each in self._passes]
                settle(number + 1, means)
                del means

    def _plan_outside(self) -> None:
        """Once there are hidden states to look at; after the walk was taken up again, before its next step."""
        wanting = [each for each in self._passes if each.wants_plan]
        if wanting:
            with self._skeleton.in_memory(self._skeleton.vocabulary):
                for each in wanting:
                    each.plan_outside()

    def _read(self, step: Step) -> dict[str, Tensor]:
        started = time.perf_counter()
        values = self._skeleton.read(names_of(step, self._skeleton))
        self.read_seconds += time.perf_counter() - started
        return values

    @staticmethod
    def _do(step: Step, data: DataPass) -> Means:
        match step.kind:
            case "embed":
                data.begin(step.group)
                data.embed()
            case "climb":
                data.climb(step.layer)
            case "again":
                data.climb(step.layer, again=True)
            case "head":
                return data.head()
            case "layer":
                return data.layer(step.layer)
            case "end":
                return data.end()
        return {}
