"""What the command in a message runs, to merge an adapter where peft's own way gives another model than the tuned one.

Peft leaves out tensors under names that it does not know, and adds what belongs to each of two tied matrices to both.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perta_fast.checkpoints.adapter_kinds import STEM, with_plain_names
from perta_fast.checkpoints.adapter_names import PREFIX, peft_names
from perta_fast.checkpoints.advice import model_class
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG
from perta_fast.errors import InputError
from perta_fast.files.reading import read_json
from perta_fast.models.stored_names import load_tensor


def merge_adapter(adapter: str, base: str) -> None:
    """Save, beside ``adapter``, what it makes of ``base``, in float32. Tied matrices become two if one is adapted.

    Raises InputError if the model has no place for a tensor of the adapter.
    """
    import transformers
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import save_file
    from torch import nn

    model: Any = getattr(transformers, model_class(Path(base))).from_pretrained(base, dtype="auto")
    saved = Checkpoint.open(adapter, STEM).tensors
    tensors = {
        _in_whole_model(new, model): load_tensor(saved[name]).contiguous()
        for new, name in peft_names(saved, adapter).items()
    }
    settings = with_plain_names(read_json(Path(adapter) / ADAPTER_CONFIG))
    with TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/{STEM}.safetensors")
        Path(folder, ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        tuned: Any = PeftModel.from_pretrained(model, folder).float()
    # Once more, for what it could not place: the first time that is not told.
    loaded: Any = set_peft_model_state_dict(tuned, tensors)
    if odd := loaded.unexpected_keys:
        raise InputError(f"{adapter}: {odd[0]} has no place in the model in {base}")
    both = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = map(_innermost, both)
    if head is not None and head.weight is embedding.weight and (head, embedding) != both:  # one of them is adapted
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    tuned.merge_and_unload().save_pretrained(f"{adapter}-merged")


def _in_whole_model(name: str, model: Any) -> str:
    """A name of the adapter's, with the path of the model without a head if that is what was tuned (AutoModel)."""
    inner, path = getattr(model, model.base_model_prefix, model), name.removeprefix(PREFIX)
    first = path.partition(".")[0]
    if path == name or hasattr(model, first) or not hasattr(inner, first):
        return name
    return f"{PREFIX}{model.base_model_prefix}.{path}"


def _innermost(module: Any) -> Any:
    """The layer of the model within what peft has put around it."""
    for name in ("base_layer", "token_adapter", "original_module"):
        if hasattr(module, name):
            return _innermost(getattr(module, name))
    return module
