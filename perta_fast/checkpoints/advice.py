"""Commands for messages: the user can run them as they are."""

import shlex
from pathlib import Path

GATHER_FIRST = (
    "DeepSpeed ZeRO-3 or FSDP had its elements on other processes when it was saved. Save it again from the gathered "
    "model (DeepSpeed: stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py on the checkpoint of the training)"
)


def conversion_command(path: Path, arguments: str = "dtype='auto'", call: str = "") -> str:
    """The shell command that saves a checkpoint of transformers as plain safetensors, beside ``path``.

    arguments: of from_pretrained, with ``t`` for transformers. call: on the model, before it is saved.
    """
    source, target = str(path), f"{path}-safetensors"
    program = (
        "import transformers as t; "
        f"t.AutoModelForCausalLM.from_pretrained({source!r}, {arguments}){call}.save_pretrained({target!r}); "
        f"t.AutoTokenizer.from_pretrained({source!r}).save_pretrained({target!r})"
    )
    return python_command(program)


def merge_command(adapter: Path, base: str, wrapped: bool = False) -> str:
    """The shell command that saves what peft makes of a base and an adapter, in float32, beside ``adapter``.

    wrapped: the names of its tensors hold those of wrappers, which peft does not take off.
    """
    rename = (
        "from safetensors.torch import load_file; from perta_fast.checkpoints.wrappers import plain_name; "
        f"a = load_file({str(adapter / 'adapter_model.safetensors')!r}); "
        "peft.set_peft_model_state_dict(m, {plain_name(k): v for k, v in a.items()}); "
    )
    program = (
        "import transformers as t, peft; "
        f"m = t.AutoModelForCausalLM.from_pretrained({base!r}, dtype='auto'); "
        f"m = peft.PeftModel.from_pretrained(m, {str(adapter)!r}).float(); {rename if wrapped else ''}"
        f"m.merge_and_unload().save_pretrained({f'{adapter}-merged'!r})"
    )
    return python_command(program)


def untie_command(path: Path) -> str:
    """The shell command that saves a checkpoint with an output head of its own, equal to its embedding, beside it."""
    source, target = str(path), f"{path}-untied"
    program = (
        f"import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({source!r}, dtype='auto'); "
        "h = m.get_output_embeddings(); h.weight = type(h.weight)(h.weight.detach().clone()); "
        "m.config.tie_word_embeddings = m.config.get_text_config().tie_word_embeddings = False; "
        f"m.save_pretrained({target!r})"
    )
    if any(path.glob("tokenizer*")):
        program += f"; t.AutoTokenizer.from_pretrained({source!r}).save_pretrained({target!r})"
    return python_command(program)


def python_command(program: str) -> str:
    """The shell command that runs ``program``, which is printable."""
    plain = set(program).isdisjoint('"$`\\!')  # then double quotes are enough, and easier to read
    return f'python -c "{program}"' if plain else f"python -c {shlex.quote(program)}"
