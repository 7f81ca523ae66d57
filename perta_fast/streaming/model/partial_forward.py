"""Parts of a model run alone, inside the model's own code.

Its forward pass makes masks, positions and rotary embeddings as it always does, while the decoder layers that
are not meant hand on what they are given. No architecture is written anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.errors import InputError

Forward = Callable[..., Tensor]
StandIn = Callable[[int, Forward, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]

_NOT_UNDERSTOOD = "streaming does not understand this model"


class _Returned(Tensor):
    """What a layer returns, for models that take it as it is and for those that take the first of a tuple.

    ``plain`` is the tensor itself; every operation gives plain ones.
    """

    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(plain: Tensor) -> Tensor:
        if type(plain) is not Tensor:
            return plain  # one without values (``trial``), which can be of no other type
        result = plain.as_subclass(_Returned)
        result.plain = plain
        return result

    def __getitem__(self, key: Any) -> Tensor:
        return self.plain if type(key) is int and key == 0 else super().__getitem__(key)


class _Reached(Exception):
    """The part that was wanted has been run; the rest of the forward pass is not."""

    def __init__(self, result: Tensor) -> None:
        self.result = result


class PartialForward:
    """Runs what lies before the layers, one layer, or what lies after them."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, origin: str) -> None:
        self._model: Any = model
        self._layers = layers
        self._origin = origin
        self._stand_in: StandIn = _hand_on

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The layers' forwards are replaced; no other method works outside."""
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
            self._stand_in = _hand_on
        raise InputError(f"{self._origin}: its forward pass does not call its decoder layers")

    def before_layers(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (N, T, d) that the first layer is given."""

        def stop(
            number: int, original: Forward, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
        ) -> Tensor:
            raise _Reached(hidden)

        return self._until_reached(stop, input_ids=input_ids, attention_mask=attention_mask)

    def layer(self, wanted: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """What layer ``wanted`` makes of ``hidden`` (N, T, d)."""

        def run(number: int, original: Forward, given: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
            if number < wanted:
                return given
            result = original(hidden, *rest, **named)
            raise _Reached(result[0] if isinstance(result, tuple | list) else result)

        return self._until_reached(run, inputs_embeds=_apart(hidden), attention_mask=attention_mask)

    def after_layers(self, hidden: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None) -> Any:
        """The model's output, logits and all, from the last layer's hidden states.

        input_ids: run the input embedding too, although its result plays no part.
        """
        last = len(self._layers) - 1

        def replace(
            number: int, original: Forward, given: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
        ) -> Tensor:
            return hidden if number == last else given

        self._stand_in = replace
        start = {"inputs_embeds": _apart(hidden)} if input_ids is None else {"input_ids": input_ids}
        try:
            return self._model(**start, attention_mask=attention_mask, use_cache=False)
        finally:
            self._stand_in = _hand_on

    def check(self, input_ids: Tensor, attention_mask: Tensor, outside: Sequence[nn.Module]) -> None:
        """Raise InputError unless the layers are a chain, given nothing else but positions and masks.

        outside: modules with parameters that are no part of a layer; each must be called.
        """
        given: list[tuple[Any, ...]] = []
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
            given.append((rest, tuple(sorted(named.items()))))
            return hidden

        called: set[nn.Module] = set()
        handles = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in outside]
        self._stand_in = record
        try:
            self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            first, start = list(given), previous[0].detach() if previous else None
            given.clear()
            previous.clear()
            if start is not None:
                self._model(inputs_embeds=start, attention_mask=attention_mask, use_cache=False)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its code wants something that is not there, or takes no hidden states
            raise InputError(f"{self._origin}: {_NOT_UNDERSTOOD}: {error}") from error
        finally:
            self._stand_in = _hand_on
            for handle in handles:
                handle.remove()
        if len(first) != len(self._layers):
            raise InputError(f"{self._origin}: its forward pass calls {len(first)} of {len(self._layers)} layers")
        unused = [type(part).__name__ for part in outside if part not in called]
        if unused:
            raise InputError(f"{self._origin}: {unused[0]} has parameters, and is neither before nor after the layers")
        for number, (one, other) in enumerate(zip(first, given, strict=True)):
            if not _same(one, other):
                raise InputError(
                    f"{self._origin}: {_NOT_UNDERSTOOD}: layer {number} is given more than hidden states, "
                    "masks and positions"
                )


def _apart(hidden: Tensor) -> Tensor:
    """A copy, as some models scale what they are given in place (CTRL)."""
    return hidden.detach().clone()


def _hand_on(number: int, original: Forward, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return hidden


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments are equal, plain, and free of any gradient."""
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and not first.requires_grad and torch.equal(first, second)
    return (first is None or isinstance(first, bool | int | float | str)) and first == second
