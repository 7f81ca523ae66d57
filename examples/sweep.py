"""Choose the strength: score several with one estimate of the importances, then write the best."""

from tiny import tiny_job

import perta_fast as pf

with tiny_job() as folder:
    checkpoints = [folder / name for name in ("model", "base", "tuned")]
    data = [folder / "forget.jsonl", folder / "retain.jsonl"]

    print(pf.sweep(*checkpoints, *data, rule="grad", lams=[0.5, 1.0, 2.0], progress=False).summary())

    # Or give a limit on the retain loss, and let it find the largest strength within.
    searched = pf.sweep(*checkpoints, *data, rule="grad", max_retain_increase=50, progress=False)
    assert searched.best is not None
    print(f"lambda {searched.best.lam:.3g} raises the forget loss to {searched.best.forget_loss:.2f} nats")
    if searched.best.lam > 0:
        pf.unlearn(*checkpoints, *data, rule="grad", lam=searched.best.lam, out=folder / "out", progress=False)
