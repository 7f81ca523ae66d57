"""When a run was made, and with which versions."""

import platform
from datetime import UTC, datetime
from importlib import metadata

_VERSIONED = ("perta-fast", "torch", "transformers", "safetensors", "numpy", "triton")


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions(*others: str) -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on; nothing is imported for it."""
    versions = {"python": platform.python_version()}
    for name in (*_VERSIONED, *others):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
