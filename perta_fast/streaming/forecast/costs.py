"""What a streamed run costs: memory, scratch, bytes moved, arithmetic; from the model's structure alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from perta_fast.distributed.ranks import deal
from perta_fast.models.stored_names import joined
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule


@dataclass(frozen=True)
class Load:
    """The data of a run, and what the run does with it.

    lengths: tokens of each sample, for each data set. squares: the estimator is empirical-fisher. subtract: the run
    unlearns, and does not only estimate an importance. kept: bytes of a parameter in the importances that it writes.
    """

    lengths: Sequence[Sequence[int]]
    squares: bool = False
    subtract: bool = True
    kept: int = 0

    def share(self, ranks: int) -> "Load":
        """For each data set, the largest share that a rank gets."""
        dealt = [[[tokens[k] for k in numbers] for numbers in deal(tokens, ranks)] for tokens in self.lengths]
        return replace(self, lengths=[max(shares, key=sum) for shares in dealt])


@dataclass(frozen=True)
class Costs:
    """Costs in bytes and floating-point operations.

    host, device: peak memory by kind, beside the interpreter and its libraries; ``device`` is None if the model runs on
    the CPU. scratch: peak disk space. weights_read: of the model that is walked. scratch_moved: read and written.
    result_read, result_written: for the subtraction and the importances that are kept. flops: of matrix products in the
    model's type; double_flops: in float64.
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
    double_flops: float = 0.0

    @property
    def host_bytes(self) -> int:
        """The sum over all kinds."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """The sum over all kinds; 0 on the CPU."""
        return sum((self.device or {}).values())


class Estimate(ABC):
    """Costs of schedules for one model, one load and one device.

    ``here``: the device, or the CPU if torch finds no such device on this machine. ``overlaps``: whether reading and
    writing can go on beside the arithmetic.
    """

    overlaps: ClassVar[bool]

    def __init__(self, structure: Structure, load: Load, device: torch.device) -> None:
        self.structure, self.load, self.device = structure, load, device
        self.here = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        parameters = dict(structure.model.named_parameters())
        self._counts = {name: parameter.numel() for name, parameter in parameters.items()}
        self._sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
        self._joined = joined(structure.model)
        model: Any = structure.model
        self.width: int = model.config.get_text_config().hidden_size
        self.dtype: torch.dtype = model.dtype
        self._row: int = self.width * self.dtype.itemsize

    @abstractmethod
    def costs(self, schedule: Schedule) -> Costs:
        """The costs of one schedule."""

    def memory(self, schedule: Schedule) -> tuple[dict[str, int], dict[str, int] | None]:
        """Peak memory of the host and of the device, by kind; it does not depend on ``groups``."""
        steps = list(self._memory_by_step(schedule))
        host = max((host for host, _ in steps), key=lambda kinds: sum(kinds.values()))
        device = max((device for _, device in steps), key=lambda kinds: sum(kinds.values()))
        return host, device or None

    @abstractmethod
    def _memory_by_step(self, schedule: Schedule) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """Memory by kind of host and device, in each step of the run."""

    @abstractmethod
    def scratch(self, schedule: Schedule) -> int:
        """Peak size of all scratch files."""

    @property
    @abstractmethod
    def result_bytes(self) -> int:
        """Disk space of the result, with what is kept."""

    @property
    def kept_bytes(self) -> int:
        """Disk space of the importances in it."""
        return self.load.kept * sum(self._counts.values())

    def plan(self, schedule: Schedule) -> str:
        """What the schedule is, in words."""
        return str(schedule)

    def _bytes(self, names: Sequence[str]) -> int:
        """Of parameters in memory, while they are read."""
        return sum(self._sizes[name] for name in names) + max(map(self._beside, names), default=0)

    def _beside(self, name: str) -> int:
        """While a parameter is read: what it is converted from; what it is joined from, which is put together twice."""
        if name in self._joined:
            return 2 * self._sizes[name]
        return self._stored_size(name) if self.structure.own != self.dtype else 0

    def _stored(self, names: Iterable[str]) -> int:
        """Of parameters on the disk, in the checkpoint's own type."""
        return sum(map(self._stored_size, names))

    def _stored_size(self, name: str) -> int:
        return self.structure.own.itemsize * self._counts[name]

    def _lengths(self, schedule: Schedule) -> list[list[list[int]]]:
        """The tokens of each sample of each batch of each data set, in order, the longest first."""
        size = schedule.batch_size
        ordered = [sorted(lengths, reverse=True) for lengths in self.load.lengths]
        return [[order[k : k + size] for k in range(0, len(order), size)] for order in ordered]

    def _batches(self, schedule: Schedule) -> list[list[tuple[int, int]]]:
        """(samples, tokens of the longest) of the same batches."""
        return [[(len(batch), batch[0]) for batch in batches] for batches in self._lengths(schedule)]

    def _arithmetic(self, schedule: Schedule, flops: Callable[[int], int]) -> float:
        """The FLOPs of all batches in a part that takes a T + b T^2 for a sample of T tokens.

        flops: those of one sample, by T. Two lengths give a and b.
        """
        batches = [batch for of_set in self._batches(schedule) for batch in of_set]
        longest = max(tokens for _, tokens in batches)
        half = max(2, longest // 2)
        linear = sum(count * tokens for count, tokens in batches)
        square = sum(count * tokens**2 for count, tokens in batches)
        at_longest = flops(longest) / longest  # FLOPs a token
        b = (at_longest - flops(half) / half) / (longest - half) if half < longest else 0.0
        return (at_longest - b * longest) * linear + b * square
