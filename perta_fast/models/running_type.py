"""The type in which a model runs, where nothing is asked for: its own, or float32 where that is far faster."""

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.dtypes import KERNEL_CODES, torch_dtype

_ASKED_BY = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def running_type(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which a model of type ``own`` runs on a device, unless another is asked for.

    On a processor without instructions for it, torch multiplies bfloat16 and float16 ten to five hundred times slower
    than float32, and adds up in steps that are rounded (github.com/pytorch/pytorch/issues/146508).
    """
    return own if _is_multiplied_fast(own, device) else torch.float32


def first_type(checkpoint: Checkpoint) -> torch.dtype:
    """The type that ``from_pretrained`` takes if the configuration names none."""
    dtypes = (entry.dtype for entry in checkpoint.tensors.values())
    return next((torch_dtype(dtype) for dtype in dtypes if dtype in KERNEL_CODES), torch.float32)


def _is_multiplied_fast(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or dtype not in _ASKED_BY:
        return True
    asked = getattr(torch.ops.mkldnn, _ASKED_BY[dtype], None)
    return asked is not None and bool(asked())  # a build without oneDNN has none
