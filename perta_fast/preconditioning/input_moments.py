"""Second moments of the inputs of linear maps."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.data.batches import Batch, batches_of_one_length
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError, NotFiniteError, RunError
from perta_fast.memory import available_bytes, format_size
from perta_fast.models.token_scores import device_of, evaluation_mode
from perta_fast.progress import Bar, Progress

PHASE = "inputs of linear maps"


@torch.no_grad()
def input_moments(
    module: nn.Module,
    maps: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    batch_size: int = 8,
    progress: Progress = False,
) -> dict[str, Tensor]:
    """For each of ``maps``, by its name, the mean of x xᵀ over all tokens of ``samples`` that reach it.

    Returns float32 (d_in, d_in) on the module's device; zeros for a map that no token reaches. Maps with one input,
    such as query, key and value, share one tensor. Memory: 4 d_in² bytes for each input. Raises InputError if the
    system has less, NotFiniteError, naming the map, if an input is not finite.
    """
    moments = Moments()
    with (
        evaluation_mode(module),
        torch.compiler.set_stance("force_eager"),  # compiled code would not call the hooks
        moments.of(maps),
        Bar(len(samples), PHASE, progress, "sample") as bar,
    ):
        for numbers in batches_of_one_length(samples, batch_size):
            batch = Batch.of([samples[k] for k in numbers], device_of(module))
            module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            moments.last = None
            bar.update(len(numbers))
    return moments.means(maps)


class Moments:
    """Sums of x xᵀ by the name of a map, or of the map before it that takes the same input.

    within_memory: raise InputError before a sum is made that the system has no memory for.
    """

    def __init__(self, within_memory: bool = True) -> None:
        self._within_memory = within_memory
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.shares: dict[str, str] = {}
        self.last: tuple[Tensor, str] | None = None  # the input seen last, and the map that it was added for

    @contextmanager
    def of(self, maps: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within it, the inputs of ``maps`` are added, by hooks. ``last`` is to be forgotten after each batch."""
        hooks = [layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in maps.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, name: str, _layer: nn.Module, given: tuple[Any, ...]) -> None:
        """Add the input of a map, unless the map before it took the same."""
        same = self.last[1] if self.last is not None and given[0] is self.last[0] else None
        if self.shares.setdefault(name, same or name) != (same or name):
            raise RunError(f"{name}: takes the same input as another linear map in some batches only")
        if same is not None:
            return
        self.last = (given[0], name)
        inputs = given[0].reshape(-1, given[0].shape[-1]).float()
        if name not in self.sums:
            if self._within_memory:
                _check_memory(inputs)
            self.sums[name] = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        self.sums[name].addmm_(inputs.T, inputs)
        self.counts[name] += len(inputs)

    def means(self, maps: Mapping[str, Any]) -> dict[str, Tensor]:
        """The mean of x xᵀ of each map. Ends the sums, which become these means."""
        own = {name: total.div_(self.counts[name]) for name, total in self.sums.items()}
        for name, mean in own.items():
            if not bool(torch.isfinite(mean).all()):
                raise NotFiniteError(
                    f"an input of {name} is not finite; look at the data, or at the weights of the model"
                )
        return {name: own[self.shares[name]] if name in self.shares else _none(layer) for name, layer in maps.items()}


def in_size(layer: Any) -> int:
    """The length of a linear map's input. Conv1D stores (in, out)."""
    return int(layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0])


def _none(layer: Any) -> Tensor:
    size = in_size(layer)
    return torch.zeros(size, size, device=layer.weight.device)


def _check_memory(inputs: Tensor) -> None:
    size = inputs.shape[1]
    available = available_bytes() if inputs.device.type == "cpu" else None
    if available is not None and 4 * size * size > available:
        raise InputError(
            f"the inputs of the linear maps take another {format_size(4 * size * size)} of memory, "
            f"but {format_size(available)} are free; precondition on a machine with more"
        )
