"""fisher += sum over samples of (delta_n^T a_n)^2: the exact per-sample Fisher of a linear map."""

import torch
from torch import Tensor

from perta_fast.ops import reference
from perta_fast.ops.backends import DTYPE_CODES


def accumulate_squared_gradients_(
    fisher: Tensor, activations: Tensor, output_gradients: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Add each sample's squared weight gradient to ``fisher`` in place.

    fisher: (d_out, d_in) float32; overwritten. activations: (N, T, d_in), output_gradients: (N, T, d_out), on
    the same device, each float32, bfloat16 or float16; rows of zeros (padding) contribute nothing.
    backend: "auto" or "reference", the only one so far. Returns fisher. Raises TypeError or ValueError naming
    the argument. Memory: one sample's gradient, (d_out, d_in) float32.
    """
    for name, tensor in (
        ("fisher", fisher),
        ("activations", activations),
        ("output_gradients", output_gradients),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")
        if tensor.device != fisher.device:
            raise ValueError(f"{name} is on {tensor.device}; {fisher.device} is needed")
    if fisher.dtype != torch.float32 or fisher.dim() != 2:
        raise ValueError(f"fisher is {fisher.dtype} of {fisher.dim()} dimensions; float32 of 2 is needed")
    if activations.dim() != 3 or activations.shape[2] != fisher.shape[1]:
        raise ValueError(
            f"activations has shape {tuple(activations.shape)}; (N, T, {fisher.shape[1]}) is needed"
        )
    wanted = (*activations.shape[:2], fisher.shape[0])
    if tuple(output_gradients.shape) != wanted:
        raise ValueError(f"output_gradients has shape {tuple(output_gradients.shape)}; {wanted} is needed")
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} does not serve this operation; available: reference")
    with torch.no_grad():
        reference.accumulate_squared_gradients_(fisher, activations, output_gradients)
    return fisher
