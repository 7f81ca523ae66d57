"""A process that prints the peak memory of a streamed estimate at 2 and 8 layers, and what one layer must take.

A line for each estimator that it is given. All in bytes above what the process held before; the weights of both models
are on disk.
"""

import sys
from pathlib import Path

import torch

from perta_fast import estimate_importance
from tests.support.models import draw_samples, llama, tokenizer
from tests.support.peak_memory import peak_memory

SAMPLES = draw_samples(24, longest=8)


def write(folder: Path, hidden: int, layers: int) -> int:
    """A checkpoint; the bytes of one layer's weights."""
    model = llama(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return sum(4 * parameter.numel() for parameter in model.model.layers[0].parameters())


def main(folder: Path, *estimators: str) -> None:
    torch.set_num_threads(1)
    write(folder / "tiny", 16, 1)
    write(folder / "shallow", 512, 2)
    layer = write(folder / "deep", 512, 8)

    def stream(name: str, estimator: str) -> None:
        out = folder / f"{name}-{estimator}"
        estimate_importance(folder / name, SAMPLES, estimator, out=out, stream=True, progress=False)

    for estimator in estimators:
        stream("tiny", estimator)  # what torch allocates once
        peaks = []
        for name in ("shallow", "deep"):
            with peak_memory() as memory:
                stream(name, estimator)
            peaks.append(memory.anonymous)
            if name == "shallow":
                start = memory.baseline
        print(*(peak - start for peak in peaks), 2 * layer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
