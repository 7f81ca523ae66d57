"""Commands for messages: the user can run them as they are."""

import shlex
from contextlib import suppress
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.reading import read_json

GATHER_FIRST = (
    "DeepSpeed ZeRO-3 or FSDP had its elements on other processes when it was saved. Save it again from the gathered "
    "model (DeepSpeed: stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py on the checkpoint of the training)"
)


def conversion_command(path: Path, arguments: str = "dtype='auto'", call: str = "", save: str = "") -> str:
    """The shell command that saves a checkpoint of transformers as plain safetensors, beside ``path``.

    arguments: of from_pretrained, with ``t`` for transformers. call: on the model, before it is saved. save: more
    arguments of save_pretrained.
    """
    source, target = str(path), f"{path}-safetensors"
    program = (
        "import transformers as t; "
        f"t.{model_class(path)}.from_pretrained({source!r}, {arguments}){call}.save_pretrained({target!r}{save})"
    )
    return python_command(program + _save_tokenizer(path, target))


def merge_command(adapter: Path, base: str) -> str:
    """The shell command that saves what an adapter makes of a base, in float32, beside ``adapter``."""
    call = f"merge_adapter({str(adapter)!r}, {base!r})"
    return python_command(f"from perta_fast.models.merge_adapter import merge_adapter; {call}")


def untie_command(path: Path) -> str:
    """The shell command that saves a checkpoint with an output head of its own, equal to its embedding, beside it."""
    source, target = str(path), f"{path}-untied"
    program = (
        f"import transformers as t; m = t.{model_class(path)}.from_pretrained({source!r}, dtype='auto'); "
        "h = m.get_output_embeddings(); h.weight = type(h.weight)(h.weight.detach().clone()); "
        "m.config.tie_word_embeddings = m.config.get_text_config().tie_word_embeddings = False; "
        f"m.save_pretrained({target!r})"
    )
    return python_command(program + _save_tokenizer(path, target))


def resize_command(path: Path, rows: int) -> str:
    """The shell command that saves a checkpoint with embeddings of so many rows, beside it; new rows hold anything."""
    source, target = str(path), f"{path}-resized"
    program = (
        f"import transformers as t; m = t.{model_class(path)}.from_pretrained({source!r}, dtype='auto'); "
        f"m.resize_token_embeddings({rows}, mean_resizing=False); m.save_pretrained({target!r})"
    )
    return python_command(program + _save_tokenizer(path, target))


def float32_command(file: Path) -> str:
    """The shell command that saves an adapter with the tensors of ``file`` in float32, beside its directory."""
    adapter, target = str(file.parent), f"{file.parent}-float32"
    program = (
        f"import shutil, safetensors.torch as s; shutil.copytree({adapter!r}, {target!r}); "
        f"t = s.load_file({str(file)!r}); "
        f"s.save_file({{k: v.float() for k, v in t.items()}}, {f'{target}/{file.name}'!r}, {{'format': 'pt'}})"
    )
    return python_command(program)


def model_class(path: Path) -> str:
    """The name of the class of transformers that loads all of a checkpoint, with parts for images or a classifier."""
    with suppress(InputError):
        config = read_json(path / "config.json")
        names = config.get("architectures") if isinstance(config, dict) and not config.get("auto_map") else None
        name = names[0] if isinstance(names, list) and names else ""
        if isinstance(name, str) and name.isidentifier() and not name.endswith("ForCausalLM"):
            return name
    return "AutoModelForCausalLM"


def _save_tokenizer(path: Path, target: str) -> str:
    """The end of a program that saves the tokenizer too, if there is one."""
    has_one = any(path.glob("*token*")) or any(path.glob("vocab*")) or any(path.glob("*.model"))
    return f"; t.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({target!r})" if has_one else ""


def python_command(program: str) -> str:
    """The shell command that runs ``program``, which is printable."""
    plain = set(program).isdisjoint('"$`\\!')  # then double quotes are enough, and easier to read
    return f'python -c "{program}"' if plain else f"python -c {shlex.quote(program)}"
