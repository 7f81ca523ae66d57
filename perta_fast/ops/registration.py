"""The operations as torch operators, so that torch.compile and fake tensors know them.

An eager call on plain tensors goes past torch's dispatcher, which would cost more than all checks of the call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARY = torch.library.Library("perta_fast", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``torch.ops.perta_fast.NAME`` and return it.

    schema: NAME and types in torch's notation. implementation: the operation with its checks. fake: the same on tensors
    without data: checks, and results of the right shape.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"perta_fast::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.perta_fast, name).default
    return operator


def traced(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher: it is being compiled, or its tensors are not plain."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter)
