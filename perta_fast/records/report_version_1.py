"""Reports as version 0.1.0 wrote them: the same fields, with data as text.

Its settings were texts such as "the model's" and "yes", its importances the metadata of their files.
"""

import re
from collections.abc import Mapping
from typing import Any

from perta_fast.errors import InputError
from perta_fast.records.importance_record import importance_record
from perta_fast.records.typed_json import typed

_NUMBERS = ("batch_size", "max_length", "processes")
_TEXTS = {"the model's": None, "the checkpoint's": None, "yes": True, "no": False}
_SCHEDULE = re.compile(
    r"batches of (\d{1,18}), hidden states kept at (?:every boundary|one boundary in (\d{1,18})), "
    r"(\d{1,18}) groups?, (no )?overlap"
)


def from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """A report of version 1 in the layout of version 2. Raises InputError for what version 1 did not write."""
    settings = typed(content.get("settings", {}), dict[str, str], "settings")
    importance = typed(content.get("importance", {}), dict[str, dict[str, str]], "importance")
    return {
        **content,
        "settings": _settings(settings),
        "importance": {role: importance_record(table) for role, table in importance.items()},
        "format_version": 2,
    }


def _settings(texts: Mapping[str, str]) -> dict[str, Any]:
    """The settings of ``unlearn``; those of a sweep were texts of other names, and stay."""
    if "stream" not in texts:
        return dict(texts)
    settings: dict[str, Any] = {name: _TEXTS.get(text, text) for name, text in texts.items()}
    for name in _NUMBERS:
        text = settings.get(name)
        if isinstance(text, str):
            if not re.fullmatch("[0-9]{1,18}", text):
                raise InputError(f"settings.{name} is {text[:20]!r}, not a whole number")
            settings[name] = int(text)
    schedule = _SCHEDULE.fullmatch(texts["stream"])
    if not schedule and not isinstance(settings["stream"], bool):
        raise InputError(f"settings.stream is {texts['stream'][:20]!r}, not a schedule")
    settings["schedule"] = None
    if schedule:
        batch_size, every, groups, without = schedule.groups()
        settings["stream"] = True
        settings["schedule"] = {
            "batch_size": int(batch_size),
            "every": int(every or 1),
            "groups": int(groups),
            "overlap": without is None,
        }
    return settings
