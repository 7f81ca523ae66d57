"""Where other file systems, or other directories, are mounted: nothing can be renamed over such a place."""

import os
import re
from pathlib import Path

_TABLE = "/proc/self/mountinfo"  # of Linux; it also lists bind mounts, which have the device of what they show
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def mounts_in(directory: Path) -> list[Path]:
    """The mount points at and below ``directory``, which may be missing. Without Linux's table only the first."""
    resolved = Path(os.path.realpath(directory))
    try:
        with open(_TABLE, "rb") as table:
            points = [Path(os.fsdecode(_unescaped(line.split(b" ")[4]))) for line in table]
    except (OSError, IndexError):
        return [resolved] if os.path.ismount(resolved) else []
    return sorted({point for point in points if point == resolved or resolved in point.parents})


def _unescaped(name: bytes) -> bytes:
    return _ESCAPED.sub(lambda code: bytes([int(code[1], 8)]), name)
