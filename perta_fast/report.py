"""What a run did, as ``perta_report.json`` beside its output."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError

FILE_NAME = "perta_report.json"
_VERSIONED = ("perta-fast", "torch", "transformers", "safetensors", "numpy", "triton")


@dataclass
class TensorReport:
    """One tensor: what was done to it and how much it moved.

    action: "subtracted"; "copied: ..." with the reason. mean_weight: mean of w. relative_change:
    ||theta_out - theta|| / ||theta|| (Frobenius), after rounding; None where it is not a finite number.
    changed: elements whose stored value differs.
    """

    name: str
    dtype: str
    shape: list[int]
    action: str
    mean_weight: float | None = None
    relative_change: float | None = None
    changed: int = 0


@dataclass
class Report:
    """The record of one run. Paths are as given; hashes are BLAKE3; phases have seconds, bytes and GB/s."""

    rule: str
    lam: float
    p: float
    alpha: float
    threshold: float | None
    inputs: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, dict[str, str]] = field(default_factory=dict)
    tensors: list[TensorReport] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    threads: int = 1
    instruction_set: str = ""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    format_version: int = 1

    def add_phase(self, name: str, seconds: float, byte_count: int) -> None:
        """Record a phase; ``byte_count`` counts each byte read and each byte written once."""
        rate = byte_count / seconds / 1e9 if seconds > 0 else 0.0
        self.phases[name] = {"seconds": seconds, "bytes": byte_count, "gb_per_s": rate}

    def save(self, directory: Path) -> None:
        """Write ``perta_report.json`` into ``directory``."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Report":
        """Read the report of a run. Raises InputError if it is missing or malformed."""
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [TensorReport(**row) for row in content.pop("tensors")]
            return cls(**content, tensors=rows)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read: {error.strerror}; is this the output of a run?"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: is not a report that this version understands") from error

    def summary(self) -> str:
        """A few lines for a person."""
        counts = ", ".join(f"{number} {action}" for action, number in self.counts.items())
        lines = [
            f"rule {self.rule}, lambda {self.lam:g}, p {self.p:g}, alpha {self.alpha:g}",
            f"tensors: {counts}",
        ]
        for name, phase in self.phases.items():
            rate = f", {phase['gb_per_s']:.1f} GB/s" if phase["bytes"] else ""
            lines.append(f"{name}: {phase['seconds']:.2f} s{rate}")
        if self.memory.get("peak_anonymous_bytes"):
            own = self.memory["peak_anonymous_bytes"] / 2**20
            start = self.memory["anonymous_bytes_at_start"] / 2**20
            mapped = self.memory["peak_mapped_file_bytes"] / 2**20
            lines.append(
                f"peak memory: {own:.0f} MiB of its own ({start:.0f} MiB at the start), "
                f"{mapped:.0f} MiB of mapped files"
            )
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on; nothing is imported for it."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_files(hashes: Mapping[Path, str], directory: Path) -> dict[str, Any]:
    """The files of one input or output: absolute directory, and size and hash of each."""
    return {
        "path": str(directory.resolve()),
        "files": {
            path.name: {"bytes": path.stat().st_size, "blake3": digest}
            for path, digest in hashes.items()
            if path.parent == directory
        },
    }
