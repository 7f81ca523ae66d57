"""The walk over a model's parts, forward and back, with the weights of one part in memory at a time.

Forward: the hidden states at the boundaries between layers go to scratch files. Back: each layer runs again from its
stored input, which completes the importance of its parameters before the layer below is touched.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from perta_fast.streaming.data_pass import DataPass, Means
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One part of the model, run for one group of samples.

    kind: ``embed``, then ``forward`` for each layer; ``head``, then ``backward`` for each layer from the last, then
    ``embed_backward`` (the embedding and the resident parameters). ``recompute``: a layer forward once more, for a
    boundary that was discarded.
    """

    group: int
    kind: Literal["embed", "forward", "head", "recompute", "backward", "embed_backward"]
    layer: int = 0


def steps_of(layer_count: int, schedule: Schedule) -> list[Step]:
    """The whole walk in order."""
    steps = []
    for group in range(schedule.groups):
        steps.append(Step(group, "embed"))
        steps += [Step(group, "forward", layer) for layer in range(layer_count)]
        steps.append(Step(group, "head"))
        for layer in reversed(range(layer_count)):
            kept = layer - layer % schedule.every
            if layer == min(kept + schedule.every, layer_count) - 1:
                steps += [Step(group, "recompute", below) for below in range(kept, layer)]
            steps.append(Step(group, "backward", layer))
        steps.append(Step(group, "embed_backward"))
    return steps


def parameters_of(step: Step, structure: Structure) -> list[str]:
    """The parameters that a step needs in memory, beside the resident ones."""
    if step.kind in ("embed", "embed_backward"):
        return [structure.embedding]
    if step.kind == "head":
        return [] if structure.head is None else [structure.head]
    return structure.by_layer[step.layer]


def steps_per_sample(layer_count: int, schedule: Schedule) -> int:
    """How many steps each sample runs through: all those of its group."""
    return len(steps_of(layer_count, schedule)) // schedule.groups


class Walk:
    """Takes data sets through a skeleton's parts together, and reads each part once for all of them.

    Memory: the weights of one part (two with ``schedule.overlap``), 4 bytes for each of its parameters and each data
    set, and the activations of one batch in one layer. ``read_seconds``: the time that reading weights took;
    ``waited_seconds``: how much of it the walk waited for.
    """

    def __init__(self, skeleton: Skeleton, passes: Sequence[DataPass], schedule: Schedule) -> None:
        self._skeleton, self._passes, self._overlap = skeleton, passes, schedule.overlap
        self.steps = steps_of(len(skeleton.layers), schedule)
        self.read_seconds = self.waited_seconds = 0.0

    def run(self, end_step: Callable[[int, list[Means]], None], begin: int = 0) -> None:
        """Do all steps from number ``begin`` on.

        end_step: called after each step with the number of the next one and, for each data set, the means that this
        step completes (none if a later group adds to them).
        """
        skeleton = self._skeleton
        with (
            skeleton.partial_forward.installed(),
            skeleton.in_memory(skeleton.resident),
            ThreadPoolExecutor(1) as reader,
        ):
            if begin == 0:
                with skeleton.in_memory(skeleton.vocabulary):
                    self._passes[0].check()
            ahead: Future[dict[str, Tensor]] | None = None
            for number, step in enumerate(self.steps[begin:], begin):
                reading = ahead or reader.submit(self._read, step)
                if step.kind != "embed" and self._passes[0].outside_plan is None:  # also when it is resumed
                    with skeleton.in_memory(skeleton.vocabulary):
                        for data in self._passes:
                            data.plan_outside()
                started = time.perf_counter()
                values = reading.result()
                self.waited_seconds += time.perf_counter() - started
                if self._overlap and number + 1 < len(self.steps):
                    ahead = reader.submit(self._read, self.steps[number + 1])
                if step.kind == "embed" or number == begin:
                    for data in self._passes:
                        data.begin(step.group)
                with skeleton.holding(values):
                    del values, reading
                    means = [self._run(step, data) for data in self._passes]
                end_step(number + 1, means)
                del means

    def _read(self, step: Step) -> dict[str, Tensor]:
        started = time.perf_counter()
        values = self._skeleton.read(parameters_of(step, self._skeleton))
        self.read_seconds += time.perf_counter() - started
        return values

    @staticmethod
    def _run(step: Step, data: DataPass) -> Means:
        match step.kind:
            case "embed":
                data.embed()
            case "forward" | "recompute":
                data.forward(step.layer, recompute=step.kind == "recompute")
            case "head":
                return data.head()
            case "backward":
                return data.backward(step.layer)
            case "embed_backward":
                return data.embed_backward()
        return {}
