"""A model family of your own: a decoder that transformers does not know, unlearned in memory and streamed.

The family is Llama with a learned gain after each MLP. Two calls register it; nothing else is needed.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from tiny import print_losses, tiny_job
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import perta_fast as pf


class GainedConfig(LlamaConfig):
    model_type = "gained_llama"


class GainedMLP(LlamaMLP):
    """Llama's MLP, times a gain for each channel."""

    def __init__(self, config: GainedConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Any:
        return self.gain * super().forward(x)


class GainedForCausalLM(LlamaForCausalLM):
    config_class = GainedConfig

    def __init__(self, config: GainedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = GainedMLP(config)
        self.post_init()


AutoConfig.register("gained_llama", GainedConfig)
AutoModelForCausalLM.register(GainedConfig, GainedForCausalLM)

with tiny_job() as folder:
    # Make the three checkpoints from those of a Llama. You would have trained your own.
    for name in ("model", "base", "tuned"):
        llama = AutoModelForCausalLM.from_pretrained(folder / name)
        settings = {key: value for key, value in llama.config.to_dict().items() if key != "model_type"}
        gained = GainedForCausalLM(GainedConfig(**settings))
        gained.load_state_dict(llama.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in gained.parameters():
                if parameter.dim() == 1 and name != "base":
                    parameter.mul_(1.01)  # so that the gains have a task vector too
        gained.save_pretrained(folder / name)  # the tokenizer is already there

    checkpoints = [folder / name for name in ("model", "base", "tuned")]
    data = [folder / "forget.jsonl", folder / "retain.jsonl"]
    for name, stream in (("whole", False), ("streamed", True)):
        report = pf.unlearn(
            *checkpoints, *data, rule="empirical-fisher", lam=1.0, stream=stream, out=folder / name, progress=False
        )
    print_losses("model", folder)
    print_losses("streamed", folder)
    gains = [tensor for tensor in report.tensors if tensor.name.endswith("mlp.gain")]
    print(f"{len(gains)} gains: {gains[0].action}, mean w {gains[0].mean_weight:.2f}")
    whole, streamed = (load_file(folder / name / "model.safetensors") for name in ("whole", "streamed"))
    difference = max(float((whole[name] - streamed[name]).abs().max()) for name in whole)
    print(f"largest difference between the two ways: {difference:.0e}")
