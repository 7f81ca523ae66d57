"""A directory of safetensors shards: a model as transformers saves it, or an importance of this package."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.no_weights import why_no_weights
from perta_fast.checkpoints.safetensors_file import SafetensorsFile, TensorEntry
from perta_fast.checkpoints.weight_files import shard_number
from perta_fast.checkpoints.wrappers import by_plain_name
from perta_fast.dtypes import KERNEL_CODES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.files.journal import check_finished
from perta_fast.files.reading import read_json

if TYPE_CHECKING:
    import torch

_COMPARED = 1 << 16  # bytes at a time: of so few, a copy costs least


@dataclass(frozen=True)
class Checkpoint:
    """Opened shards: headers read and checked, data mapped only where it is used.

    shards: by file name. tensors: by name, over all shards. index: None for a single file, and for shards without one.
    """

    path: Path
    shards: Mapping[str, SafetensorsFile] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    index: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path, stem: str = "model", *, unfinished: bool = False, index: Path | None = None
    ) -> "Checkpoint":
        """Open the tensors of a directory.

        These are ``{stem}.safetensors``, or the shards that ``{stem}.safetensors.index.json`` names, or all shards. If
        the index places a tensor into the last of the shards that hold it, the others hold old copies. Reads headers
        only. unfinished: open a model even if an in-place run on it is unfinished. index: the path of the index, if it
        is not in ``path``. Raises InputError, naming file and tensor, for whatever is missing, malformed, truncated,
        pickled, or outside the directory.
        """
        path = Path(path)
        try:
            names = [entry.name for entry in path.iterdir()]
        except (FileNotFoundError, ValueError) as error:
            advice = "a model of the hub must be downloaded first: hf download NAME --local-dir DIR"
            raise InputError(f"{path}: no such directory; {advice}") from error
        except NotADirectoryError as error:
            raise InputError(f"{path}: is not a directory; give the one that holds {stem}.safetensors") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if not unfinished:
            check_finished(path)
        single = f"{stem}.safetensors"
        if index is None and f"{single}.index.json" in names:
            index = path / f"{single}.index.json"
        if index is None:
            shards = _shards_without_index(path, names, stem)
            return cls(path, shards, {name: entry for file in shards.values() for name, entry in file.tensors.items()})
        weight_map = _read_index(index)
        if single in names and single not in weight_map.values():
            raise InputError(
                f"{path}: holds {single} and {index.name}, which does not name it; remove the one that is out of date"
            )
        if missing := sorted(set(weight_map.values()) - set(names)):
            raise InputError(f"{index}: names the shard {missing[0]}, which is not there; fetch it again")
        shards = {name: SafetensorsFile.open(path / name) for name in sorted(set(weight_map.values()))}
        return cls(path, shards, _tensors_of(index, weight_map, shards), index)

    @property
    def old_copies(self) -> list[str]:
        """The shards that hold tensors which the index places into another one."""
        placed = Counter(entry.path.name for entry in self.tensors.values())
        return [shard for shard, file in self.shards.items() if len(file.tensors) > placed[shard]]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    @property
    def changed_shard(self) -> Path | None:
        """The first shard that is not what it was when it was opened, by size and time of change; None if all are."""
        return next((shard.path for shard in self.shards.values() if shard.has_changed), None)

    def file_of(self, entry: TensorEntry) -> SafetensorsFile:
        """The shard that holds ``entry``, which is stored as such."""
        return self.shards[entry.path.name]

    def files(self) -> Iterator[Path]:
        """The files that the tensors depend on: shards and index."""
        if self.index is not None:
            yield self.index
        for shard in self.shards.values():
            yield shard.path

    def equal(self, first: str, second: str, other: "Checkpoint | None" = None, *, common_rows: bool = False) -> bool:
        """Whether two tensors have the same type, shape and bytes; the second may be in another checkpoint.

        common_rows: the shapes may differ in the number of rows; rows that both have are compared.
        """
        other = other or self
        a, b = self.tensors[first], other.tensors[second]
        if a.dtype != b.dtype or (a.shape != b.shape and not common_rows):
            return False
        x, y, size = self.file_of(a), other.file_of(b), min(a.size, b.size)
        same = all(
            x.content(a.begin + begin, a.begin + end) == y.content(b.begin + begin, b.begin + end)
            for begin in range(0, size, _COMPARED)
            for end in [min(begin + _COMPARED, size)]
        )
        x.release(a.begin, a.end)
        y.release(b.begin, b.end)
        return same

    def tensor(self, name: str) -> "torch.Tensor":
        """A copy of one float32, bfloat16 or float16 tensor. Raises InputError if there is none."""
        entry = self.tensors.get(name)
        if entry is None:
            raise InputError(f"{self.path}: has no tensor {name}")
        if entry.dtype not in KERNEL_CODES:
            raise InputError(f"{entry.path}: tensor {name} is {entry.dtype}, not floating point")
        return self.elements(entry, 0, entry.count).view(entry.shape)

    def elements(self, entry: TensorEntry, begin: int, count: int) -> "torch.Tensor":
        """A copy of ``count`` elements of a floating-point tensor, (count,), from element ``begin`` on."""
        import torch

        result = torch.empty(count, dtype=torch_dtype(entry.dtype))
        if not count:
            return result
        data, position = result.view(torch.uint8).numpy(), 0
        for stored in entry.elements(begin, count):
            file = self.file_of(stored)
            data[position : position + stored.size] = file.data[stored.begin : stored.end]
            file.release(stored.begin, stored.end)
            position += stored.size
        return result


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    placed: dict[str, str] = {}
    for plain, name in by_plain_name(weight_map, index).items():
        shard = weight_map[name]
        # Only a plain file name: an index must not reach outside its directory.
        plain_shard = shard.removeprefix("./") if isinstance(shard, str) else ""
        if not plain_shard.endswith(".safetensors") or set(plain_shard) & set("/\\\0"):
            raise InputError(
                f"{index}: tensor {name}: shard {shard!r} is not the name of a safetensors file beside it; if you "
                f"trust it, save what transformers loads with: {conversion_command(index.parent)}"
            )
        placed[plain] = plain_shard
    return placed


def _tensors_of(index: Path, weight_map: dict[str, str], shards: dict[str, SafetensorsFile]) -> dict[str, TensorEntry]:
    """What transformers loads: all tensors of the shards; of one that is in two, that of the last by name.

    The index may leave out a tensor. Raises InputError where it says something else.
    """
    tensors = {name: entry for _, file in sorted(shards.items()) for name, entry in file.tensors.items()}
    save = f"save what transformers loads with: {conversion_command(index.parent)}"
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"{index}: puts tensor {name} into {shard}, which does not hold it; fetch both again. If the model is "
                f"whole without it, {save}"
            )
        if name in shards[shard].tensors and shard != tensors[name].path.name:
            raise InputError(
                f"{tensors[name].path}: holds tensor {name}, which the index does not place there but into {shard}; "
                f"transformers would load the one here: {save}"
            )
    return {name: tensors[name] for name in [*weight_map, *tensors]}


def _shards_without_index(path: Path, names: list[str], stem: str) -> dict[str, SafetensorsFile]:
    """The single file, or all shards of one set. Raises InputError if one is missing, or a tensor is in two of them."""
    if f"{stem}.safetensors" in names:
        return {f"{stem}.safetensors": SafetensorsFile.open(path / f"{stem}.safetensors")}
    parts = {name: number for name in sorted(names) if (number := shard_number(name, stem))}
    if not parts:
        raise InputError(why_no_weights(path, names, stem))
    counts = {count for _, count in parts.values()}
    numbers = sorted(number for number, _ in parts.values())
    if len(counts) > 1 or numbers != list(range(1, max(counts) + 1)):
        raise InputError(
            f"{path}: holds {next(iter(parts))}, but neither {stem}.safetensors.index.json nor exactly the shards of "
            "one set; fetch it again"
        )
    files = {name: SafetensorsFile.open(path / name) for name in parts}
    holders: dict[str, Path] = {}
    for file in files.values():
        for name in file.tensors:
            if name in holders:
                raise InputError(
                    f"{file.path}: holds tensor {name}, as {holders[name].name} does, and there is no "
                    f"{stem}.safetensors.index.json that says which one counts; fetch that too"
                )
            holders[name] = file.path
    return files
