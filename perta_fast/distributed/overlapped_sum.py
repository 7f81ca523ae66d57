"""Accumulators added up over ranks, each as soon as it is complete, while the backward pass goes on."""

import threading
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from perta_fast.distributed.ranks import Pending, Ranks
from perta_fast.errors import RankLost, RunError

_SMALL = 1 << 20  # bytes: smaller tensors share a message, as sending one costs about as much as this many bytes
_MESSAGE = 16 << 20  # bytes of a message of small tensors


class OverlappedSum:
    """Sums contiguous float32 ``tensors`` over ranks in place; at the end of the context all are summed.

    All ranks send the same messages in the same order, whichever parameters their own samples reach: the large tensors
    from the last to the first, as a backward pass completes them, then the small ones, several in a message. A message
    goes out when its tensors and all earlier messages are complete, or at the end of the context. This holds after an
    error too, because the other ranks wait for the sums; an interrupt leaves at once.
    """

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        self._ranks, self._tensors = ranks, tensors
        self._incomplete = set(tensors)
        self._unsent = deque(_messages(tensors) if ranks.world > 1 else [])
        self._sent: list[tuple[Pending, Tensor, list[Tensor]]] = []
        self._last = False
        self._lock = threading.Lock()  # autograd has a thread for each device

    def __enter__(self) -> "OverlappedSum":
        return self

    def last_pass(self) -> None:
        """The next backward pass is the last: what it completes is final."""
        self._last = True

    def complete(self, name: str) -> None:
        """A backward pass has added all that it has for a parameter; names of other tensors are ignored.

        Raises RunError if the last pass completes a parameter twice.
        """
        if not self._last or self._ranks.world == 1 or name not in self._tensors:
            return
        with self._lock:
            if name not in self._incomplete:
                raise RunError(
                    f"parameter {name} got its gradient twice in one backward pass; if the model checkpoints its "
                    "activations, let it do so with use_reentrant=False"
                )
            self._incomplete.remove(name)
            while self._unsent and self._incomplete.isdisjoint(self._unsent[0]):
                self._send()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RankLost) or not isinstance(error, Exception | None):
            return
        while self._unsent:
            self._send()
        for pending, message, tensors in self._sent:
            pending.wait()
            if len(tensors) > 1:
                parts = message.split([tensor.numel() for tensor in tensors])
                for tensor, summed in zip(tensors, parts, strict=True):
                    tensor.copy_(summed.view_as(tensor))

    def _send(self) -> None:
        tensors = [self._tensors[name] for name in self._unsent[0]]
        message = tensors[0] if len(tensors) == 1 else torch.cat([tensor.view(-1) for tensor in tensors])
        self._sent.append((self._ranks.sum_async_(message), message, tensors))
        self._unsent.popleft()  # not before it is sent: after an error it is sent at the end of the context


def _messages(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the tensors in each message."""
    names = list(tensors)[::-1]
    messages = [[name] for name in names if tensors[name].nbytes >= _SMALL]
    filling: dict[torch.device, list[str]] = {}  # the message that small tensors of a device go into now
    for name in names:
        device = tensors[name].device
        if 0 < tensors[name].nbytes < _SMALL:
            if device not in filling or sum(tensors[member].nbytes for member in filling[device]) >= _MESSAGE:
                filling[device] = []
                messages.append(filling[device])
            filling[device].append(name)
    return messages
