"""Tune a LoRA adapter on the forget data and subtract it, without a merged checkpoint.

Needs the extra: pip install "perta-fast[tune]".
"""

from tiny import print_losses, tiny_job

import perta_fast as pf

with tiny_job() as folder:
    tuning = pf.tune(
        folder / "base",
        folder / "forget.jsonl",
        folder / "adapter",
        rank=8,
        epochs=15,
        lr=5e-3,
        batch_size=4,
        progress=False,
    )
    print(tuning.summary())
    adapter, base = (
        sum(path.stat().st_size for path in (folder / name).glob("*.safetensors")) for name in ("adapter", "base")
    )
    print(f"the adapter has {adapter / base:.0%} of the bytes of the base")

    pf.unlearn(
        folder / "model",
        folder / "base",
        folder / "adapter",
        folder / "forget.jsonl",
        folder / "retain.jsonl",
        out=folder / "unlearned",
        progress=False,
    )
    for name in ("model", "unlearned"):
        print_losses(name, folder)
