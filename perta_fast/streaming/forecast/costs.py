"""What a streamed run will take: memory, scratch, bytes moved, arithmetic; from the model's structure alone.

The walk's own list of steps is gone through with sizes in place of tensors.
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


@dataclass(frozen=True)
class Load:
    """What goes through a model, and what for.

    lengths: tokens of each sample, for each data set. squares: for the estimator empirical-fisher. subtract:
    the run unlearns, and is not of an importance alone; kept: then, whether it keeps the importances.
    """

    lengths: Sequence[Sequence[int]]
    squares: bool = False
    subtract: bool = True
    kept: bool = False

    def share(self, ranks: int) -> "Load":
        """The data of the rank that is dealt the most, of so many."""
        dealt = [[[each[k] for k in numbers] for numbers in deal(each, ranks)] for each in self.lengths]
        return replace(self, lengths=[max(shares, key=sum) for shares in dealt])


@dataclass(frozen=True)
class Costs:
    """In bytes and floating-point operations.

    host, device: memory at the worst moment, by kind, beside the interpreter and its libraries; ``device`` is
    None where the model runs on the CPU. scratch: disk at the worst moment. weights_read: of the model that is
    walked. scratch_moved: read and written. result_read, result_written: what is subtracted and kept. flops:
    of matrix products. bound: some part could not be tried, so memory and flops are bounds from its shapes.
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
        """All kinds together."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """All kinds together; 0 on the CPU."""
        return sum((self.device or {}).values())


class Estimate:
    """Costs of schedules for one model, one load and one device (``Trial`` explains the last)."""

    def __init__(
        self, structure: Structure, load: Load, device: torch.device, threads: int = 1, trial: Trial | None = None
    ) -> None:
        self.structure, self.load, self.device, self._threads = structure, load, device, threads
        here = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        self._trial = trial or Trial(structure, here, load.squares)
        parameters = dict(structure.model.named_parameters())
        self._counts = {name: each.numel() for name, each in parameters.items()}
        self._sizes = {name: each.nbytes for name, each in parameters.items()}
        model: Any = structure.model
        self.width: int = model.config.get_text_config().hidden_size
        self.dtype: torch.dtype = model.dtype
        self._row: int = self.width * self.dtype.itemsize

    def costs(self, schedule: Schedule) -> Costs:
        """All of them."""
        host, device = self.memory(schedule)
        steps = self._steps(schedule)
        structure = self.structure
        looked = 2 if self.load.squares else 1
        return Costs(
            host=host,
            device=device,
            scratch=self.scratch(schedule),
            weights_read=self._bytes([*structure.resident, *looked * structure.vocabulary])
            + sum(self._bytes(self._names(step)) for step in steps),
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
        """Disk for what the run makes."""
        importance = self._sum_bytes(list(self._counts)) if self.load.kept or not self.load.subtract else 0
        return importance + (self._bytes(list(self._sizes)) if self.load.subtract else 0)

    def _steps(self, schedule: Schedule) -> list[Step]:
        return steps_of(len(self.structure.layers), schedule)

    def _names(self, step: Step) -> list[str]:
        return parameters_of(step, self.structure)

    def _summed(self, step: Step) -> list[str]:
        """Parameters that have their sums in memory."""
        if step.kind in ("embed", "forward", "recompute"):
            return []
        return [*(self.structure.resident if step.kind in ("head", "embed_backward") else []), *self._names(step)]

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return _SUM * len(self.load.lengths) * sum(self._counts[name] for name in names)

    # Memory.

    def memory(self, schedule: Schedule) -> tuple[dict[str, int], dict[str, int] | None]:
        """Of the host and of the device, by kind, each where it is largest; does not depend on ``groups``."""
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
            vocabulary += self._bytes(self._names(steps[1])) if len(steps) > 1 else 0
        yield self._placed(vocabulary, vocabulary, 0, 0, 0)
        ids = 8 * sum(count * tokens for each in self._batches(schedule) for count, tokens in each)
        behind = 0
        for step, after in pairwise([*steps, steps[-1]]):
            weights = self._bytes(self._names(step))
            ahead = self._bytes(self._names(after)) if schedule.overlap else 0
            sums = self._sum_bytes(self._summed(step))
            worst = max(self._batch_cost(step, *each[0]).bytes for each in self._batches(schedule))
            yield self._placed(resident + weights + ahead, resident + weights, sums, behind, worst + ids)
            behind = sums if schedule.overlap else 0

    def _placed(
        self, read: int, held: int, sums: int, behind: int, activations: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        buffers = buffer_bytes(self._threads) if self.load.subtract else 0
        if self.device.type == "cpu":
            kinds = {"weights": read, "sums": sums + behind, "activations": activations, "buffers": buffers}
            return kinds, {}
        host = {"weights": read, "sums": max(sums, behind), "buffers": buffers}
        return host, {"weights": held, "sums": sums + behind, "activations": activations}

    def _batches(self, schedule: Schedule) -> list[list[tuple[int, int]]]:
        """(samples, tokens of the longest) of each batch of each data set, in their order."""
        result = []
        for lengths in self.load.lengths:
            order = sorted(lengths, reverse=True)
            size = schedule.batch_size
            result.append([(len(order[k : k + size]), order[k]) for k in range(0, len(order), size)])
        return result

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
        """Bytes of all scratch files at the worst moment; what is flushed late is counted twice."""
        files: dict[tuple[str, object, int], int] = {}
        dying: list[tuple[str, object, int]] = []
        late = self.load.subtract and schedule.overlap
        last, look = len(self.structure.layers), self._row * sum(map(_look_tokens, self.load.lengths))
        tokens = self._tokens(schedule)
        now = most = 0
        for step in self._steps(schedule):
            made, dead = self._files(step, schedule, last)
            rows = self._row * tokens[step.group]
            for key in made:
                kind, which, _ = key
                if key in files:
                    continue
                if kind in ("hidden", "gradient"):
                    size = rows
                elif kind == "look":
                    size = look
                elif kind == "head rows":
                    # A row for each token, and one for the padding of each sample.
                    size = (tokens[step.group] + sum(map(len, self.load.lengths))) * self.width * _SUM
                else:
                    size = self._sum_bytes(which)  # type: ignore[arg-type]
                files[key] = size
                now += size
            most = max(most, now)
            going = dying if late else dead
            dying = dead
            for key in going:
                now -= files.pop(key, 0)
        return most

    def _files(
        self, step: Step, schedule: Schedule, last: int
    ) -> tuple[list[tuple[str, object, int]], list[tuple[str, object, int]]]:
        """Files that ``DataPass`` makes in a step, and those that it needs no more after it."""
        structure, group, n = self.structure, step.group, step.layer
        waiting = ("waiting", (*structure.resident, *([structure.embedding] if structure.tied else [])), group)
        head_rows = [("head rows", 0, group)] if structure.tied and self.load.squares else []
        made: list[tuple[str, object, int]] = []
        dead: list[tuple[str, object, int]] = []
        if step.kind == "embed":
            made = [("hidden", 0, group), ("look", 0, 0)]
        elif step.kind in ("forward", "recompute"):
            made = [("hidden", n + 1, group), ("look", n + 1, 0)]
            dead = [("hidden", n, group)] if step.kind == "forward" and n % schedule.every else []
        elif step.kind == "head":
            made = [("gradient", last, group), waiting, *head_rows]
            dead = [("hidden", last, group)]
        elif step.kind == "backward":
            made = [("gradient", n, group)]
            dead = [("hidden", n, group), ("gradient", n + 1, group)]
        else:
            dead = [("gradient", 0, group), waiting, *head_rows]
        names = self._summed(step)
        if step.kind == "head":  # those of the resident ones wait for the end
            dead += [("sum", (*structure.resident,), group - 1)]
            names = [] if structure.tied else self._names(step)
        for part in [structure.resident, [structure.embedding]] if step.kind == "embed_backward" else [names]:
            dead.append(("sum", tuple(part), group - 1))
            if part and group < schedule.groups - 1:
                made.append(("sum", tuple(part), group))
        return made, dead

    def _tokens(self, schedule: Schedule) -> list[int]:
        """Real tokens of each group of all data sets."""
        result = [0] * schedule.groups
        for lengths in self.load.lengths:
            order, size = sorted(lengths, reverse=True), schedule.batch_size
            batches = [sum(order[k : k + size]) for k in range(0, len(order), size)]
            for group in range(schedule.groups):
                result[group] += sum(schedule.of_group(batches, group))
        return result

    def _scratch_moved(self, schedule: Schedule) -> int:
        times = {"embed": 1, "forward": 2, "recompute": 2, "head": 2, "backward": 3, "embed_backward": 1}
        steps = _of_one_group(self._steps(schedule))
        rows = self._row * sum(map(sum, self.load.lengths)) * sum(times[step.kind] for step in steps)
        return rows + 2 * (schedule.groups - 1) * self._sum_bytes(list(self._counts))

    # Arithmetic.

    def _flops(self, schedule: Schedule) -> float:
        """A part takes a T + b T^2 for a sample of T tokens; two trials give a and b."""
        batches = [each for group in self._batches(schedule) for each in group]
        longest = max(tokens for _, tokens in batches)
        half = max(2, longest // 2)
        linear = sum(count * tokens for count, tokens in batches)
        square = sum(count * tokens**2 for count, tokens in batches)
        total = 0.0
        for step in _of_one_group(self._steps(schedule)):
            far = self._batch_cost(step, 1, longest).flops
            near = self._batch_cost(step, 1, half).flops if half < longest else far / longest * half
            b = (far / longest - near / half) / (longest - half) if half < longest else 0.0
            total += (far / longest - b * longest) * linear + b * square
        return total


def _of_one_group(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.group == 0]


def _look_tokens(lengths: Sequence[int]) -> int:
    """As in ``probe_inputs``."""
    return sum(min(int(PROBE_TOKENS), lengths[k % len(lengths)]) for k in range(PROBE_SAMPLES))
