"""Small configurations of the model families that people run: the rows of the matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ONE_HEAD_SIZE = SIZES | {"head_dim": 8}
_SLIDING = ONE_HEAD_SIZE | {"sliding_window": 4}
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DEEPSEEK = SIZES | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Family:
    """One row: ``config`` with ``settings``.

    rounded: estimator and data for which streaming takes more sums in another order than those of tied
    matrices and of parameters that take a backward pass for each sample.
    """

    name: str
    config: str
    settings: dict[str, Any]
    rounded: frozenset[tuple[str, str]] = frozenset()

    def configuration(self) -> PretrainedConfig:
        """The configuration of the row."""
        make: Callable[..., PretrainedConfig] = getattr(transformers, self.config)
        return make(**self.settings)


# Padding is routed to experts too, and what stands in its place decides how their rows are laid out.
_ROUTED = frozenset({("grad", "ragged"), ("empirical-fisher", "ragged")})
_OWN_ATTENTION = frozenset({("empirical-fisher", "even"), ("empirical-fisher", "ragged")})

FAMILIES = [
    Family("Llama", "LlamaConfig", SIZES),
    Family("Llama tied", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    Family(
        "Llama 3 rotary scaling",
        "LlamaConfig",
        SIZES
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    Family("Mistral, sliding window", "MistralConfig", _SLIDING),
    Family("Qwen2", "Qwen2Config", SIZES),
    Family("Qwen3", "Qwen3Config", ONE_HEAD_SIZE),
    Family("Qwen3 tied", "Qwen3Config", ONE_HEAD_SIZE | {"tie_word_embeddings": True}),
    Family("Gemma 2", "Gemma2Config", _SLIDING),
    Family("Gemma 3 (text)", "Gemma3TextConfig", _SLIDING),
    Family("Phi-3", "Phi3Config", SIZES),
    Family(
        "Phi-4-mini, partial rotary",
        "Phi3Config",
        SIZES
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    Family("GPT-2", "GPT2Config", GPT2_SIZES),
    Family("GPT-J", "GPTJConfig", GPT2_SIZES | {"rotary_dim": 4}),
    Family("GPT-NeoX", "GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    Family("OLMo 2", "Olmo2Config", SIZES),
    Family("Falcon", "FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("Falcon, alibi", "FalconConfig", {**SIZES, "alibi": True}),
    Family("OPT", "OPTConfig", _OPT),
    Family(
        "BLOOM", "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _OWN_ATTENTION
    ),
    Family(
        "MPT", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    ),
    Family("Mixtral", "MixtralConfig", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, _ROUTED),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        SIZES
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        _ROUTED,
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        ONE_HEAD_SIZE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        _ROUTED,
    ),
    Family(
        "OLMoE", "OlmoeConfig", SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1}, _ROUTED
    ),
    Family("DeepSeek-V2", "DeepseekV2Config", _DEEPSEEK, _ROUTED),
    Family(
        "DeepSeek-V3, yarn",
        "DeepseekV3Config",
        _DEEPSEEK
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        _ROUTED,
    ),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _ROUTED | _OWN_ATTENTION,
    ),
]
