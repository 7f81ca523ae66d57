"""Processors of other kinds than this one."""

import pytest
import torch

from perta_fast.models import running_type


def have_instructions(monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """Have torch say whether the processor multiplies bfloat16 and float16."""
    for name in running_type._ASKED_BY.values():
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: given, raising=False)
