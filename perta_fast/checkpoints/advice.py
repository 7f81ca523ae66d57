"""Commands for messages: the user can run them as they are."""

import shlex
from pathlib import Path


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


def python_command(program: str) -> str:
    """The shell command that runs ``program``, which is printable."""
    plain = set(program).isdisjoint('"$`\\!')  # then double quotes are enough, and easier to read
    return f'python -c "{program}"' if plain else f"python -c {shlex.quote(program)}"
