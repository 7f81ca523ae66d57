"""The command line as one of many processes, which torchrun or what sets the same variables has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.errors import InputError, RankLost, RunError

# More than a rank may have to wait for the work of another. One that dies is missed at once all the same, as
# its connections close; of a machine that goes without a word, the launcher knows.
_PATIENCE = timedelta(hours=12)


class Launch:
    """This process's place in the launch: ``ranks``, once joined."""

    def __init__(self) -> None:
        self.ranks = Ranks.ALONE
        self._store: Any = None  # what every process can reach, over the launcher

    @contextmanager
    def joined(self) -> Iterator[Ranks]:
        """Join the other processes, if WORLD_SIZE says that there are any, and leave them at the end.

        The device of each is the CUDA device that LOCAL_RANK numbers, if there are any. Raises InputError if
        the variables of the launch are incomplete or there are too few devices, RunError if the others cannot
        be reached.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield self.ranks
            return
        import torch.distributed as dist

        self._join()
        yield self.ranks
        dist.destroy_process_group()  # not after an error: it may wait for a process that is gone

    def _join(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        backend = _choose_backend()
        try:
            store, rank, world = next(rendezvous("env://", timeout=_PATIENCE))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
        except ValueError as error:
            raise InputError(f"WORLD_SIZE is set, but not all that belongs to it: {error}; use torchrun") from error
        except RuntimeError as error:
            raise RunError(f"the other processes of the launch cannot be reached: {error}") from error
        self.ranks, self._store = Ranks.of(dist.group.WORLD), store

    def should_print(self, error: BaseException) -> bool:
        """Whether it is for this process to tell the user of ``error``."""
        if is_shared(error):
            return self.ranks.first
        if self._store is None or not isinstance(error, RankLost | KeyboardInterrupt):
            return True
        try:  # whoever is left, and comes first
            return bool(self._store.add("perta_fast: has told", 1) == 1)
        except RuntimeError:  # the store went with the process that held it
            return True


def _choose_backend() -> str:
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"there are more processes than CUDA devices on this machine ({count}); start one for each, or set "
            'CUDA_VISIBLE_DEVICES="" to run on the CPU'
        )
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl"
