"""Names of an adapter's tensors as peft saves them, from those that a state dict of a model in memory has.

A program may save the state dict of the adapted model itself. Then the name of the adapter stands within the names
(``lora_A.default.weight``), whole modules lie in wrappers (``modules_to_save``), and the prefix may be there twice.
"""

import re
from collections.abc import Iterable

from perta_fast.errors import InputError

PREFIX = "base_model.model."  # of the names of an adapter's tensors
# Parts of the types that people have most.
_PART = (
    r"(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|trainable_tokens_delta|hada_\w+|lokr_\w+|ia3_l|oft_R|boft_[RS])"
)
_OWN = re.compile(rf".*\.{_PART}\.(\w+)(?:\.(?:weight|bias))?")
_SHARED = "base_model."  # tensors of no module, which all modules share (VeRA, TinyLoRA): their names stay
_SAVED, _ORIGINAL = ".modules_to_save.", ".original_module."
_UNWRAPPED = re.compile(r"\.(modules_to_save|original_module)(?=\.)")


def peft_names(names: Iterable[str], where: object) -> dict[str, str]:
    """The given names by those of peft, with its prefix. The copies that peft does not load are left out.

    Raises InputError, with ``where``, if the file holds two adapters, or two tensors get one name.
    """
    given = list(names)
    adapters = {match[1] for name in given if (match := _OWN.fullmatch(name))} - {"weight", "bias"}
    if len(adapters) > 1:
        raise InputError(
            f"{where}: holds {len(adapters)} adapters, {' and '.join(sorted(adapters))}; save each one alone, with "
            "save_pretrained(selected_adapters=[NAME])"
        )
    after = "|".join(map(re.escape, sorted({"default", *adapters})))
    own = re.compile(rf"\.({_PART}|modules_to_save)\.(?:{after})(?=\.|$)|\.default(?=\.|$)")
    result: dict[str, str] = {}
    # Where a module is there more than once, peft loads the plain one; then that which was trained.
    for name in sorted(given, key=lambda name: (_SAVED in name, name)):
        short = name
        while short.startswith(PREFIX):
            short = short.removeprefix(PREFIX)
        if short.startswith(_SHARED):
            result[short] = name
            continue
        short = own.sub(lambda match: f".{match[1]}" if match[1] else "", short)
        if _ORIGINAL in short:
            continue
        new = PREFIX + _UNWRAPPED.sub("", short).removesuffix(".weight" if "lora_magnitude_vector" in short else "")
        if new not in result:
            result[new] = name
        elif _SAVED not in name:
            raise InputError(f"{where}: tensors {result[new]} and {name} are both {new} to peft; save it again")
    return result
