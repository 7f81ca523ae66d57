"""Memory: how much this process takes, how much is free; and sizes and times as text."""

import contextlib
import re
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from perta_fast.errors import InputError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_GROUPS = Path("/sys/fs/cgroup")
_FORGET_PEAK = "5"  # written there: the peak resident set begins again at the present one
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of glibc
_INTERVAL = 0.02  # seconds between two looks
_UNITS = {
    "": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), start=1)},
}


@dataclass
class PeakMemory:
    """The largest memory of this process while the context lasts, in bytes (Linux only, else 0).

    anonymous: resident memory of its own, such as arrays. mapped: the resident part of mapped files, which the
    system drops when it needs the space. resident: both, and shared memory. baseline: ``anonymous`` at the start: the
    interpreter and its libraries.
    """

    anonymous: int = 0
    mapped: int = 0
    resident: int = 0
    baseline: int = 0

    def __enter__(self) -> "PeakMemory":
        with contextlib.suppress(OSError):  # not everywhere: then the peak is that since the process began
            _CLEAR.write_text(_FORGET_PEAK)
        self._stop = threading.Event()
        self._sample()
        self.baseline = self.anonymous
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        sizes = _sizes_of_process()
        self.anonymous = max(self.anonymous, sizes.get("RssAnon", 0))
        self.mapped = max(self.mapped, sizes.get("RssFile", 0))
        # The system's own peak misses nothing between two looks; one context within another begins it again.
        self.resident = max(self.resident, sizes.get("VmHWM", 0))

    def as_dict(self) -> dict[str, int]:
        """The figures for a report, up to now."""
        self._sample()
        return {
            "peak_anonymous_bytes": self.anonymous,
            "anonymous_bytes_at_start": self.baseline,
            "peak_mapped_file_bytes": self.mapped,
            "peak_resident_bytes": self.resident or _peak_of_process(),
        }


def _sizes_of_process() -> dict[str, int]:
    """What the system says of this process's memory, in bytes; empty where it has no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def _peak_of_process() -> int:
    """The peak resident set; on Linux that of the process which started this one, if it was larger."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int | None:
    """Bytes that the system and its control groups still let this process take; None if unknown.

    Pages of files that were read count as free: the system drops them when it needs the space.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    free += [left for line in groups if (left := _left_in_groups(*line.split(":", 2))) is not None]
    return max(0, min(free)) if free else None


def _left_in_groups(_: str, controllers: str, name: str) -> int | None:
    """The least that this control group, or one that holds it, has left; None if they have no limit.

    The arguments are the fields of a line in /proc/self/cgroup: without controllers it is of version 2.
    """
    if "memory" in controllers.split(","):
        root, files, prefix = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
    elif not controllers:
        root, files, prefix = _GROUPS, ("memory.max", "memory.current"), ""
    else:
        return None
    folder = root / name.lstrip("/")
    left = []
    for group in (folder, *folder.parents[: len(Path(name).parts) - 1]):  # a limit holds for all groups below
        try:
            limit, used = ((group / file).read_text().strip() for file in files)
            if limit != "max":
                left.append(int(limit) - int(used) + _pages_of_files(group, prefix))
        except (OSError, ValueError):
            continue
    return min(left, default=None)


def _pages_of_files(group: Path, prefix: str) -> int:
    """Bytes of files that a control group has in memory; prefix: of the figures that include the groups below."""
    try:
        table = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(table.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def return_freed_blocks() -> None:
    """Make glibc return freed blocks of 8 MiB and more to the system at once; it would keep up to 32 MiB of each.

    Smaller ones are used again: to ask the system for the activations of every operation takes a tenth of the time.
    """
    import ctypes  # here: few need it, and it takes its time

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)  # else it would be 128 KiB from now on


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "500MB", "1.5 GB" or a plain number. Raises InputError for anything else, or for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{text!r} is not a size; write it like 12GiB, 500MB or 1.5 GB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise InputError(f"{text!r} is less than one byte; give a larger size")
    return size


def format_size(count: float) -> str:
    """``count`` bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def format_duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, with three digits."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
