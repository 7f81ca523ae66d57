"""The conditions of a benchmark run that may be published: nothing here tells one machine from another."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from perta_fast.ops import available_backends


def threads() -> int:
    """The number of processors that this process may run on; every contender uses as many threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# What kernels and matrix products depend on, by the flag that the system has for it; each has those before it.
_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}


def processor(table: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name and its widest instructions, as the system says in ``table``."""
    if not table.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in table.read_text().splitlines())
    said = {key.strip(): value.strip() for key, _, value in pairs}
    flags = said.get("flags", "").split()
    widest = [name for flag, name in _INSTRUCTIONS.items() if flag in flags][-1:]
    return " with ".join([said.get("model name", platform.machine()), *widest])


def kernel() -> str:
    """The operating system and its major and minor version; the rest of the release can be private."""
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def version(package: str) -> str:
    """The installed version of ``package``, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def memory_gib() -> float:
    """Main memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def conditions(device: str) -> dict[str, str]:
    """What a reader needs to judge a result taken on ``device`` ("cpu" or "cuda")."""
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{processor()}, {threads()} threads, {memory_gib():.0f} GiB",
    }
    if device == "cuda":
        result["device"] = f"{torch.cuda.get_device_name()}; host: {result['device']}"
        result["cuda"] = str(torch.version.cuda)
        result["triton"] = version("triton")
        result["CUDA kernels"] = "compiled" if "cuda" in available_backends(device) else "not compiled"
    result |= {
        "system": kernel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
    }
    return result
