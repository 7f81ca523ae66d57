"""The model that the membership score ``mia_reference`` compares with."""

from pathlib import Path
from typing import Any

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.models.language_part import own_type
from perta_fast.models.loading import Subject, load_subject
from perta_fast.models.running_type import first_type, running_type


def load_reference(path: Path, own: Subject, dtype: torch.dtype | None) -> Subject:
    """The reference model, on the device of ``own``. dtype: as for ``load_subject``.

    Raises InputError if it reads other tokens.
    """
    reference = load_subject(path, own.device, dtype)
    check_same_tokens(path, reference.tokenizer, own.tokenizer)
    reference.module.eval()
    return reference


def reference_type(path: Path, device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which ``load_reference`` has the model in ``path`` run."""
    return dtype or running_type(own_type(path, first_type(Checkpoint.open(path))), device)


def check_same_tokens(path: Path, tokenizer: Any, own: Any) -> None:
    """Raise InputError unless the tokenizer of the reference model in ``path`` has the vocabulary of ``own``."""
    if tokenizer.get_vocab() != own.get_vocab():
        raise InputError(
            f"{path}: its tokenizer has another vocabulary than the model's; a reference model must read the same "
            "tokens"
        )
