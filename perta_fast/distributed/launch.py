"""The command line as one of many processes, started by torchrun or a launcher that sets the same variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.errors import InputError, RankLost, RunError

# Longer than a rank ever waits for another one's work. When a process dies, its connections close and the others see
# that at once; when a machine stops answering, the launcher sees it.
_TIMEOUT_HOURS = 12


class Launch:
    """The processes of a launch: ``ranks``, once joined."""

    def __init__(self) -> None:
        self.ranks = Ranks.ALONE
        self._store: Any = None  # keys and values that all processes see

    @contextmanager
    def joined(self) -> Iterator[Ranks]:
        """Join the other processes, if WORLD_SIZE says that there are any, and leave them at the end.

        Where there is CUDA, this process takes the device with the number LOCAL_RANK. Raises InputError if variables
        of the launch are missing or there are too few devices, RunError if the others cannot be reached.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield self.ranks
            return
        from datetime import timedelta

        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        backend, timeout = _choose_backend(), timedelta(hours=_TIMEOUT_HOURS)
        try:
            store, rank, world = next(rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        except ValueError as error:
            wrong = "WORLD_SIZE is set, but other variables of a launch are missing or wrong"
            raise InputError(f"{wrong}: {error}; use torchrun") from error
        except RuntimeError as error:
            raise RunError(f"the other processes of the launch cannot be reached: {error}") from error
        self.ranks, self._store = Ranks.of(dist.group.WORLD), store
        yield self.ranks
        dist.destroy_process_group()  # not after an error: it may wait for a process that is gone

    def should_print(self, error: BaseException) -> bool:
        """Whether this process is the one that tells the user of ``error``."""
        if is_shared(error):
            return self.ranks.first
        if self._store is None or not isinstance(error, RankLost | KeyboardInterrupt):
            return True
        try:  # one of those that are still there: the first to add to this key
            return bool(self._store.add("perta_fast: has told", 1) == 1)
        except RuntimeError:  # the process that held the store is gone
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
