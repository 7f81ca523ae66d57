"""A tuning that is checked, and its data read: all that is done before a model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.chat import ChatSettings
from perta_fast.data.given_data import Source
from perta_fast.data.rows import Row
from perta_fast.progress import Progress
from perta_fast.tuning.request import Request

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Prepared:
    """What is tuned, on what, and how.

    sources: by role, where rows come from. read: by role, the rows and their hash.
    """

    request: Request
    sources: Mapping[str, Source]
    checkpoint: Checkpoint
    chat: ChatSettings
    read: Mapping[str, tuple[list[Row], str]]
    callbacks: "Sequence[TrainerCallback]"
    progress: Progress
