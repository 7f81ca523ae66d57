"""One rank of an importance estimate that runs several times.

    python -m bench.inputs.rank_job RANK WORLD STORE ESTIMATOR

For each line on standard input it estimates once, then writes a line to standard output.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

import perta_fast as pf
from bench.inputs.importance_job import BATCH, make_model, make_tokens, samples_of


def main() -> int:
    """Estimate once for each line on standard input."""
    rank, world, store, estimator = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    group: Any = None
    if world > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
        group = dist.group.WORLD
    model, samples = make_model(), samples_of(make_tokens())
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        pf.estimate_importance(model, samples, estimator, batch_size=BATCH, progress=False, group=group)  # type: ignore[arg-type]
        print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
