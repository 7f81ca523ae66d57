"""What the command in a message runs, to merge an adapter where peft's own way gives another model than the tuned one.

Peft leaves out tensors under names that it does not know, and adds what belongs to each of two tied matrices to both.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perta_fast.checkpoints.adapter_kinds import read_json_settings
from perta_fast.checkpoints.adapter_names import peft_names
from perta_fast.checkpoints.advice import loader
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG
from perta_fast.errors import InputError
from perta_fast.models.stored_names import load_tensor


def merge_adapter(adapter: str, base: str) -> None:
    """Save, beside ``adapter``, what it makes of ``base``, in float32, an output head of its own included.

    Raises InputError if the model has no place for a tensor of the adapter.
    """
    import transformers
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import save_file
    from torch import nn

    model: Any = getattr(transformers, loader(Path(base)).removeprefix("t.")).from_pretrained(base, dtype="auto")
    saved = Checkpoint.open(adapter, "adapter_model").tensors
    tensors = {new: load_tensor(saved[name]).contiguous() for new, name in peft_names(saved, adapter).items()}
    with TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        Path(folder, ADAPTER_CONFIG).write_text(json.dumps(read_json_settings(Path(adapter))), encoding="utf-8")
        tuned: Any = PeftModel.from_pretrained(model, folder).float()
    loaded: Any = set_peft_model_state_dict(tuned, tensors)
    if odd := loaded.unexpected_keys:
        raise InputError(f"{adapter}: {odd[0]} has no place in the model in {base}")
    head = model.get_output_embeddings()
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        layer = _innermost(head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    tuned.merge_and_unload().save_pretrained(f"{adapter}-merged")


def _innermost(module: Any) -> Any:
    """The layer of the model within what peft has put around it."""
    for name in ("base_layer", "token_adapter", "original_module"):
        if hasattr(module, name):
            return _innermost(getattr(module, name))
    return module
