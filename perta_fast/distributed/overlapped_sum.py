"""Accumulators added up over ranks, each as soon as it is complete, while the backward pass goes on."""

import threading
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from perta_fast.distributed.ranks import Pending, Ranks
from perta_fast.errors import RankLost, RunError

_SMALL = 1 << 20  # bytes of a tensor below which it shares a message: a message costs as long as this many
_MESSAGE = 16 << 20  # bytes of a message of small tensors


class OverlappedSum:
    """Sums contiguous float32 ``tensors`` over ranks in place; all are summed when the context has been left.

    Messages must go out in one order on all ranks, whatever a rank's own samples reach: the large tensors from
    the last to the first, as a backward pass completes them, then the small ones, several in a message. Each is
    sent once its tensors and all before it are complete, and the rest on leaving; after an error too, as the
    other ranks wait for it. An interrupt leaves at once.
    """

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        self._tensors = tensors
        self._messages = _messages(tensors) if ranks.world > 1 else []
        self._missing = set(tensors)
        self._sent: list[tuple[Pending, list[str], Tensor]] = []
        self._last = False
        self._lock = threading.Lock()  # autograd has a thread for each device

    def __enter__(self) -> "OverlappedSum":
        return self

    def last_pass(self) -> None:
        """What is now reported as complete will not change any more."""
        self._last = True

    def complete(self, name: str) -> None:
        """A pass has added all that it has for a parameter; one that is not summed here does not matter.

        Raises RunError if it had said so before.
        """
        if not self._last or self._ranks.world == 1 or name not in self._tensors:
            return
        with self._lock:
            if name not in self._missing:
                raise RunError(
                    f"parameter {name} was given its gradient twice in one backward pass; if the model "
                    "checkpoints its activations, let it do so with use_reentrant=False"
                )
            self._missing.remove(name)
            while len(self._sent) < len(self._messages) and self._missing.isdisjoint(self._next()):
                self._send()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RankLost) or not (error is None or isinstance(error, Exception)):
            return
        while len(self._sent) < len(self._messages):
            self._send()
        for pending, names, message in self._sent:
            pending.wait()
            if len(names) > 1:
                parts = message.split([self._tensors[name].numel() for name in names])
                for name, part in zip(names, parts, strict=True):
                    self._tensors[name].copy_(part.view_as(self._tensors[name]))

    def _next(self) -> list[str]:
        return self._messages[len(self._sent)]

    def _send(self) -> None:
        names = self._next()
        if len(names) == 1:
            message = self._tensors[names[0]]
        else:
            message = torch.cat([self._tensors[name].view(-1) for name in names])
        self._sent.append((self._ranks.sum_async_(message), names, message))


def _messages(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names in each message."""
    names = list(tensors)[::-1]
    messages = [[name] for name in names if tensors[name].nbytes >= _SMALL]
    small: dict[torch.device, list[str]] = {}
    for name in names:
        if 0 < tensors[name].nbytes < _SMALL:
            group = small.setdefault(tensors[name].device, [])
            if sum(tensors[each].nbytes for each in group) >= _MESSAGE:
                group = small[tensors[name].device] = []
            if not group:
                messages.append(group)
            group.append(name)
    return messages
