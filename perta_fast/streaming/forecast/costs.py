"""The costs of a streamed run: memory, scratch, bytes moved, arithmetic; from the model's structure alone.

They come from the walk's own list of steps, with sizes instead of tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from perta_fast.distributed.ranks import deal
from perta_fast.importance.per_sample import PROBE_SAMPLES, PROBE_TOKENS
from perta_fast.streaming.forecast.trial import Cost, Trial
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.walk import Step, parameters_of, steps_of
from perta_fast.subtraction.compute import buffer_bytes

_SUM = 4  # bytes of an element of a sum
_File = tuple[str, object, int]  # a scratch file: its kind, which one of that kind, and its group


@dataclass(frozen=True)
class Load:
    """The data of a run, and what the run does with it.

    lengths: tokens of each sample, for each data set. squares: the estimator is empirical-fisher. subtract: the run
    unlearns, and does not only estimate an importance; kept: it then keeps the importances.
    """

    lengths: Sequence[Sequence[int]]
    squares: bool = False
    subtract: bool = True
    kept: bool = False

    def share(self, ranks: int) -> "Load":
        """For each data set, the largest share that a rank gets."""
        dealt = [[[tokens[k] for k in numbers] for numbers in deal(tokens, ranks)] for tokens in self.lengths]
        return replace(self, lengths=[max(shares, key=sum) for shares in dealt])


@dataclass(frozen=True)
class Costs:
    """Costs in bytes and floating-point operations.

    host, device: peak memory by kind, beside the interpreter and its libraries; ``device`` is None if the model runs on
    the CPU. scratch: peak disk space. weights_read: of the model that is walked. scratch_moved: read and written.
    result_read, result_written: for the subtraction and the importances that are kept. flops: of matrix products.
    bound: some part could not be tried, so memory and flops are bounds from its shapes.
    """

    host: dict[str, int]
    device: dict[str, int] | None
    scratch: int
    weights_read: int
    scratch_moved: int
    result_read: int
    result_written: int
    flops: float
    bound: bool

    @property
    def host_bytes(self) -> int:
        """The sum over all kinds."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """The sum over all kinds; 0 on the CPU."""
        return sum((self.device or {}).values())


class Estimate:
    """Costs of schedules for one model, one load and one device.

    ``here``: the device, or the CPU if torch finds no such device on this machine.
    """

    def __init__(self, structure: Structure, load: Load, device: torch.device, threads: int = 1) -> None:
        self.structure, self.load, self.device, self._threads = structure, load, device, threads
        self.here = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        self._trial = Trial(structure, self.here, load.squares)
        parameters = dict(structure.model.named_parameters())
        self._counts = {name: parameter.numel() for name, parameter in parameters.items()}
        self._sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
        model: Any = structure.model
        self.width: int = model.config.get_text_config().hidden_size
        self.dtype: torch.dtype = model.dtype
        self._row: int = self.width * self.dtype.itemsize

    def costs(self, schedule: Schedule) -> Costs:
        """The costs of one schedule."""
        host, device = self.memory(schedule)
        steps = self._steps(schedule)
        structure = self.structure
        times = 2 if self.load.squares else 1  # for the check of the structure and, with squares, for the plan
        return Costs(
            host=host,
            device=device,
            scratch=self.scratch(schedule),
            weights_read=self._bytes([*structure.resident, *times * structure.vocabulary])
            + sum(self._bytes(parameters_of(step, self.structure)) for step in steps),
            scratch_moved=self._scratch_moved(schedule),
            result_read=3 * self._bytes(list(self._sizes)) if self.load.subtract else 0,
            result_written=self.result_bytes,
            flops=self._flops(schedule),
            bound=any(
                self._batch_cost(step, *batches[0]).bound
                for step in _of_one_group(steps)
                for batches in self._batches(schedule)
            ),
        )

    @property
    def result_bytes(self) -> int:
        """Disk space of the result."""
        importance = self._sum_bytes(list(self._counts)) if self.load.kept or not self.load.subtract else 0
        return importance + (self._bytes(list(self._sizes)) if self.load.subtract else 0)

    def _steps(self, schedule: Schedule) -> list[Step]:
        return steps_of(len(self.structure.layers), schedule)

    def _summed(self, step: Step) -> list[str]:
        """Parameters that have their sums in memory."""
        if step.kind in ("embed", "forward", "recompute"):
            return []
        return [
            *(self.structure.resident if step.kind in ("head", "embed_backward") else []),
            *parameters_of(step, self.structure),
        ]

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return _SUM * len(self.load.lengths) * sum(self._counts[name] for name in names)

    # Memory.

    def memory(self, schedule: Schedule) -> tuple[dict[str, int], dict[str, int] | None]:
        """Peak memory of the host and of the device, by kind; it does not depend on ``groups``."""
        moments = list(self._moments(schedule))
        host = max((host for host, _ in moments), key=lambda kinds: sum(kinds.values()))
        device = max((device for _, device in moments), key=lambda kinds: sum(kinds.values()))
        return host, device or None

    def _moments(self, schedule: Schedule) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """Memory by kind of host and device, at the start and in each step."""
        steps = _of_one_group(self._steps(schedule))
        resident = self._bytes(self.structure.resident)
        vocabulary = resident + self._bytes(self.structure.vocabulary)
        if self.load.squares:
            vocabulary += self._bytes(parameters_of(steps[1], self.structure)) if len(steps) > 1 else 0
        yield self._by_kind(vocabulary, vocabulary, 0, 0, 0)
        ids = 8 * sum(count * tokens for batches in self._batches(schedule) for count, tokens in batches)
        behind = 0
        for step, after in pairwise([*steps, steps[-1]]):
            weights = self._bytes(parameters_of(step, self.structure))
            ahead = self._bytes(parameters_of(after, self.structure)) if schedule.overlap else 0
            sums = self._sum_bytes(self._summed(step))
            activations = max(self._batch_cost(step, *batches[0]).bytes for batches in self._batches(schedule))
            yield self._by_kind(resident + weights + ahead, resident + weights, sums, behind, activations + ids)
            behind = sums if schedule.overlap else 0

    def _by_kind(
        self, read: int, held: int, sums: int, behind: int, activations: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Memory of host and device. read, held: weights there; behind: sums of the step that is being written."""
        buffers = buffer_bytes(self._threads) if self.load.subtract else 0
        if self.device.type == "cpu":
            kinds = {"weights": read, "sums": sums + behind, "activations": activations, "buffers": buffers}
            return kinds, {}
        host = {"weights": read, "sums": max(sums, behind), "buffers": buffers}
        return host, {"weights": held, "sums": sums + behind, "activations": activations}

    def _lengths(self, schedule: Schedule) -> list[list[list[int]]]:
        """The tokens of each sample of each batch of each data set, in order, the longest first."""
        size = schedule.batch_size
        ordered = [sorted(lengths, reverse=True) for lengths in self.load.lengths]
        return [[order[k : k + size] for k in range(0, len(order), size)] for order in ordered]

    def _batches(self, schedule: Schedule) -> list[list[tuple[int, int]]]:
        """(samples, tokens of the longest) of the same batches."""
        return [[(len(batch), batch[0]) for batch in batches] for batches in self._lengths(schedule)]

    def _batch_cost(self, step: Step, count: int, tokens: int) -> Cost:
        match step.kind:
            case "embed":
                return Cost(2 * count * tokens * self._row, 0)
            case "forward" | "recompute":
                return self._trial.forward(step.layer, count, tokens)
            case "backward":
                return self._trial.backward(step.layer, count, tokens)
            case "head":
                return self._trial.head(count, tokens)
            case "embed_backward":
                return self._trial.embed_backward(count, tokens)

    # Scratch disk.

    def scratch(self, schedule: Schedule) -> int:
        """Peak size of all scratch files; a run that subtracts with overlap removes files one step later."""
        files: dict[_File, int] = {}
        discarded: list[_File] = []
        late = self.load.subtract and schedule.overlap
        last, probe = len(self.structure.layers), self._row * sum(map(_probe_tokens, self.load.lengths))
        batches = self._lengths(schedule)
        tokens = [
            sum(sum(map(sum, schedule.of_group(of_set, group))) for of_set in batches)
            for group in range(schedule.groups)
        ]
        now = most = 0
        for step in self._steps(schedule):
            made, unneeded = self._files(step, schedule, last)
            rows = self._row * tokens[step.group]
            for key in made:
                kind, which, _ = key
                if key in files:
                    continue
                if kind in ("hidden", "gradient"):
                    size = rows
                elif kind == "probe":
                    size = probe
                elif kind == "head rows":
                    # A row for each token, and one for the padding of each sample.
                    size = (tokens[step.group] + sum(map(len, self.load.lengths))) * self.width * _SUM
                else:
                    size = self._sum_bytes(which)  # type: ignore[arg-type]
                files[key] = size
                now += size
            most = max(most, now)
            for key in discarded if late else unneeded:
                now -= files.pop(key, 0)
            discarded = unneeded
        return most

    def _files(self, step: Step, schedule: Schedule, last: int) -> tuple[list[_File], list[_File]]:
        """Files that ``DataPass`` makes in a step, and files that it does not need after it."""
        structure, group, n = self.structure, step.group, step.layer
        waiting = ("waiting", (*structure.resident, *([structure.embedding] if structure.tied else [])), group)
        head_rows = [("head rows", 0, group)] if structure.tied and self.load.squares else []
        made: list[_File] = []
        unneeded: list[_File] = []
        if step.kind == "embed":
            made = [("hidden", 0, group), ("probe", 0, 0)]
        elif step.kind in ("forward", "recompute"):
            made = [("hidden", n + 1, group), ("probe", n + 1, 0)]
            unneeded = [("hidden", n, group)] if step.kind == "forward" and n % schedule.every else []
        elif step.kind == "head":
            made = [("gradient", last, group), waiting, *head_rows]
            unneeded = [("hidden", last, group)]
        elif step.kind == "backward":
            made = [("gradient", n, group)]
            unneeded = [("hidden", n, group), ("gradient", n + 1, group)]
        else:
            unneeded = [("gradient", 0, group), waiting, *head_rows]
        names = self._summed(step)
        if step.kind == "head":  # the sums of the resident parameters wait for the end
            unneeded += [("sum", (*structure.resident,), group - 1)]
            names = [] if structure.tied else parameters_of(step, self.structure)
        for part in [structure.resident, [structure.embedding]] if step.kind == "embed_backward" else [names]:
            unneeded.append(("sum", tuple(part), group - 1))
            if part and group < schedule.groups - 1:
                made.append(("sum", tuple(part), group))
        return made, unneeded

    def _scratch_moved(self, schedule: Schedule) -> int:
        times = {"embed": 1, "forward": 2, "recompute": 2, "head": 2, "backward": 3, "embed_backward": 1}
        steps = _of_one_group(self._steps(schedule))
        rows = self._row * sum(map(sum, self.load.lengths)) * sum(times[step.kind] for step in steps)
        return rows + 2 * (schedule.groups - 1) * self._sum_bytes(list(self._counts))

    # Arithmetic.

    def _flops(self, schedule: Schedule) -> float:
        """Each part takes a T + b T^2 for a sample of T tokens; trials at two lengths give a and b."""
        batches = [batch for of_set in self._batches(schedule) for batch in of_set]
        longest = max(tokens for _, tokens in batches)
        half = max(2, longest // 2)
        linear = sum(count * tokens for count, tokens in batches)
        square = sum(count * tokens**2 for count, tokens in batches)
        total = 0.0
        for step in _of_one_group(self._steps(schedule)):
            at_longest = self._batch_cost(step, 1, longest).flops / longest  # FLOPs a token
            b = 0.0
            if half < longest:
                b = (at_longest - self._batch_cost(step, 1, half).flops / half) / (longest - half)
            total += (at_longest - b * longest) * linear + b * square
        return total


def _of_one_group(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.group == 0]


def _probe_tokens(lengths: Sequence[int]) -> int:
    """As in ``probe_inputs``."""
    return sum(min(int(PROBE_TOKENS), lengths[k % len(lengths)]) for k in range(PROBE_SAMPLES))
