"""Says whether ``bench/gpu.sh`` can run on this machine, and what is missing: ``python -m bench.harness.gpu_ready``."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
TESTING = ("pytest", "pytest-benchmark", "hypothesis", "triton")  # of what [dev] names
# What the packages of [eval] need themselves: pip cannot say so of a package that is not installed.
NEEDED = ("absl-py", "nltk", "six", "click", "defusedxml", "joblib", "tqdm")


def absent(requirements: Iterable[str]) -> list[str]:
    """The requirements that no installed version fits."""
    return [text for text in requirements if not _fits(Requirement(text))]


def _fits(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def requirements() -> tuple[list[str], list[str]]:
    """What must be there to build, to run and to test; and what only the tests of evaluations need."""
    content: dict[str, Any] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    project = content["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    testing = [text for text in extras["dev"] if Requirement(text).name in TESTING]
    return [*content["build-system"]["requires"], *project["dependencies"], *testing], [*extras["eval"], *NEEDED]


def main() -> int:
    """Print what is there and what is missing; 1 if nothing can run without it."""
    needed, optional = (absent(texts) for texts in requirements())
    advice = "install it, or bring it as wheels in a folder on PYTHONPATH (pip wheel --no-deps NAME makes one)"
    if optional:
        print(f"tests of evaluations are skipped without {', '.join(optional)}: {advice}")
    if needed:
        print(f"nothing can run without {', '.join(needed)}: {advice}")
        return 1
    import torch
    import triton

    for name in ("nvcc", "compute-sanitizer"):
        print(f"{name}: {shutil.which(name) or 'not on PATH'}")
    print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
    if not torch.cuda.is_available():
        print("torch finds no GPU")
        return 1
    print(torch.cuda.get_device_name(), "compute capability", *torch.cuda.get_device_capability())
    return 0


if __name__ == "__main__":
    sys.exit(main())
