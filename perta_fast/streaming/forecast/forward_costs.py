"""The costs of one forward walk that scores several versions of the weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.streaming.forecast.costs import Costs, Estimate, Load
from perta_fast.streaming.forecast.rates import Rates
from perta_fast.streaming.forecast.trial import Cost, Trial
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.version import Version
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.compute import buffer_bytes
from perta_fast.subtraction.inputs import Sources

_SCORES = 12  # bytes of a token: three numbers in float32
_FLOAT32 = 4
_CHUNK = 1 << 24  # logits that ``token_scores`` works on at a time
_COPIES = 6  # of a chunk in float32, where all columns are asked for
_NUMBERS = 16  # bytes of a token: its id and its mask


@dataclass(frozen=True)
class Compared:
    """The versions that a walk scores.

    count: how many. beside: bytes of an element of the model that are read to change it, over all versions; 0 if none
    is changed. stored: bytes of an element of the model on the disk.
    """

    count: int
    beside: float
    stored: int

    @classmethod
    def reading(cls, count: int, opened: Iterable[Sources], stored: int, more: float = 0) -> "Compared":
        """So many versions that read, beside the model, what is ``opened``, from the headers of the files.

        more: bytes that they read as well, of files that are still to be made.
        """
        read: dict[tuple[object, int], int] = {}
        elements = 1
        for sources in opened:
            for match in sources.matches:
                if match.copied is None:
                    read |= {(entry.path, entry.begin): entry.size for k, _, entry in sources.operands(match) if k}
            elements = sum(match.theta.count for match in sources.matches)
        return cls(count, (sum(read.values()) + more) / elements, stored)


class ForwardEstimate(Estimate):
    """Of ``score_versions``. The load has the sets that are scored.

    detailed: whether all columns of the scores are computed. subtract of the load is not read.
    """

    overlaps = True

    def __init__(
        self,
        structure: Structure,
        load: Load,
        device: torch.device,
        compared: Compared,
        *,
        detailed: bool = True,
        threads: int = 1,
    ) -> None:
        super().__init__(structure, load, device)
        self._compared, self._detailed, self._threads = compared, detailed, threads
        self._trial = Trial(structure, self.here, squares=False)
        head = structure.head
        self._words = 0 if head is None else dict(structure.model.named_parameters())[head].shape[0]

    def costs(self, schedule: Schedule) -> Costs:
        host, device = self.memory(schedule)
        parts = self._parts()
        return Costs(
            host=host,
            device=device,
            scratch=self.scratch(schedule),
            weights_read=schedule.groups * sum(map(self._inputs, parts)),
            scratch_moved=2 * self._compared.count * (len(parts) - 1) * sum(self._hidden_bytes(schedule)),
            result_read=0,
            result_written=0,
            flops=self._compared.count * self._flops(schedule),
            bound=any(
                self._trial.forward(layer, *batches[0]).bound
                for layer in range(len(self.structure.layers))
                for batches in self._batches(schedule)
                if batches
            ),
        )

    def scratch(self, schedule: Schedule) -> int:
        """Each version's hidden states of a group, twice for two of them, and its scores."""
        tokens = sum(map(sum, self.load.lengths))
        return (self._compared.count + 2) * max(self._hidden_bytes(schedule)) + self._compared.count * _SCORES * tokens

    @property
    def result_bytes(self) -> int:
        return 0

    def plan(self, schedule: Schedule) -> str:
        count, groups = self._compared.count, schedule.groups
        walks = "one walk forward" if groups == 1 else f"{groups} walks forward, each for a part of the samples,"
        return f"batches of {schedule.batch_size}, {walks} for {count} version{'s' * (count > 1)} of the weights"

    def seconds_to_read(self, schedule: Schedule, rates: Rates) -> float:
        """Of all inputs, once for each group."""
        return schedule.groups * sum(map(self._inputs, self._parts())) / rates.read

    def seconds_of_version(self, schedule: Schedule, rates: Rates) -> float:
        """Of one version, beside the reading of the inputs."""
        moved = (len(self._parts()) - 1) * sum(self._hidden_bytes(schedule))
        return self._flops(schedule) / rates.flops + moved / rates.read + moved / rates.written

    def most_versions(self, schedule: Schedule, free: int) -> int:
        """How many versions the disk has room for at once; at least 1."""
        tokens = sum(map(sum, self.load.lengths))
        hidden = max(self._hidden_bytes(schedule))
        return max(1, (free - 2 * hidden) // max(1, hidden + _SCORES * tokens))

    def _parts(self) -> list[list[str]]:
        """The parameters of each part, without the resident ones."""
        structure = self.structure
        return [[structure.embedding], *structure.by_layer, [] if structure.head is None else [structure.head]]

    def _inputs(self, names: Sequence[str]) -> int:
        """Bytes of all inputs of a part with the resident parameters."""
        return int(self._elements(names) * (self._compared.stored + self._compared.beside))

    def _elements(self, names: Sequence[str]) -> int:
        return sum(self._counts[name] for name in [*names, *self.structure.resident])

    def _hidden_bytes(self, schedule: Schedule) -> list[int]:
        """Of each group, those of one version at one boundary, with padding."""
        rows = [[count * tokens for count, tokens in batches] for batches in self._batches(schedule)]
        groups = range(schedule.groups)
        return [self._row * sum(sum(schedule.of_group(of_set, group)) for of_set in rows) for group in groups]

    def _memory_by_step(self, schedule: Schedule) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        structure = self.structure
        vocabulary = self._bytes([*structure.vocabulary, *structure.resident])
        yield self._on({"inputs": 0}, {"weights": vocabulary})
        numbers = _NUMBERS * sum(count * tokens for batches in self._batches(schedule) for count, tokens in batches)
        buffers = buffer_bytes(self._threads) if self._compared.beside else 0
        for part, names in enumerate(self._parts()):
            copy, made = self._made(names)
            host = {"inputs": self._inputs(names), "changed copy": copy, "buffers": buffers}
            weights = made
            if self.device.type != "cpu":
                host["changed copy"] += made
                weights = self._elements(names) * self.dtype.itemsize
            most = max(self._batch_cost(part, *batches[0]).bytes for batches in self._batches(schedule) if batches)
            yield self._on(host, {"weights": weights, "activations": most + numbers})

    def _made(self, names: Sequence[str]) -> tuple[int, int]:
        """Bytes of what ``PartWeights`` makes of the inputs of a part: in the stored type, and as the model runs."""
        stored, itemsize = self._compared.stored, self.dtype.itemsize
        converted, widened = stored != itemsize, self.dtype == torch.float32 and stored < itemsize
        sizes = [(self._counts[name], name in self._joined) for name in [*names, *self.structure.resident]]
        copy = stored * sum(count for count, is_joined in sizes if is_joined or not widened)
        made = itemsize * sum(count for count, is_joined in sizes if is_joined or converted)
        largest = max((count for count, is_joined in sizes if is_joined), default=0)
        joining = (1 + converted) * itemsize * largest  # it is put together twice
        return copy if self._compared.beside else 0, made + joining

    def _on(self, host: dict[str, int], device: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        return ({**host, **device}, {}) if self.device.type == "cpu" else (host, device)

    def _batch_cost(self, part: int, count: int, tokens: int) -> Cost:
        """What one batch takes in a part beside weights."""
        if part == 0:
            return Cost(2 * count * tokens * self._row, 0)
        if part <= len(self.structure.layers):
            return self._trial.forward(part - 1, count, tokens)
        logits = count * tokens * self._words
        chunks = min(logits, max(_CHUNK, self._words)) * _FLOAT32 * (_COPIES if self._detailed else 3)
        moved = 3 * count * tokens * self._row
        return Cost(2 * logits * self.dtype.itemsize + chunks + moved, 2 * logits * self.width)

    def _flops(self, schedule: Schedule) -> float:
        """Of one version."""
        return sum(self._arithmetic(schedule, partial(self._sample_flops, part)) for part in range(len(self._parts())))

    def _sample_flops(self, part: int, tokens: int) -> int:
        return self._batch_cost(part, 1, tokens).flops


def stored_bytes(skeleton: Skeleton) -> int:
    """Of an element of the model on the disk; the most frequent, if there are several sizes."""
    sizes = [ITEM_SIZES[entry.dtype] for entry in skeleton.checkpoint.tensors.values() if entry.dtype in KERNEL_CODES]
    return max(set(sizes), key=sizes.count)


def forward_estimate(
    skeleton: Skeleton, versions: Sequence[Version], sets: Sequence[SampleSet], threads: int, ranks: int = 1
) -> ForwardEstimate:
    """Of ``score_versions`` with these arguments; for the rank with the most data."""
    lengths = [[len(sample.input_ids) for sample in of_set.samples] for of_set in sets if of_set.samples]
    opened = {id(version.sources): version.sources for version in versions if version.sources is not None}
    return ForwardEstimate(
        skeleton,
        Load(lengths).share(ranks),
        skeleton.device,
        Compared.reading(len(versions), opened.values(), stored_bytes(skeleton)),
        detailed=any(of_set.detailed for of_set in sets),
        threads=threads,
    )
