"""Unlearn with one decoder layer in memory at a time, and receive the run's progress in your program."""

from typing import Any

from tiny import tiny_job

import perta_fast as pf


def show(event: pf.Event) -> None:
    """Replace this by what your program does with progress. An exception here stops the run."""
    if event.done == event.total:
        print(f"{event.phase}: {event.total} {event.unit}")


with tiny_job() as folder:
    checkpoints = [folder / name for name in ("model", "base", "tuned")]
    data = [folder / "forget.jsonl", folder / "retain.jsonl"]
    how: dict[str, Any] = {"rule": "empirical-fisher", "lam": 1.0}
    pf.unlearn(*checkpoints, *data, **how, out=folder / "whole", progress=False)
    report = pf.unlearn(*checkpoints, *data, **how, out=folder / "streamed", stream=True, progress=show)

    print(f"schedule: {report.settings['schedule']}")
    whole, streamed = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    print("the same bytes as with the model in memory" if whole == streamed else "the bytes differ")
