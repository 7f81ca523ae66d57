"""The files beside the weights."""

import shutil
from pathlib import Path

from perta_fast.checkpoints.checkpoint import OTHER_WEIGHTS, PICKLED, Checkpoint


def copy_companions(source: Checkpoint, target: Path) -> None:
    """Copy everything beside the weights: config, tokenizer, generation config, code, and the index in use."""
    for path in sorted(source.path.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith((".safetensors", *PICKLED, *OTHER_WEIGHTS))
        if path.is_file() and (path == source.index or not weights):
            shutil.copyfile(path, target / path.name)
