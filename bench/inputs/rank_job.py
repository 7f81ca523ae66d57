"""One rank of an importance estimate, again and again.

    python -m bench.inputs.rank_job RANK WORLD STORE ESTIMATOR

Each line on standard input has it estimate once; it answers with a line when it is done.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

import perta_fast as pf
from bench.inputs.importance_job import BATCH, make_model, make_tokens
from perta_fast.data.samples import Sample


def main() -> int:
    """Estimate whenever asked."""
    rank, world, store, estimator = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    group: Any = None
    if world > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
        group = dist.group.WORLD
    model = make_model()
    samples = [Sample(tuple(row), tuple(row)) for row in make_tokens().tolist()]
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        pf.estimate_importance(model, samples, estimator, batch_size=BATCH, progress=False, group=group)  # type: ignore[arg-type]
        print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
