"""The files beside the weights of a checkpoint: with the weights, they decide what a model answers."""

import os
from pathlib import Path

CARD, CONFIG = "README.md", "config.json"
TEMPLATES = "additional_chat_templates"  # the one directory beside the weights that transformers reads
_READ = (".json", ".jinja", ".py", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".pkl")
_INDEX = ".index.json"
_OF_A_RUN = ("perta_report.json", "perta_files.b3", "perta_tune.json")


def companions(directory: Path) -> dict[str, Path]:
    """The model card, and what transformers and tokenizers read: config, tokenizer, templates, code; by name."""
    return {
        name: path
        for name, path in files_of(directory).items()
        if name == CARD or (name.endswith(_READ) and not name.endswith(_INDEX) and name not in _OF_A_RUN)
    }


def files_of(directory: Path) -> dict[str, Path]:
    """The files of ``directory`` and of its chat templates, by name relative to it; hidden ones are left out."""
    files = {}
    for folder in (directory, directory / TEMPLATES):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.name.startswith(".") and os.path.isfile(path):  # noqa: PTH113  (False for a link to itself)
                files[os.path.relpath(path, directory)] = path
    return files


def is_read(name: str) -> bool:
    """Whether programs that load a model may read a file of this name: other than notes and pictures."""
    return name.endswith((*_READ, *_WEIGHTS))
