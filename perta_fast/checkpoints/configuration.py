"""The configuration of a checkpoint, config.json."""

from pathlib import Path
from typing import Any

from perta_fast.checkpoints.companions import CONFIG
from perta_fast.errors import InputError
from perta_fast.files.reading import exists, read_json

_ADVICE = "fetch it again"


def read_config(directory: Path) -> dict[str, Any] | None:
    """What config.json in ``directory`` holds; None if it is not there. Raises InputError if it is damaged."""
    path = directory / CONFIG
    if not exists(path):
        return None
    config = read_json(path, _ADVICE)
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds no table of settings; {_ADVICE}")
    return config


def check_configured(directory: Path) -> None:
    """Raise InputError unless there is a configuration, without which transformers loads no model."""
    if read_config(directory) is None:
        raise InputError(
            f"{directory}: has no {CONFIG}, without which transformers cannot load this model; fetch it too"
        )
