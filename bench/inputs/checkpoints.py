"""Write the checkpoints and importances that the file benchmarks read, in shards of about 400 MB.

All are of one random Llama in bfloat16. model and tuned are base plus small noise. The importances have both signs,
like mean gradients.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 400_000_000
MERGED = ("model", "base", "tuned")
IMPORTANCES = ("forget_importance", "retain_importance")

Shapes = dict[str, tuple[int, ...]]
Maker = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class CheckpointSet:
    """The five inputs in ``folder``, and the number of parameters of each."""

    folder: Path
    parameters: int

    def path(self, name: str) -> Path:
        """The directory of one input."""
        return self.folder / name

    def files(self, name: str) -> list[Path]:
        """The safetensors files of one input, in order."""
        return sorted(self.path(name).glob("*.safetensors"))

    def size(self, name: str) -> int:
        """Bytes of one input's safetensors files."""
        return sum(path.stat().st_size for path in self.files(name))


def llama_config(parameters: int) -> dict[str, Any]:
    """A Llama configuration with about ``parameters`` parameters: they choose the widths, then the depth."""
    if parameters >= 4_000_000_000:
        hidden, intermediate, vocabulary = 4096, 11008, 32000
    elif parameters >= 1_500_000_000:
        hidden, intermediate, vocabulary = 2048, 5632, 32000
    elif parameters >= 200_000_000:
        hidden, intermediate, vocabulary = 1024, 2816, 32000
    else:
        hidden, intermediate, vocabulary = 256, 704, 8000
    layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    layers = max(1, round((parameters - 2 * vocabulary * hidden) / layer))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """Tensor names and shapes as transformers writes them."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        keys = config["num_key_value_heads"] * config["head_dim"]
        for name, rows in {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}.items():
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
        shapes[f"{layer}mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def elements(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor of this shape."""
    return prod(shape)


def shards_of(shapes: Shapes) -> list[Shapes]:
    """Divide the tensors, in order, into shards of ``SHARD_BYTES`` of bfloat16; only a larger tensor exceeds that."""
    shards: list[Shapes] = [{}]
    free = SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * elements(shape)
        if shards[-1] and size > free:
            shards.append({})
            free = SHARD_BYTES
        shards[-1][name] = shape
        free -= size
    return shards


def write_sharded(folder: Path, stem: str, shapes: Shapes, make: Maker, metadata: dict[str, str]) -> None:
    """Write one file, or numbered shards with their index; one shard at a time is in memory."""
    folder.mkdir(parents=True)
    shards = shards_of(shapes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor: make(tensor, shape) for tensor, shape in shard.items()}
        save_file(tensors, folder / name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(2 * elements(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def normal(seed: int, shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """Standard normal values in float32, drawn on ``device``; they depend only on that and on ``seed``."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def write_checkpoint_set(folder: Path, parameters: int, importance: torch.dtype = torch.bfloat16) -> CheckpointSet:
    """Write model, base, tuned and two importances of about ``parameters`` parameters each.

    importance: the type of the importances.
    """
    config = llama_config(parameters)
    shapes = llama_shapes(config)
    seeds = {name: number for number, name in enumerate(shapes)}

    def weights(kind: str) -> Maker:
        noise = {"model": 1_000_000, "base": 0, "tuned": 2_000_000}[kind]

        def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            values = normal(seeds[name], shape).mul_(0.02)
            if len(shape) == 1:
                values.add_(1.0)  # the weights of norms are near one
            if noise:
                values.add_(normal(seeds[name] + noise, shape), alpha=1e-3)
            return values.bfloat16()

        return make

    for kind in MERGED:
        write_sharded(folder / kind, "model", shapes, weights(kind), {"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(config, indent=2))
    write_importances(folder, shapes, importance)
    return CheckpointSet(folder, sum(elements(shape) for shape in shapes.values()))


def write_importances(folder: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """Write a forget and a retain importance of a model with tensors of these shapes."""
    seeds = {name: number for number, name in enumerate(shapes)}
    for seed, kind in enumerate(IMPORTANCES, start=3):

        def make(name: str, shape: tuple[int, ...], seed: int = seed) -> torch.Tensor:
            return normal(seeds[name] + seed * 1_000_000, shape).mul_(1e-4).to(dtype)

        metadata = {
            "format": "perta-importance",
            "format_version": "1",
            "estimator": "grad",
            "data_hash": f"bench-{kind}",
            "sample_count": "64",
            "evaluated_at": "base",
        }
        write_sharded(folder / kind, "importance", shapes, make, metadata)
