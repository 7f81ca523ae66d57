#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0: the compilers in a process's environment change and stay changed.
#
# To make a BOFT layer, peft tries to build a CUDA extension, with CC and CXX set to gcc meanwhile. Where that fails, as
# without a CUDA toolkit, it goes on without the extension, but does not put the two variables back: both are gcc for
# the rest of the process, and a compiler that the user chose is lost. Whatever builds C++ later by CXX (an extension, a
# test) then links with gcc, without the C++ library.
#
# Seen:   before: CC=my-cc CXX=None
#         after:  CC=gcc CXX=gcc
# This script fails if the variables are as they were.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
CUDA_HOME="" HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import os

from peft import BOFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["CC"] = "my-cc"
os.environ.pop("CXX", None)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
print("before: CC={CC} CXX={CXX}".format_map({"CXX": None, **os.environ}))
get_peft_model(LlamaForCausalLM(config), BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))
print("after:  CC={CC} CXX={CXX}".format_map({"CXX": None, **os.environ}))
assert os.environ["CC"] == os.environ.get("CXX") == "gcc"
PYTHON
