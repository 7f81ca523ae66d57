"""The processes that do one piece of work together, and every way in which they meet.

Every rank calls the same methods in the same order. Torch is imported only where there is more than one.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from perta_fast.errors import (
    InputError,
    NotFiniteError,
    PertaError,
    RankLost,
    RunError,
    advice,
    is_out_of_memory,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work

# What an error on one rank is to the others: the first that fits.
_KINDS = (InputError, NotFiniteError, RunError)


@dataclass(frozen=True)
class Pending:
    """A sum under way; its tensor must not be touched before ``wait`` has returned."""

    work: "Work | None"  # None: done already

    def wait(self) -> None:
        """Return when the sum is there (on a device: when what is launched next will find it there)."""
        if self.work is not None:
            with _losses_named():
                self.work.wait()


@dataclass(frozen=True)
class Ranks:
    """The processes that do one piece of work together; one alone never touches torch.distributed.

    A rank that died, or left by an error of its own, shows on the others as ``errors.RankLost``, raised by the
    methods here and by nothing else: at once where the backend sees its connection close, or when the group's
    timeout is over.
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
        with _losses_named():
            dist.all_gather_object(values, value, self.group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (anything that pickles), on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value if self.first else None]
        with _losses_named():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do the block on every rank, and meet at its end; if it raised on one rank, every rank raises.

        what: the work, for the message if a rank is lost meanwhile. A rank whose block raised raises its own
        error, the others one of the same class (InputError, NotFiniteError, else RunError) that says
        "rank K: message"; ``is_shared`` then tells that all know. Whatever the ranks do together within the
        block, each must do even if it then raises, or the others wait for it. What is no ``Exception``, such as
        an interrupt, leaves at once, and so does RankLost.
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
            told = None if own is None else _told(own)
            failures = {rank: each for rank, each in enumerate(self.gather(told)) if each is not None}
        except RankLost as lost:
            raise RankLost(f"{what}: {lost}") from lost
        if not failures:
            return
        if own is None:
            rank, (kind, text) = next(iter(failures.items()))
            own = kind(f"rank {rank}: {text}")
        own.__dict__["shared"] = True
        raise own

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Do the block, in which ranks meet now and then by ``together`` and each may raise in between.

        An error that leaves it, unless it came of a meeting, is told to the others at the meeting that they
        come to next; what the block still does in threads of its own must be over by then.
        """
        try:
            yield
        except Exception as error:
            if not (isinstance(error, RankLost) or is_shared(error)):
                with suppress(Exception), self.together(what):
                    raise
            raise

    def sum_(self, tensor: "torch.Tensor") -> None:
        """Add up ``tensor`` (contiguous) over all ranks, in place, the same bits on each."""
        self.sum_async_(tensor).wait()

    def sum_async_(self, tensor: "torch.Tensor") -> Pending:
        """Begin ``sum_``; on a device it comes after what has been launched so far."""
        if self.world == 1:
            return Pending(None)
        import torch.distributed as dist

        with _losses_named():
            return Pending(dist.all_reduce(tensor, group=self.group, async_op=True))


Ranks.ALONE = Ranks(0, 1, None)


def is_shared(error: BaseException) -> bool:
    """Whether every rank raised ``error``, or was told of it, so that one of them need speak."""
    return getattr(error, "shared", False)


def _told(error: Exception) -> tuple[type[RunError] | type[InputError], str]:
    """What the other ranks are told of an error: its class, as far as they know it, and its text."""
    if isinstance(error, OSError):
        return RunError, advice(error)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RunError)
    meant_for_users = isinstance(error, PertaError)
    return kind, str(error) if meant_for_users else f"{type(error).__name__}: {error}"


@contextmanager
def _losses_named() -> Iterator[None]:
    """Every backend raises a RuntimeError of its own when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise RankLost(f"another process of this run died or does not answer ({reason})") from error
