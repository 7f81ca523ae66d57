"""The processes that do one job together, and every way in which they exchange data.

Every rank calls the same methods in the same order. Torch is imported only if there is more than one rank.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from perta_fast.errors import InputError, NotFiniteError, PertaError, RankLost, RunError, advice, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work

# Another rank's error is raised here as the first of these that it is an instance of, else as the last.
_KINDS = (InputError, NotFiniteError, RunError)
_SHARED = "_perta_fast_shared"  # the attribute that marks an error as one that every rank raises


@dataclass(frozen=True)
class Pending:
    """A sum that has been started; its tensor must not be touched before ``wait`` has returned."""

    work: "Work | None"  # None: already done

    def wait(self) -> None:
        """Return when the sum is there (on a device: for whatever is launched from now on)."""
        if self.work is not None:
            with _raising_rank_lost():
                self.work.wait()


@dataclass(frozen=True)
class Ranks:
    """The processes that do one job together; one alone never touches torch.distributed.

    If a rank dies, or leaves with an error that it does not share, the others get ``errors.RankLost`` from the
    methods here and from nothing else: at once if the backend sees its connection close, else after the group's
    timeout.
    """

    rank: int
    world: int
    group: "ProcessGroup | None"
    ALONE: ClassVar["Ranks"]

    @classmethod
    def of(cls, group: "ProcessGroup | None") -> "Ranks":
        """The ranks of ``group``; None: this process alone. Raises InputError if it is not a member."""
        if group is None:
            return cls.ALONE
        import torch.distributed as dist

        rank = dist.get_rank(group)
        if rank < 0:
            raise InputError("this process is not in the group that it was given")
        return cls(rank, dist.get_world_size(group), group)

    @property
    def first(self) -> bool:
        """Whether this is the rank that draws bars, makes directories, commits and writes the report."""
        return self.rank == 0

    def own_slice(self, count: int) -> slice:
        """This rank's share of ``count`` equal items; the shares follow each other in order of ranks."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def on_this_machine(self) -> int:
        """How many of the ranks run on the machine that this one runs on."""
        machines = self.gather(platform.node())
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

        what: the work, for the message if a rank is lost meanwhile. A rank whose block raised raises its own
        error. The others raise one of the same class (InputError, NotFiniteError, else RunError) that says
        "rank K: message". ``is_shared`` is true of all these errors. If the ranks exchange data within the
        block, each must do so even if it raises afterwards, or the others wait for it. What is no
        ``Exception``, such as an interrupt, leaves at once, and so does RankLost.
        """
        if self.world == 1:
            yield
            return
        own: Exception | None = None
        try:
            try:
                yield
            except RankLost:
                raise
            except Exception as error:
                own = error
            failure = None if own is None else _failure(own)
            failures = {rank: other for rank, other in enumerate(self.gather(failure)) if other is not None}
        except RankLost as lost:
            raise RankLost(f"{what}: {lost}") from lost
        if not failures:
            return
        if own is None:
            rank, (kind, text) = next(iter(failures.items()))
            own = kind(f"rank {rank}: {text}")
        setattr(own, _SHARED, True)
        raise own

    @contextmanager
    def sharing_errors(self, what: str) -> Iterator[None]:
        """Run a block in which the ranks call ``together`` now and then, and each may raise in between.

        An error that no ``together`` has shared is shared by the next one that the other ranks come to. Threads
        of the block that call ``together`` must have ended by then.
        """
        try:
            yield
        except Exception as error:
            if not (isinstance(error, RankLost) or is_shared(error)):
                with suppress(Exception), self.together(what):
                    raise
            raise

    def sum_(self, tensor: "torch.Tensor") -> None:
        """Add up ``tensor`` (contiguous) over all ranks, in place; every rank gets the same bits."""
        self.sum_async_(tensor).wait()

    def sum_async_(self, tensor: "torch.Tensor") -> Pending:
        """Start ``sum_``; on a device it runs after what has been launched so far."""
        if self.world == 1:
            return Pending(None)
        import torch.distributed as dist

        with _raising_rank_lost():
            return Pending(dist.all_reduce(tensor, group=self.group, async_op=True))


Ranks.ALONE = Ranks(0, 1, None)


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises ``error`` or one that tells of it, so that only one of them need print it."""
    return getattr(error, _SHARED, False)


def _failure(error: Exception) -> tuple[type[RunError] | type[InputError], str]:
    """What the other ranks get of an error: a class that they can raise, and its text."""
    if isinstance(error, OSError):
        return RunError, advice(error)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RunError)
    is_message = isinstance(error, PertaError)
    return kind, str(error) if is_message else f"{type(error).__name__}: {error}"


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
