"""An importance of your own: magnitudes smoothed within each row, so that a weight's neighbours count too.

You can save and apply anything that you compute from importances, as long as names and shapes stay the same. The
weights are then those of the general form, w = I_f^p / (I_f^p + alpha I_r^p).
"""

from pathlib import Path

import torch
from tiny import print_losses, tiny_job

import perta_fast as pf


def smoothed(importance: pf.Importance, share: float = 0.5) -> pf.Importance:
    """Each magnitude moved by ``share`` towards the mean of its row. A row is the weights of one output."""

    def smooth(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.abs().lerp(gradient.abs().mean(dim=-1, keepdim=True), share)

    tensors = {name: smooth(gradient) for name, gradient in importance.tensors.items()}
    return pf.Importance(tensors, importance.metadata)


def apply(folder: Path, kind: str, importances: dict[str, pf.Importance]) -> None:
    """Subtract with p = 2 and alpha = 2, which protects the retain data more, and print the losses."""
    for role, importance in importances.items():
        importance.save(folder / kind / role)
    pf.apply(
        folder / "model",
        folder / "base",
        folder / "tuned",
        folder / kind / "forget",
        folder / kind / "retain",
        rule="grad",
        p=2.0,
        alpha=2.0,
        lam=1.0,
        out=folder / f"by {kind}",
        progress=False,
    )
    print_losses(f"by {kind}", folder)


with tiny_job() as folder:
    print_losses("model", folder)
    plain = {
        role: pf.estimate_importance(folder / "base", folder / f"{role}.jsonl", progress=False)
        for role in ("forget", "retain")
    }
    apply(folder, "plain", plain)
    apply(folder, "smoothed", {role: smoothed(importance) for role, importance in plain.items()})
