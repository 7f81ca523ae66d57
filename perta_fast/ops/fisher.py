"""fisher += sum over samples of (delta_n^T a_n)^2: the exact per-sample Fisher of a linear map."""

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import addresses, check_apart, check_array, check_types, choose, dtype_codes
from perta_fast.ops.registration import register


def accumulate_squared_gradients_(
    fisher: Tensor,
    activations: Tensor,
    output_gradients: Tensor,
    *,
    lengths: Tensor | None = None,
    gradient: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add each sample's squared weight gradient to ``fisher`` in place (PerTA, arXiv 2601.22030, I_f and I_r).

    The gradient of a linear map y = W a is, for sample n, G_n = delta_n^T a_n, a sum over its tokens. One pass computes
    fisher += sum_n G_n^2 and, if there is a ``gradient``, gradient += sum_n G_n; no G_n is ever stored.

    fisher: (d_out, d_in) float32, contiguous; overwritten. gradient: the same, or None. activations: (N, T, d_in);
    output_gradients: (N, T, d_out); contiguous, on the same device, each float32, bfloat16 or float16. lengths: (N,)
    integers between 0 and T: the number of real tokens of each sample; those after them are not read. None: all.
    Or without padding: activations (M, d_in), output_gradients (M, d_out), and ``lengths``, which sum to M: the numbers
    of consecutive rows of each sample. backend: "auto", "reference", "cpp" (CPU), "triton".

    Returns fisher. Sums are float32; backends agree to a relative error of 1e-5 of the norm in float32. Raises
    TypeError or ValueError naming the argument. Memory on a CPU: for each thread up to 1248 bytes for each token of the
    longest sample, of at least 512 tokens; the reference holds the gradient of one sample.
    """
    optional = {"lengths": lengths, "gradient": gradient}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_types(fisher=fisher, activations=activations, output_gradients=output_gradients, backend=backend, **given)
    _FISHER(fisher, activations, output_gradients, lengths, gradient, backend)
    return fisher


def _fisher_(
    fisher: Tensor,
    activations: Tensor,
    output_gradients: Tensor,
    lengths: Tensor | None,
    gradient: Tensor | None,
    backend: str,
) -> None:
    _check(fisher, activations, output_gradients, lengths, gradient)
    written = {"fisher": fisher} if gradient is None else {"fisher": fisher, "gradient": gradient}
    check_apart(written, {"activations": activations, "output_gradients": output_gradients})
    samples = _sample_rows(activations, lengths)
    chosen = choose(backend, fisher.device, serving=("reference", "cpp", "triton"))
    arrays = fisher, gradient, activations.flatten(0, -2), output_gradients.flatten(0, -2), samples
    if chosen == "reference":
        with torch.no_grad():
            reference.fisher_(*arrays)
        return
    if chosen == "triton":
        from perta_fast.kernels.fisher import fisher_triton_

        fisher_triton_(*arrays)
    elif fisher.numel():
        compiled.kernels().fisher(
            *addresses(arrays[:4]),
            *dtype_codes(arrays[2:4]),
            *reversed(fisher.shape),
            samples.data_ptr(),
            len(samples),
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(list(written.values()))


def _check(
    fisher: Tensor, activations: Tensor, output_gradients: Tensor, lengths: Tensor | None, gradient: Tensor | None
) -> None:
    """Raise unless types, shapes and devices fit."""
    inputs = {"activations": activations, "output_gradients": output_gradients}
    accumulators = {"fisher": fisher} | ({} if gradient is None else {"gradient": gradient})
    for name, tensor in (accumulators | inputs).items():
        check_array(name, tensor, fisher.device)
    for name, tensor in accumulators.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.shape != fisher.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; float32 (d_out, d_in) is needed"
            )
    d_out, d_in = fisher.shape
    if activations.dim() not in (2, 3) or activations.shape[-1] != d_in:
        raise ValueError(f"activations has shape {tuple(activations.shape)}; (N, T, {d_in}) is needed")
    wanted = (*activations.shape[:-1], d_out)
    if tuple(output_gradients.shape) != wanted:
        raise ValueError(f"output_gradients has shape {tuple(output_gradients.shape)}; {wanted} is needed")
    if lengths is None and activations.dim() == 2:
        raise ValueError("lengths is needed where activations has no sample dimension")
    if lengths is not None:
        vector = lengths.layout == torch.strided and not lengths.is_nested and lengths.dim() == 1
        if not vector or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError("lengths must be integers (N,): int32 or int64, dense")


def _sample_rows(activations: Tensor, lengths: Tensor | None) -> Tensor:
    """(N, 2) int64 on the CPU: first row of each sample, and the row after its last, of the flat inputs."""
    if activations.dim() == 3:
        count, tokens = activations.shape[:2]
        begins = torch.arange(count) * tokens
        lengths = torch.full((count,), tokens) if lengths is None else lengths.to("cpu", torch.int64)
        if len(lengths) != count or bool(((lengths < 0) | (lengths > tokens)).any()):
            raise ValueError(f"lengths must be {count} numbers between 0 and {tokens}, one a sample")
    else:
        assert lengths is not None  # checked
        lengths = lengths.to("cpu", torch.int64)
        if bool((lengths < 0).any()) or int(lengths.sum()) != len(activations):
            raise ValueError(f"lengths must not be negative and must sum to {len(activations)}, the number of rows")
        begins = lengths.cumsum(0) - lengths
    return torch.stack([begins, begins + lengths], dim=1)


_FISHER = register(
    "accumulate_squared_gradients_(Tensor(a!) fisher, Tensor activations, Tensor output_gradients, "
    "Tensor? lengths, Tensor(b!)? gradient, str backend) -> ()",
    _fisher_,
    lambda *arguments: _check(*arguments[:5]),
)
