"""Unlearn a checkpoint with one call, and print what it still knows."""

from tiny import print_losses, tiny_job

import perta_fast as pf

with tiny_job() as folder:
    report = pf.unlearn(
        folder / "model",
        folder / "base",
        folder / "tuned",
        folder / "forget.jsonl",
        folder / "retain.jsonl",
        out=folder / "unlearned",
    )
    print(report.summary())
    for name in ("model", "unlearned"):
        print_losses(name, folder)
    most = max(report.tensors, key=lambda tensor: tensor.relative_change or 0)
    print(f"changed the most: {most.name}, by {most.relative_change:.1%} of its norm")
