"""Every operation in plain torch, written as its formula. Nothing here is fast; the fast paths are held to it."""

import torch
from torch import Tensor

from perta_fast.rules import Rescaling


def raised(importance: Tensor, p: float) -> Tensor:
    """|I|^p in float32; by magnitude, because a mean gradient is stored with its sign."""
    magnitude = importance.float().abs()
    if p == 1:
        return magnitude
    if p == 2:
        return magnitude * magnitude
    # In double, then rounded: exact for p = 1/2, where torch's own float32 root is not always the nearest.
    return magnitude.double().pow(torch.tensor(p).item()).float()


def weights(forget_importance: Tensor, retain_importance: Tensor, rescaling: Rescaling) -> Tensor:
    """w = I_f^p / (I_f^p + alpha I_r^p), 0 where both are 0; with a threshold, 1 where w exceeds it, else 0."""
    numerator = raised(forget_importance, rescaling.p)
    denominator = numerator + rescaling.alpha * raised(retain_importance, rescaling.p)
    w = torch.where(denominator == 0, 0, numerator / denominator)
    return w if rescaling.threshold is None else (w > rescaling.threshold).float()


def weights_of_ratio(ratio: Tensor, rescaling: Rescaling) -> Tensor:
    """w = 1 / (1 + alpha rho^p) with rho = I_r / I_f, 0 where rho is infinite; with a threshold as in ``weights``.

    A power that overflows is cut to the largest float32: times an alpha of 0 it gives 0, and not NaN.
    """
    power = raised(ratio, rescaling.p).clamp(max=torch.finfo(torch.float32).max)
    denominator = 1 + rescaling.alpha * power
    w = torch.where(ratio.isinf(), 0, torch.ones_like(denominator) / denominator)
    return w if rescaling.threshold is None else (w > rescaling.threshold).float()


# Below, as in the kernels: without I_f, which is then 1 everywhere, I_r is the ratio; without both, w = 1.


def rescaled_subtract(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    rescaling: Rescaling,
) -> Tensor:
    """theta - lam w (theta_f - theta_0), in float32, rounded once; theta itself where the change is zero."""
    task_vector = tuned.float() - base.float()
    return subtract(theta, task_vector, forget_importance, retain_importance, rescaling)


def low_rank_subtract(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    scale: float,
    rescaling: Rescaling,
) -> Tensor:
    """theta - lam w (scale left right); theta: (rows, columns), left: (rows, rank), right: (rank, columns)."""
    task_vector = low_rank_task_vector(left, right, scale)
    return subtract(theta, task_vector, forget_importance, retain_importance, rescaling)


def low_rank_task_vector(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale left right, in float32; the products are added in the order of the rank, as in every backend."""
    total = left.new_zeros(len(left), right.shape[1])
    for k in range(len(right)):
        total = total + left[:, k, None] * right[k]
    return scale * total


def subtract(
    theta: Tensor,
    task_vector: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    rescaling: Rescaling,
) -> Tensor:
    """theta - lam w task_vector, in float32, rounded once; theta itself where the change is zero."""
    if retain_importance is None:
        step = rescaling.lam * task_vector
    elif forget_importance is None:
        step = rescaling.lam * weights_of_ratio(retain_importance, rescaling) * task_vector
    else:
        step = rescaling.lam * weights(forget_importance, retain_importance, rescaling) * task_vector
    return torch.where(step == 0, theta, (theta.float() - step).to(theta.dtype))


def accumulate_(accumulator: Tensor, gradient: Tensor, squared: bool) -> None:
    """accumulator += gradient, or += gradient^2, the square rounded before it is added."""
    gradient = gradient.float()
    accumulator.add_(gradient * gradient if squared else gradient)


def fisher_(
    fisher: Tensor, gradient: Tensor | None, activations: Tensor, output_gradients: Tensor, samples: Tensor
) -> None:
    """fisher += sum over n of (delta_n^T a_n)^2; gradient += sum over n of delta_n^T a_n.

    activations: (M, d_in), output_gradients: (M, d_out), of which the rows [begin, end) in ``samples`` (N, 2)
    belong to sample n.
    """
    for begin, end in samples.tolist():
        delta, a = output_gradients[begin:end].float(), activations[begin:end].float()
        sample_gradient = delta.T @ a  # (d_out, d_in)
        fisher.add_(sample_gradient * sample_gradient)
        if gradient is not None:
            gradient.add_(sample_gradient)
