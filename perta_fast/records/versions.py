"""When a run was made, and with which versions. What a refusal does not need is imported late."""

import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from perta_fast.errors import InputError

_VERSION = re.compile(r"^Version: *(\S+) *$", re.MULTILINE)
_VERSIONED = ("perta-fast", "torch", "transformers", "safetensors", "numpy", "triton")


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions(*others: str) -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on; nothing is imported for it."""
    found = {name: installed_version(name) for name in (*_VERSIONED, *others)}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


@cache
def installed_version(name: str) -> str:
    """The version of a package, "" if it is not installed. To parse all of its metadata would take milliseconds."""
    from importlib import metadata

    try:
        installed = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return ""
    line = _VERSION.search(installed.read_text("METADATA") or "")
    return line[1] if line else installed.version


def check_versions(before: Mapping[str, str], now: Mapping[str, str], run: str, final: Path) -> None:
    """Raise InputError if the ``run`` to ``final`` was begun with other versions: its result would be of both."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{final}: the {run} was begun with {name} {before.get(name)}, this is {now.get(name)}; install that "
                "to go on with it, or start over with ‹overwrite›"
            )


def this_version() -> str:
    """The version of this package, "" if it is not installed."""
    return installed_version("perta-fast")
