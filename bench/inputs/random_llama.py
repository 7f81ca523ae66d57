"""The random Llamas that the benchmarks keep in memory, in the sizes that results.json was measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    """Size of the vocabulary, widths, number of layers and of attention heads."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int


TINY = Size(4096, 192, 512, 4, 6)  # 2.6 M parameters if embedding and head are tied
SMALL = Size(3000, 512, 1408, 6, 8)  # 22 M
LARGE = Size(32000, 2048, 5632, 20, 32)  # 1 B


def random_llama(size: Size, tokens: int, device: str = "cpu", *, tied: bool = False) -> nn.Module:
    """A Llama that takes up to ``tokens`` tokens: float32 on a CPU, bfloat16 on a GPU.

    Its weights are the same every time on one kind of device. tied: embedding and head share one matrix.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=tokens,
        tie_word_embeddings=tied,
    )
    with torch.device(device):  # on a GPU it draws a billion weights at once
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32)
