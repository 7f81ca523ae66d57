"""Runs one part of a model inside the model's own code.

The model's forward pass makes masks, positions and rotary embeddings as usual, while decoder layers that are not to be
run return their input unchanged. So no architecture is written again here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.errors import InputError, NotStreamable

_NOT_UNDERSTOOD = "streaming does not understand this model"


class _Returned(Tensor):
    """The result of a layer, for models that use it directly and for those that take the first item of a tuple.

    ``plain`` is the tensor itself; every operation on a _Returned gives plain tensors.
    """

    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(plain: Tensor) -> Tensor:
        if type(plain) is not Tensor:
            return plain  # a tensor without values (``trial``), which cannot have another type
        result = plain.as_subclass(_Returned)
        result.plain = plain
        return result

    def __getitem__(self, key: Any) -> Tensor:
        return self.plain if type(key) is int and key == 0 else super().__getitem__(key)


class _Reached(Exception):
    """Raised when the part has been run, to skip the rest of the forward pass."""

    def __init__(self, result: Tensor) -> None:
        self.result = result


@dataclass(frozen=True)
class _Call:
    """How the model's forward pass calls layer ``number``: with hidden states, and with masks and positions."""

    number: int
    forward: Callable[..., Any]
    hidden: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All but the hidden states."""
        return self.others, tuple(sorted(self.named.items()))


_StandIn = Callable[[_Call], Tensor]  # what is done in place of the call


class PartialForward:
    """Runs what lies before the layers, one layer, or what lies after them."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, origin: str) -> None:
        self._model: Any = model
        self._layers = layers
        self._origin = origin
        self._stand_in: _StandIn = _unchanged

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the layers' forwards; the other methods work only inside this context."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                layer.forward = self._replaced(number, layer.forward)
                stack.callback(delattr, layer, "forward")
            yield

    def _replaced(self, number: int, forward: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
            hidden = hidden_states.plain if isinstance(hidden_states, _Returned) else hidden_states
            return _Returned.of(self._stand_in(_Call(number, forward, hidden, others, named)))

        return call

    def _run(self, stand_in: _StandIn, attention_mask: Tensor | None, **start: Any) -> Any:
        """The model's output, with ``stand_in`` for its layers."""
        self._stand_in = stand_in
        try:
            return self._model(**start, attention_mask=attention_mask, use_cache=False)
        finally:
            self._stand_in = _unchanged

    def _until_reached(self, stand_in: _StandIn, attention_mask: Tensor | None, **start: Tensor) -> Tensor:
        try:
            self._run(stand_in, attention_mask, **start)
        except _Reached as reached:
            return reached.result
        raise NotStreamable(f"{self._origin}: its forward pass does not call its decoder layers")

    def before_layers(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The hidden states (N, T, d) that the first layer gets."""

        def stop(call: _Call) -> Tensor:
            raise _Reached(call.hidden)

        return self._until_reached(stop, attention_mask, input_ids=input_ids)

    def layer(self, number: int, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The result of layer ``number`` on ``hidden`` (N, T, d)."""

        def run(call: _Call) -> Tensor:
            if call.number < number:
                return call.hidden
            result = call.forward(hidden, *call.others, **call.named)
            raise _Reached(result[0] if isinstance(result, tuple | list) else result)

        return self._until_reached(run, attention_mask, inputs_embeds=_copy(hidden))

    def after_layers(
        self, hidden: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None = None, **others: Any
    ) -> Any:
        """The model's output, with logits, from the last layer's hidden states.

        input_ids: run the input embedding too, although its result is not used. others: arguments of the model.
        """
        last = len(self._layers) - 1
        start = {"inputs_embeds": _copy(hidden)} if input_ids is None else {"input_ids": input_ids}
        return self._run(lambda call: hidden if call.number == last else call.hidden, attention_mask, **start, **others)

    def check(self, input_ids: Tensor, attention_mask: Tensor | None, outside: Sequence[nn.Module]) -> None:
        """Raise InputError unless the layers are a chain and get only hidden states, positions and masks.

        outside: modules with parameters that are in no layer; each must be called.
        """
        calls: list[_Call] = []

        def record(call: _Call) -> Tensor:
            if call.number != len(calls) or (calls and call.hidden is not calls[-1].hidden):
                raise NotStreamable(
                    f"{self._origin}: {_NOT_UNDERSTOOD}: a layer does not take what the one before it gives"
                )
            if call.hidden.shape[:2] != input_ids.shape:
                raise NotStreamable(
                    f"{self._origin}: its layers take hidden states of shape {tuple(call.hidden.shape)}"
                )
            calls.append(call)
            return call.hidden

        called: set[nn.Module] = set()
        handles = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in outside]
        try:
            self._run(record, attention_mask, input_ids=input_ids)
            first, calls = calls, []
            if first:
                self._run(record, attention_mask, inputs_embeds=first[0].hidden.detach())
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's code needs other inputs, or takes no hidden states
            raise NotStreamable(f"{self._origin}: {_NOT_UNDERSTOOD}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        if len(first) != len(self._layers):
            raise NotStreamable(f"{self._origin}: its forward pass calls {len(first)} of {len(self._layers)} layers")
        unused = [type(part).__name__ for part in outside if part not in called]
        if unused:
            raise NotStreamable(
                f"{self._origin}: {unused[0]} has parameters, and is neither before nor after the layers"
            )
        for from_ids, from_states in zip(first, calls, strict=True):
            if not _equal(from_ids.arguments, from_states.arguments):
                raise NotStreamable(
                    f"{self._origin}: {_NOT_UNDERSTOOD}: layer {from_ids.number} is given more than hidden states, "
                    "masks and positions"
                )


def _copy(hidden: Tensor) -> Tensor:
    """A copy, since some models (CTRL) scale their input in place."""
    return hidden.detach().clone()


def _unchanged(call: _Call) -> Tensor:
    return call.hidden


def _equal(first: Any, second: Any) -> bool:
    """Whether two arguments are equal, of a plain type, and need no gradient."""
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and not first.requires_grad and torch.equal(first, second)
    return (first is None or isinstance(first, bool | int | float | str)) and first == second
