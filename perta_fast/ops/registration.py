"""The operations as torch operators, so that torch.compile and fake tensors know them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARY = torch.library.Library("perta_fast", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``torch.ops.perta_fast.NAME``; return a function that calls it, or the implementation if that is enough.

    An eager call on plain tensors does not need torch's dispatcher, which takes longer than all checks of the call.
    schema: NAME and types in torch's notation. implementation: the operation with its checks. fake: the same on tensors
    without data: checks, and results of the right shape.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"perta_fast::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.perta_fast, name).default

    def call(first: Tensor | Sequence[Tensor], *others: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        plain = type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
        return (implementation if plain else operator)(first, *others)

    return call
