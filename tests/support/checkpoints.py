"""Checkpoints and importances of any tensors, written and read by the safetensors library."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values that depend only on the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_checkpoint(
    folder: Path, tensors: Tensors, shards: int = 1, stem: str = "model", metadata: dict[str, str] | None = None
) -> Path:
    """Write one file, or ``shards`` files with an index; tensors go to them in turn."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # the library refuses shared memory
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        shard = dict(list(tensors.items())[number::shards])
        save_file(shard, folder / name, metadata)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_importance(folder: Path, tensors: Tensors, estimator: str = "grad", shards: int = 1, **metadata: str) -> Path:
    """Write an importance as ``perta importance`` does."""
    table = {
        "format": "perta-importance",
        "estimator": estimator,
        "data_hash": folder.name,
        "sample_count": "3",
        "evaluated_at": "somewhere",
    }
    return write_checkpoint(folder, tensors, shards, "importance", table | metadata)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files in ``folder``."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header (bytes or JSON content) and any length stated for the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def fingerprint(*folders: Path) -> dict[Path, str]:
    """The hash of every file below ``folders``, to show that nothing has changed them."""
    return {
        path: blake3(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Equal in type, shape and every stored bit."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and bool(torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)))
    )
