"""Choose the strength: score several from one estimate of the importances, then write the one that is kept."""

from tiny import tiny_job

import perta_fast as pf

with tiny_job() as folder:
    checkpoints = [folder / name for name in ("model", "base", "tuned")]
    data = [folder / "forget.jsonl", folder / "retain.jsonl"]

    print(pf.sweep(*checkpoints, *data, rule="grad", lams=[0.5, 1.0, 2.0], progress=False).summary())

    # Or state what may be lost, and have the largest strength found that keeps to it.
    found = pf.sweep(*checkpoints, *data, rule="grad", max_retain_increase=50, progress=False)
    assert found.best is not None
    print(f"lambda {found.best.lam:.3g} raises the forget loss to {found.best.forget_loss:.2f} nats")
    if found.best.lam > 0:
        pf.unlearn(*checkpoints, *data, rule="grad", lam=found.best.lam, out=folder / "out", progress=False)
