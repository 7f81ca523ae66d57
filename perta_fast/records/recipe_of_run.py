"""The recipe of a run, which its report keeps: ``records.recipe`` reads it again."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from perta_fast.data.forms import fields_text
from perta_fast.data.given import is_given
from perta_fast.dtypes import torch_name
from perta_fast.records.report import Scalar

_PATHS = ("model", "base", "tuned", "forget", "retain", "out", "whole_importance", "save_importance", "save_tuned")
_KEYS = {"save_as": "as"}  # which is no name in Python


def as_recipe(arguments: Mapping[str, Any]) -> dict[str, Scalar]:
    """The arguments of ``unlearn`` by the names of the command's options, for its report.

    Paths are absolute; rows given in Python go by their name. Arguments that are None, ``progress``, ``group`` and
    ``download`` are left out.
    """
    recipe: dict[str, Scalar] = {}
    for name, value in arguments.items():
        if value is None or name in ("progress", "group", "download"):
            continue
        if is_given(value):
            value = str(value)
        elif name in _PATHS:
            value = os.path.abspath(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):  # of patterns
            value = ",".join(value)
        elif isinstance(value, Mapping):  # of names of fields
            value = fields_text(value)
        elif not isinstance(value, str | int | float):  # a torch.dtype, a torch.device
            value = torch_name(value)
        recipe[_KEYS.get(name, name.replace("_", "-"))] = value
    return recipe
