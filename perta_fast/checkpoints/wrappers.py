"""What wrappers (torch.compile, DDP, FSDP) add to the names of tensors, if a model is saved from within them."""

import re
from collections.abc import Iterable

from perta_fast.errors import InputError

# torch.compile; FSDP, now and once; activation checkpointing; Opacus. They may stand anywhere in a name.
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_module")
# DDP, DataParallel and DeepSpeed. Only at the beginning: a model may have a module of that name within it.
OUTSIDE = "module"

_ANYWHERE = re.compile(rf"(?<![^.])(?:{'|'.join(INSIDE)})\\?\.")  # in a regular expression the dot is escaped
_AT_THE_BEGINNING = re.compile(rf"^(?:{OUTSIDE}\.)*(base_model\.model\.)?(?:{OUTSIDE}\.)*")


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers added. The prefix of an adapter, ``base_model.model.``, stays."""
    return _AT_THE_BEGINNING.sub(lambda match: match[1] or "", _ANYWHERE.sub("", name))


def by_plain_name(names: Iterable[str], where: object) -> dict[str, str]:
    """Names by their plain form. Raises InputError, with ``where``, if two become the same."""
    result: dict[str, str] = {}
    for name in names:
        plain = plain_name(name)
        if plain in result:
            raise InputError(
                f"{where}: tensors {result[plain]} and {name} are both {plain} without the names of wrappers; "
                "save the model again from one of them"
            )
        result[plain] = name
    return result
