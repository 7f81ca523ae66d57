"""The costs of a walk there and back, from its own list of steps, with sizes instead of tensors."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from perta_fast.importance.per_sample import PROBE_SAMPLES, PROBE_TOKENS
from perta_fast.models.stored_names import copied
from perta_fast.streaming.forecast.costs import Costs, Estimate, Load
from perta_fast.streaming.forecast.trial import Cost, Trial
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.walk import Step, parameters_of, steps_of
from perta_fast.subtraction.compute import buffer_bytes

_SUM = 4  # bytes of an element of a sum
_File = tuple[str, object, int]  # a scratch file: its kind, which one of that kind, and its group


class WalkEstimate(Estimate):
    """Of a run by a rule with importances, or of an importance alone."""

    overlaps = True

    def __init__(self, structure: Structure, load: Load, device: torch.device, threads: int = 1) -> None:
        super().__init__(structure, load, device)
        self._threads = threads
        self._copied = copied(structure.model) if self._joined else set()
        shapes = {name: parameter.shape for name, parameter in structure.model.named_parameters()}
        self._experts = {name: shapes[name][0] for name in self._joined if len(shapes[name]) == 3}
        self._trial = Trial(structure, self.here, load.squares)

    def costs(self, schedule: Schedule) -> Costs:
        host, device = self.memory(schedule)
        steps = self._steps(schedule)
        structure = self.structure
        times = 2 if self.load.squares else 1  # for the check of the structure and, with squares, for the plan
        return Costs(
            host=host,
            device=device,
            scratch=self.scratch(schedule),
            weights_read=self._stored([*structure.resident, *times * structure.vocabulary])
            + sum(self._stored(parameters_of(step, self.structure)) for step in steps),
            scratch_moved=self._scratch_moved(schedule),
            result_read=3 * self._stored(self._counts) if self.load.subtract else 0,
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
        return self.kept_bytes + (self._stored(self._counts) if self.load.subtract else 0)

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

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return _SUM * len(self.load.lengths) * sum(self._counts[name] for name in names)

    # Memory.

    def _stored_sums(self, names: Sequence[str]) -> tuple[int, int]:
        """What sums take, beside themselves, while they are written: where they lie, and as arrays on the host.

        Those that are divided to be stored are copied. Rounded ones lie there in both types, and float32 arrays are
        made of two tensors at a time; of experts, which θ_full is taken to store apart, of two of them.
        """
        kept, sets = self.load.kept, len(self.load.lengths)
        divided = self._sum_bytes([name for name in names if name in self._copied])
        if not self.load.subtract or kept in (0, _SUM * sets):
            return divided, 0
        largest = sorted((self._counts[name] // self._experts.get(name, 1) for name in names), reverse=True)
        return divided + kept * sum(self._counts[name] for name in names), 2 * kept * sum(largest[:2])

    def _memory_by_step(self, schedule: Schedule) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        steps = _of_one_group(self._steps(schedule))
        parts = [parameters_of(step, self.structure) for step in steps]
        ahead = [*parts[1:], parts[-1]] if schedule.overlap else [[] for _ in parts]
        pinned = self._pinned([*part, *following] for part, following in zip(parts, ahead, strict=True))
        resident = self._bytes(self.structure.resident)
        vocabulary = resident + self._bytes(self.structure.vocabulary)
        beside = self._walked(parts[1], [], self._pinned([parts[1]])) if self.load.squares else 0
        yield self._by_kind(vocabulary + beside, vocabulary, 0, 0, 0)
        ids = 8 * sum(count * tokens for batches in self._batches(schedule) for count, tokens in batches)
        behind, stored = 0, (0, 0)
        for step, part, following in zip(steps, parts, ahead, strict=True):
            weights, walked = self._bytes(part), self._walked(part, following, pinned)
            sums = self._sum_bytes(self._summed(step))
            activations = max(self._batch_cost(step, *batches[0]).bytes for batches in self._batches(schedule))
            yield self._by_kind(resident + walked, resident + weights, sums, behind, activations + ids, stored)
            stored = self._stored_sums(self._summed(step))
            behind = sums if schedule.overlap else 0
            if not schedule.overlap:
                yield self._by_kind(resident + self._walked([], [], pinned), resident, sums, 0, 0, stored)
                stored = 0, 0
        yield self._by_kind(resident + self._walked([], [], pinned), resident, 0, behind, 0, stored)

    def _walked(self, part: Sequence[str], following: Sequence[str], pinned: int) -> int:
        """Host memory of the parameters of a part, and of the next one if that is read ahead.

        pinned: page-locked memory. For a GPU all parameters end there, and one more at a time is being read.
        """
        if self.device.type == "cpu":
            return self._bytes(part) + self._bytes(following)
        return pinned + max((self._sizes[name] + self._beside(name) for name in [*part, *following]), default=0)

    def _pinned(self, together: Iterable[Sequence[str]]) -> int:
        """Page-locked memory for parameters, when these lists of them have been there one after another.

        Torch rounds each block up to a power of two, and keeps it for other tensors of that size
        (``CachingHostAllocatorImpl`` in ATen/core/CachingHostAllocator.h).
        """
        blocks: Counter[int] = Counter()
        for names in together:
            blocks |= Counter(1 << (self._sizes[name] - 1).bit_length() for name in names)
        return sum(size * count for size, count in blocks.items())

    def _by_kind(
        self, read: int, held: int, sums: int, behind: int, activations: int, stored: tuple[int, int] = (0, 0)
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Memory of host and device.

        read, held: weights there. behind, stored: sums of the step that is being written, and their ``_stored_sums``.
        """
        buffers = buffer_bytes(self._threads) if self.load.subtract else 0
        there, arrays = stored
        if self.device.type == "cpu":
            total = sums + behind + there + arrays
            return {"weights": read, "sums": total, "activations": activations, "buffers": buffers}, {}
        host = {"weights": read, "sums": max(sums, behind), "buffers": buffers}
        return host, {"weights": held, "sums": sums + behind + there, "activations": activations}

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
        steps = _of_one_group(self._steps(schedule))
        return sum(self._arithmetic(schedule, partial(self._sample_flops, step)) for step in steps)

    def _sample_flops(self, step: Step, tokens: int) -> int:
        return self._batch_cost(step, 1, tokens).flops


def _of_one_group(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.group == 0]


def _probe_tokens(lengths: Sequence[int]) -> int:
    """As in ``probe_inputs``."""
    return sum(min(int(PROBE_TOKENS), lengths[k % len(lengths)]) for k in range(PROBE_SAMPLES))
