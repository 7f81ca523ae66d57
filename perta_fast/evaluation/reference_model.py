"""The model that the membership score ``mia_reference`` compares with."""

from pathlib import Path
from typing import Any

from perta_fast.errors import InputError
from perta_fast.models.loading import Subject, load_subject


def load_reference(path: Path, own: Subject) -> Subject:
    """The reference model, on the device of ``own``. Raises InputError if it reads other tokens."""
    reference = load_subject(path, own.device, None)
    check_same_tokens(path, reference.tokenizer, own.tokenizer)
    reference.module.eval()
    return reference


def check_same_tokens(path: Path, tokenizer: Any, own: Any) -> None:
    """Raise InputError unless the tokenizer of the reference model in ``path`` has the vocabulary of ``own``."""
    if tokenizer.get_vocab() != own.get_vocab():
        raise InputError(
            f"{path}: its tokenizer has another vocabulary than the model's; a reference model must read the same "
            "tokens"
        )
