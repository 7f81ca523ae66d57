"""The arithmetic of preconditioning."""

import torch
from torch import Tensor

ROWS = 512  # of D that are solved for at a time


def preconditioned(direction: Tensor, moment: Tensor, mu: float) -> Tensor:
    """D (I + mu A / a)⁻¹, where a is the mean eigenvalue of A.

    That is the D' with the least |D' - D|² + (mu / a) · mean |D' x|² over the inputs x: D with little left along the
    directions that many inputs have, and all of it along those that none has.

    direction: D (d_out, d_in). moment: A (d_in, d_in), the mean of x xᵀ; if it is 0, D comes back as it is. mu: 0
    to ``LARGEST_MU``. Returns float32 on the device of ``moment``; solved in float64. Memory: 8 d_in² bytes, and
    24 d_in for each of ``ROWS`` rows.

    Source: SAGE (arXiv 2606.18309); here with all of A, where the paper takes its leading directions.
    """
    direction = direction.to(moment)
    mean = float(moment.diagonal().mean())
    if mean == 0 or mu == 0:
        return direction.clone()
    factor = moment.double().mul_(mu / mean)
    factor.diagonal().add_(1)
    torch.linalg.cholesky(factor.mT, out=factor.mT)  # in its own place: it is symmetric
    result = torch.empty_like(direction)
    for rows, solved in zip(direction.split(ROWS), result.split(ROWS), strict=True):
        solved.copy_(torch.cholesky_solve(rows.double().mT, factor.mT).mT)
    return result
