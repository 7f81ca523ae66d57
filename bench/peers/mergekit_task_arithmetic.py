"""mergekit's plain task arithmetic, same files: base + (model − base) − λ (tuned − base).

mergekit has no per-parameter rescaling, so it reads three inputs where the others read five. Its fastest settings
are used: lazy loading, all threads, and arithmetic in bfloat16, as users set it (float32 with
``out_dtype: bfloat16`` rounds once, as ours does, but is slower and needs more memory).

Install it into an environment of its own, as it pins other versions than this project:

    python3 -m venv mergekit-env
    mergekit-env/bin/pip install torch==2.13.0   # first: the version that the others are measured with
    mergekit-env/bin/pip install mergekit        # 0.1.5 accepts torch 2.13 and transformers 5
    export PERTA_BENCH_MERGEKIT=$PWD/mergekit-env/bin/mergekit-yaml
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

RECIPE = """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {model}
    parameters: {{weight: 1.0}}
  - model: {tuned}
    parameters: {{weight: {weight}}}
parameters: {{normalize: false}}
dtype: bfloat16
"""


def executable() -> str | None:
    """The program: $PERTA_BENCH_MERGEKIT if set, else mergekit-yaml on PATH; None if it is absent."""
    return shutil.which(os.environ.get("PERTA_BENCH_MERGEKIT") or "mergekit-yaml")


def write_recipe(path: Path, *, model: Path, base: Path, tuned: Path, lam: float) -> None:
    """Write mergekit's configuration for θ_full − λ (θ_f − θ_0)."""
    path.write_text(RECIPE.format(model=model, base=base, tuned=tuned, weight=-lam))


def command(program: str, recipe: Path, out: Path, *, threads: int) -> list[str]:
    """The command line that merges ``recipe`` into ``out``."""
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    return [program, str(recipe), str(out), *options, "--num-threads", str(threads)]
