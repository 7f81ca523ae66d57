#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: a merged model that is not the tuned one.
#
# With ensure_weight_tying, LoRA on the input embedding of a model with tied embeddings is put on the output head as
# well, with the same factors. Both layers then hold the same base matrix. merge_and_unload merges each of them, so the
# shared matrix gets the update twice; the adapted model itself uses it once on each side. A warning says that tied layers
# in an adapter can lead to complications and shows how to untie a model; the merge goes on.
#
# Seen:   what the merge added to the matrix, divided by the update: 2.0
#         largest difference of logits between the adapted and the merged model: 234
# This script fails if the update is added once, or the two models agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)
adapted = get_peft_model(
    LlamaForCausalLM(config).eval(), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
)
embedding, head = adapted.base_model.model.model.embed_tokens, adapted.base_model.model.lm_head
a, b = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
with torch.no_grad():  # as after training
    a.copy_(torch.randn_like(a))
    b.copy_(torch.randn_like(b))
assert torch.equal(head.lora_A["default"].weight, b.T) and torch.equal(head.lora_B["default"].weight, a.T)
update = (b @ a).T * embedding.scaling["default"]
before = embedding.base_layer.weight.detach().clone()
ids = torch.tensor([[1, 2, 3, 4]])
with torch.no_grad():
    tuned = adapted(ids).logits
    merged = adapted.merge_and_unload()
    times = ((merged.model.embed_tokens.weight - before) / update).median().item()
    apart = (merged(ids).logits - tuned).abs().max().item()
print(f"what the merge added to the matrix, divided by the update: {times:.3f}")
print(f"largest difference of logits between the adapted and the merged model: {apart:.3g}")
assert abs(times - 2) < 1e-3 and apart > 1
PYTHON
