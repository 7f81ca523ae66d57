"""Random Llamas with a tokenizer and data, for the streaming benchmarks."""

from __future__ import annotations

import dataclasses
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

import torch

from bench.inputs.checkpoints import MERGED, Shapes, elements, llama_shapes, normal, write_sharded
from perta_fast.demo.training import train_tokenizer

VOCABULARY = 4096
WORDS = ["".join(random.Random(seed).choices(string.ascii_lowercase, k=4)) for seed in range(400)]


@dataclasses.dataclass(frozen=True)
class StreamJob:
    """Three checkpoints and two data files. size: bytes of one checkpoint. layer_parameters: of one layer."""

    folder: Path
    layers: int
    size: int
    layer_parameters: int
    shapes: Shapes

    def command(self, out: Path, *more: object) -> list[str]:
        """``perta unlearn`` on them, with the options ``more``."""
        settings = ["--rule", "fisher", "--lam", "1", "--batch-size", "8", "--overwrite", "--out", out]
        return self.perta("unlearn", *self.inputs(), *settings, *more)

    def inputs(self) -> list[object]:
        """The options that name checkpoints and data files."""
        paths = {name: self.folder / name for name in MERGED}
        paths |= {name: self.folder / f"{name}.jsonl" for name in ("forget", "retain")}
        return [word for name, path in paths.items() for word in (f"--{name}", path)]

    def perta(self, command: str, *words: object) -> list[str]:
        """``perta COMMAND``, quietly, with these words."""
        return [sys.executable, "-m", "perta_fast", command, *map(str, words), "--quiet"]


def write_stream_job(
    folder: Path, hidden: int, layers: int, samples: int, words: int, *, drawn_on: str = "cpu", **changes: int
) -> StreamJob:
    """Write three bfloat16 checkpoints, and two data files with ``samples`` texts of ``words`` words each.

    drawn_on: the device that draws the weights; for billions of them a GPU takes seconds, a processor minutes.
    changes: entries of the configuration that replace those here.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **changes,
    }
    shapes = llama_shapes(config)
    _write_data(folder, samples, words)
    rows = [{"question": word, "answer": word} for word in WORDS]
    tokenizer = train_tokenizer(rows)
    for kind, name in enumerate(MERGED):
        seeds = {tensor: number + kind * len(shapes) for number, tensor in enumerate(shapes)}

        def make(tensor: str, shape: tuple[int, ...], seeds: dict[str, int] = seeds) -> torch.Tensor:
            values = normal(seeds[tensor], shape, drawn_on).mul_(0.02)
            return (values + 1 if len(shape) == 1 else values).bfloat16().cpu()

        write_sharded(folder / name, "model", shapes, make, {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
        tokenizer.save_pretrained(folder / name)
    return StreamJob(folder, layers, 2 * _count(shapes), _count(shapes, "model.layers.0."), shapes)


def _count(shapes: Shapes, prefix: str = "") -> int:
    return sum(elements(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _write_data(folder: Path, samples: int, words: int) -> None:
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for name in ("forget", "retain"):
        rows = [{"text": " ".join(generator.choices(WORDS, k=words))} for _ in range(samples)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
