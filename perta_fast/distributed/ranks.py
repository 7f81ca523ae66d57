"""The processes that do one job together, how work is dealt to them, and every way in which they exchange data.

Every rank calls the same methods in the same order. Torch is imported only if there is more than one rank.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import heapreplace
from typing import TYPE_CHECKING, Any, ClassVar

from perta_fast.errors import InputError, NotFiniteError, PertaError, RankLost, RunError, advice, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work

_SHARED = "_perta_fast_shared"  # the attribute of an error that every rank raises


@dataclass(frozen=True)
class Pending:
    """A sum that has been started; nothing may touch its tensor before ``wait`` has returned."""

    work: "Work | None"  # None: the sum is done

    def wait(self) -> None:
        """Return when the sum is done (on a device: before all that is launched from now on)."""
        if self.work is not None:
            with _raising_rank_lost():
                self.work.wait()


@dataclass(frozen=True)
class Ranks:
    """The processes that do one job together, maybe one alone.

    If a rank dies, or leaves with an error that it does not share, the others get RankLost from their next call here,
    and from nothing else: at once if the backend sees the connection close, else after the group's timeout.
    """

    rank: int
    world: int
    group: "ProcessGroup | None"
    ALONE: ClassVar["Ranks"]

    @classmethod
    def of(cls, group: "ProcessGroup | None") -> "Ranks":
        """The ranks of ``group``; None: this process alone. Raises InputError if this process is not a member."""
        if group is None:
            return cls.ALONE
        import torch.distributed as dist

        rank = dist.get_rank(group)
        if rank < 0:
            raise InputError("this process is not a member of the group that was passed")
        return cls(rank, dist.get_world_size(group), group)

    @property
    def first(self) -> bool:
        """Whether this is the rank that draws bars, makes and renames directories, and writes the report."""
        return self.rank == 0

    def own_slice(self, count: int) -> slice:
        """This rank's share of ``count`` equal items; shares follow each other in the order of ranks."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def on_this_machine(self) -> int:
        """How many of the ranks run on this rank's machine."""
        machines = self.gather(os.uname().nodename)
        return machines.count(machines[self.rank])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (anything that pickles), in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world
        with _raising_rank_lost():
            dist.all_gather_object(values, value, self.group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (anything that pickles), on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value if self.first else None]
        with _raising_rank_lost():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the block on every rank and wait for all at its end; if it raises on one rank, every rank raises.

        what: the work, named in the message if a rank is lost. A rank whose block raised raises its own error. The
        others raise "rank K: message" as an error of the same class (InputError, NotFiniteError, else RunError).
        ``is_shared`` is true of all these errors. RankLost, an interrupt, and whatever else is not an ``Exception``
        leave at once. If the ranks exchange data within the block, each must do so even if it raises afterwards, since
        the others wait for it.
        """
        if self.world == 1:
            yield
            return
        error: Exception | None = None
        try:
            try:
                yield
            except RankLost:
                raise
            except Exception as raised:
                error = raised
            answers = self.gather(None if error is None else _failure(error))
        except RankLost as lost:
            raise RankLost(f"{what}: {lost}") from lost
        failures = [(rank, *failure) for rank, failure in enumerate(answers) if failure is not None]
        if not failures:
            return
        if error is None:
            rank, kind, text = failures[0]
            error = kind(f"rank {rank}: {text}")
        setattr(error, _SHARED, True)
        raise error

    @contextmanager
    def sharing_errors(self, what: str) -> Iterator[None]:
        """For a block that calls ``together`` several times, and may raise on one rank in between.

        Such an error is shared in the next ``together`` that the other ranks reach. When the block raises, no thread
        of it may still call ``together``.
        """
        try:
            yield
        except Exception as error:
            if not (isinstance(error, RankLost) or is_shared(error)):
                with suppress(Exception), self.together(what):
                    raise
            raise

    def sum_async_(self, tensor: "torch.Tensor") -> Pending:
        """Start to add up ``tensor`` (contiguous) over all ranks, in place; every rank gets the same bits.

        On a device the sum runs after all that has been launched before.
        """
        if self.world == 1:
            return Pending(None)
        import torch.distributed as dist

        with _raising_rank_lost():
            return Pending(dist.all_reduce(tensor, group=self.group, async_op=True))


Ranks.ALONE = Ranks(0, 1, None)


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The numbers of each rank's items, in ascending order; every item goes to one rank.

    costs: of each item, in any unit (tokens, bytes). Items go out in descending order of cost, each to the rank with
    the lowest total: no rank has more than 4/3 of what the best deal would give it (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [(0, 0, rank) for rank in range(ranks)]  # a heap: cost so far, items, rank
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        cost, count, rank = totals[0]
        dealt[rank].append(item)
        heapreplace(totals, (cost + costs[item], count + 1, rank))
    return [sorted(items) for items in dealt]


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises ``error``, or one with its text, and only one rank need print it."""
    return getattr(error, _SHARED, False)


def _failure(error: Exception) -> tuple[type[PertaError], str]:
    """What the other ranks raise when this one raises ``error``: a class and a text."""
    if isinstance(error, OSError):
        return RunError, advice(error)
    kind = next((kind for kind in (InputError, NotFiniteError) if isinstance(error, kind)), RunError)
    return kind, f"{error}" if isinstance(error, PertaError) else f"{type(error).__name__}: {error}"


@contextmanager
def _raising_rank_lost() -> Iterator[None]:
    """RankLost in place of the RuntimeError that every backend raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise RankLost(f"another process of this run died or does not answer ({reason})") from error
