#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0 on the CPU: what a linear map of one output gives depends on which tensors lie
# before it in its file.
#
# The tensors of a loaded file lie where they lie in the file, at any address that their predecessors leave, and not at
# one that 64 divides, as tensors that torch makes. A linear map with one output (a gate of a shared expert, a head that
# gives a score) is then computed in another order: other last bits, from the same weights and inputs. So a checkpoint
# that is saved again in other shards, or whose weights are copied, no longer gives the same numbers. Maps with more
# outputs were the same at every address.
# Seen (x86-64, one thread): after 0, 1, 2, ... 15 floats, 12 of 16 files give other bits than a copy of the weights does,
# for inputs of 32, 100 and 2048 numbers; of 4 outputs none does.
# This script fails if all files give the same bits, or a map of 4 outputs does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
FOLDER=$folder "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
path = os.path.join(os.environ["FOLDER"], "weights.safetensors")
others = {}
for outputs in (1, 4):
    for inputs in (32, 100, 2048):
        torch.manual_seed(0)
        weight, x = torch.randn(outputs, inputs), torch.randn(7, inputs)
        copied = torch.nn.functional.linear(x, weight)
        others[outputs, inputs] = 0
        for before in range(16):
            save_file({"a": torch.zeros(before), "b": weight}, path)
            loaded = load_file(path)["b"]
            assert torch.equal(loaded, weight)
            others[outputs, inputs] += not torch.equal(torch.nn.functional.linear(x, loaded), copied)
        print(f"{outputs} outputs, {inputs} inputs: {others[outputs, inputs]} of 16 files give other bits")
assert all(count == 0 for (outputs, _), count in others.items() if outputs == 4)
assert all(count > 0 for (outputs, _), count in others.items() if outputs == 1)
PYTHON
