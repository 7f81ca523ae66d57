"""Runs one part of a model inside the model's own code.

The model's forward pass makes masks, positions and rotary embeddings as usual, while decoder layers that are not to be
run return their input unchanged. So no architecture is written again here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.errors import InputError

Forward = Callable[..., Tensor]
# In place of a layer's forward: number, original forward, hidden states, other positional and keyword arguments.
StandIn = Callable[[int, Forward, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]

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


class PartialForward:
    """Runs what lies before the layers, one layer, or what lies after them."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, origin: str) -> None:
        self._model: Any = model
        self._layers = layers
        self._origin = origin
        self._stand_in: StandIn = _unchanged

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the layers' forwards; the other methods work only inside this context."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                layer.forward = partial(self._called, number, layer.forward)
                stack.callback(delattr, layer, "forward")
            yield

    def _called(self, number: int, original: Forward, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        given = hidden_states.plain if isinstance(hidden_states, _Returned) else hidden_states
        return _Returned.of(self._stand_in(number, original, given, rest, named))

    def _until_reached(self, stand_in: StandIn, **inputs: Tensor) -> Tensor:
        self._stand_in = stand_in
        try:
            self._model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.result
        finally:
            self._stand_in = _unchanged
        raise InputError(f"{self._origin}: its forward pass does not call its decoder layers")

    def before_layers(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The hidden states (N, T, d) that the first layer gets."""

        def stop(
            number: int, original: Forward, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
        ) -> Tensor:
            raise _Reached(hidden)

        return self._until_reached(stop, input_ids=input_ids, attention_mask=attention_mask)

    def layer(self, wanted: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """The result of layer ``wanted`` on ``hidden`` (N, T, d)."""

        def run(number: int, original: Forward, given: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
            if number < wanted:
                return given
            result = original(hidden, *rest, **named)
            raise _Reached(result[0] if isinstance(result, tuple | list) else result)

        return self._until_reached(run, inputs_embeds=_copy(hidden), attention_mask=attention_mask)

    def after_layers(self, hidden: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> Any:
        """The model's output, with logits, from the last layer's hidden states.

        input_ids: run the input embedding too, although its result is not used.
        """
        last = len(self._layers) - 1

        def replace(
            number: int, original: Forward, given: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
        ) -> Tensor:
            return hidden if number == last else given

        self._stand_in = replace
        start = {"inputs_embeds": _copy(hidden)} if input_ids is None else {"input_ids": input_ids}
        try:
            return self._model(**start, attention_mask=attention_mask, use_cache=False)
        finally:
            self._stand_in = _unchanged

    def check(self, input_ids: Tensor, attention_mask: Tensor, outside: Sequence[nn.Module]) -> None:
        """Raise InputError unless the layers are a chain and get only hidden states, positions and masks.

        outside: modules with parameters that are in no layer; each must be called.
        """
        arguments: list[tuple[Any, ...]] = []
        previous: list[Tensor] = []

        def record(
            number: int, original: Forward, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
        ) -> Tensor:
            if number != len(previous) or (previous and hidden is not previous[-1]):
                raise InputError(
                    f"{self._origin}: {_NOT_UNDERSTOOD}: a layer does not take what the one before it gives"
                )
            if hidden.shape[:2] != input_ids.shape:
                raise InputError(f"{self._origin}: its layers take hidden states of shape {tuple(hidden.shape)}")
            previous.append(hidden)
            arguments.append((rest, tuple(sorted(named.items()))))
            return hidden

        called: set[nn.Module] = set()
        handles = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in outside]
        self._stand_in = record
        try:
            self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            first, start = list(arguments), previous[0].detach() if previous else None
            arguments.clear()
            previous.clear()
            if start is not None:
                self._model(inputs_embeds=start, attention_mask=attention_mask, use_cache=False)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's code needs other inputs, or takes no hidden states
            raise InputError(f"{self._origin}: {_NOT_UNDERSTOOD}: {error}") from error
        finally:
            self._stand_in = _unchanged
            for handle in handles:
                handle.remove()
        if len(first) != len(self._layers):
            raise InputError(f"{self._origin}: its forward pass calls {len(first)} of {len(self._layers)} layers")
        unused = [type(part).__name__ for part in outside if part not in called]
        if unused:
            raise InputError(f"{self._origin}: {unused[0]} has parameters, and is neither before nor after the layers")
        for number, (from_ids, from_states) in enumerate(zip(first, arguments, strict=True)):
            if not _equal(from_ids, from_states):
                raise InputError(
                    f"{self._origin}: {_NOT_UNDERSTOOD}: layer {number} is given more than hidden states, "
                    "masks and positions"
                )


def _copy(hidden: Tensor) -> Tensor:
    """A copy, since some models (CTRL) scale their input in place."""
    return hidden.detach().clone()


def _unchanged(number: int, original: Forward, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return hidden


def _equal(first: Any, second: Any) -> bool:
    """Whether two arguments are equal, of a plain type, and need no gradient."""
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and not first.requires_grad and torch.equal(first, second)
    return (first is None or isinstance(first, bool | int | float | str)) and first == second
