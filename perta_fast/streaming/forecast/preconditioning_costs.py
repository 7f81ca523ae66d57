"""The costs of preconditioning, layer by layer, on one walk forward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from perta_fast.preconditioning.input_moments import in_size
from perta_fast.preconditioning.solve import ROWS
from perta_fast.streaming.forecast.costs import Costs, Estimate, Load
from perta_fast.streaming.forecast.trial import Cost, Trial
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.compute import buffer_bytes

_FLOAT32 = 4
# Bytes of an element while a map is changed. Of A: its factor, in float64. Of D: theta_0, theta_f, their difference,
# the result and the sum, in float32. Of the rows that are solved for: given, in the solver and solved, in float64.
_OF_MOMENT, _OF_VECTOR, _OF_ROWS = 8, 5 * 4, 3 * 8


class PreconditioningEstimate(Estimate):
    """Of ``precondition``, or of ``unlearn`` by rule ``preconditioned``. The load has the retain data.

    low_rank: theta_f is an adapter, which takes next to nothing; otherwise it is a checkpoint.
    """

    overlaps = False

    def __init__(
        self, structure: Structure, load: Load, device: torch.device, *, low_rank: bool = False, threads: int = 1
    ) -> None:
        super().__init__(structure, load, device)
        self._low_rank, self._threads = low_rank, threads
        self._trial = Trial(structure, self.here, squares=False)

    def costs(self, schedule: Schedule) -> Costs:
        host, device = self.memory(schedule)
        stored, structure = self._stored(self._counts), self.structure
        vector = 0 if self._low_rank else 2 * stored
        subtracted = stored + (0 if self._low_rank else stored + self._vector_bytes) if self.load.subtract else 0
        layers = range(len(structure.layers))
        return Costs(
            host=host,
            device=device,
            scratch=self.scratch(schedule),
            weights_read=stored,
            scratch_moved=len(layers) * self.scratch(schedule),
            result_read=vector + subtracted,
            result_written=self.result_bytes,
            flops=sum(self._arithmetic(schedule, partial(self._sample_flops, layer)) for layer in layers),
            double_flops=sum(self._solution_flops(layer) for layer in layers),
            bound=any(self._activations(layer, schedule).bound for layer in layers),
        )

    def scratch(self, schedule: Schedule) -> int:
        return 2 * self._row * sum(map(sum, self.load.lengths))

    @property
    def result_bytes(self) -> int:
        return self._vector_bytes + (self._stored(self._counts) if self.load.subtract else 0)

    def plan(self, schedule: Schedule) -> str:
        return f"batches of {schedule.batch_size}, one walk forward, one layer at a time"

    @property
    def _vector_bytes(self) -> int:
        """The preconditioned theta_f on the disk."""
        return 0 if self._low_rank else _FLOAT32 * sum(self._counts.values())

    def _memory_by_step(self, schedule: Schedule) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """Before the layers, while each is run and then changed, at the end."""
        structure = self.structure
        resident, vocabulary = self._bytes(structure.resident), self._bytes(structure.vocabulary)
        count, tokens = self._batches(schedule)[0][0]
        embedded = 2 * count * tokens * self._row
        yield self._on({}, {"weights": resident + vocabulary, "activations": embedded})
        ids = 8 * sum(count * tokens for count, tokens in self._batches(schedule)[0])
        for layer, names in enumerate(structure.by_layer):
            weights = resident + self._bytes(names)
            sums = self._trial.inputs(layer, 1, 2).bytes  # next to none of it are activations
            activations = max(0, self._activations(layer, schedule).bytes - sums)
            held = {"weights": weights, "moments of inputs": sums}
            written = 0 if self._low_rank else 2 * _FLOAT32 * sum(self._counts[name] for name in names)
            yield self._on({"task vector": written}, {**held, "activations": activations + ids})
            yield self._on({"task vector": written}, {**held, "solutions": self._solution(layer)})
        if self.load.subtract:
            yield {"buffers": buffer_bytes(self._threads)}, {}

    def _on(self, host: dict[str, int], device: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        if self.device.type == "cpu":
            return {**host, **device}, {}
        return {**host, "weights": device["weights"]}, device

    def _activations(self, layer: int, schedule: Schedule) -> Cost:
        return self._trial.inputs(layer, *self._batches(schedule)[0][0])

    def _solution(self, layer: int) -> int:
        """The memory that changing the largest map of a layer takes."""
        return max((solution_bytes(self._rows(of), size) for size, of in self._maps(layer)), default=0)

    def _solution_flops(self, layer: int) -> float:
        """A factor of each moment, and two triangular systems for each row."""
        return sum(size**3 / 3 + 2 * self._rows(of) * size**2 for size, of in self._maps(layer))

    def _sample_flops(self, layer: int, tokens: int) -> int:
        return self._trial.inputs(layer, 1, tokens).flops

    def _maps(self, layer: int) -> Iterator[tuple[int, Any]]:
        """The linear maps of a layer, each with the length of its input."""
        return ((in_size(of), of) for of in self._trial.maps[layer].values())

    def _rows(self, layer: Any) -> int:
        """The rows of a map's D that are solved for."""
        return 0 if self._low_rank else layer.weight.numel() // in_size(layer)


def solution_bytes(rows: int, size: int) -> int:
    """The memory that changing a map takes: of ``rows`` rows of D, with inputs of this size."""
    return size * (_OF_MOMENT * size + _OF_VECTOR * rows + _OF_ROWS * min(rows, ROWS))
