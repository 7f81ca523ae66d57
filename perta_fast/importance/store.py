"""Importance on disk: safetensors shards with an index, tensor names as in the model, metadata in each."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import build_header
from perta_fast.data.chat import Told
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.dtypes import ITEM_SIZES, STORED_TYPES, byte_count, torch_dtype
from perta_fast.errors import InputError, printable
from perta_fast.files.disk_space import check_space
from perta_fast.files.durable import sync_tree, write_fully
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.files.own import own_file
from perta_fast.files.reading import exists
from perta_fast.importance.row_digests import FILE_NAME as ROWS_FILE
from perta_fast.importance.row_digests import RowDigests
from perta_fast.rules import ESTIMATORS, Estimator

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from perta_fast.importance.ratio import ImportanceRatio

STEM = "importance"
FORMAT = "perta-importance"
FORMAT_VERSION = "1"
SHARD_BYTES = 5_000_000_000
WIDTH = ITEM_SIZES["F32"]  # bytes of a parameter, where it is not rounded
_COUNTS = ("sample_count", "truncated_count", "label_count")
_REQUIRED = ("estimator", "data_hash", "sample_count", "evaluated_at")


@dataclass(frozen=True)
class ImportanceMetadata:
    """Where an importance comes from.

    estimator: "grad" (signed mean of per-sample gradients) or "empirical-fisher" (mean of their squares).
    data_hash: BLAKE3 of the data. sample_count, truncated_count: samples used, and those cut to the length limit.
    evaluated_at: the model directory, or "live module". one_by_one: parameters that took a backward pass for each
    sample, because no batched pass gives their squares; separated by commas. read_as: which fields of the data were
    taken for what, "" if it has plain forms. rows_hash: BLAKE3 of the list of its rows (``row_digests``), "" if it has
    none. weights_hash: of where it was evaluated (``checkpoints.weights_hash``), "" for a live module. dtype: that the
    model was run in. combined: of which importances it is the sum or the rest, "" if it was estimated. chat_template,
    system_prompt, date_string, date: what the chat template was told (``data.chat.Told``).
    """

    estimator: Estimator
    data_hash: str
    sample_count: int
    truncated_count: int
    label_count: int
    evaluated_at: str
    perta_fast_version: str
    torch_version: str
    transformers_version: str
    one_by_one: str = ""
    read_as: str = ""
    rows_hash: str = ""
    weights_hash: str = ""
    dtype: str = ""
    combined: str = ""
    chat_template: bool = False
    system_prompt: str | None = None
    date_string: str | None = None
    date: str | None = None

    @property
    def told(self) -> Told:
        """What the chat template was told."""
        return Told(self.chat_template, self.system_prompt, self.date_string, self.date)

    @classmethod
    def of_strings(cls, table: Mapping[str, str]) -> "ImportanceMetadata":
        """From what ``as_strings`` made, checked by ``read_metadata``."""
        values: dict[str, Any] = {
            key: int(table.get(key, 0)) if key in _COUNTS else table.get(key, "")
            for key in cls.__dataclass_fields__.keys() - Told.__dataclass_fields__.keys()
        }
        return cls(**values, **vars(Told.read(table)))


@dataclass
class Importance:
    """Accumulated importance: float32 tensors by parameter name, and where they come from.

    ``directory`` is where it was saved to or loaded from, None while it lives in memory only. rows: digests of the rows
    that it is a mean over; None if they are not known, or lie in ``directory``.
    """

    tensors: "Mapping[str, torch.Tensor]"
    metadata: ImportanceMetadata
    directory: Path | None = None
    rows: RowDigests | None = None

    def __repr__(self) -> str:
        metadata, place = self.metadata, self.directory or "in memory"
        return printable(
            f"<Importance: estimator {metadata.estimator}, {metadata.sample_count} rows, {len(self.tensors)} tensors, "
            f"taken at {metadata.evaluated_at}, {place}>"
        )

    def save(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        dtype: str = "float32",
        group: "ProcessGroup | None" = None,
    ) -> None:
        """Write shards and index; the directory appears only when complete.

        dtype: what values are rounded to, float32 or bfloat16. group: the processes that hold this importance; all call
        this, and each writes its share into a directory that all must see. None: this process alone. Raises InputError
        if the directory exists and is not empty, RunError if it cannot be written.
        """
        ranks, stored = Ranks.of(group), stored_name(dtype)
        what = "save an importance"
        with ExitStack() as opened:
            with ranks.together(what):
                check_held_by(self.tensors, ranks)
                rows = self._known_rows()
                target = OutputDirectory(directory, overwrite=overwrite)
                if ranks.first:
                    shapes = shapes_of(self.tensors).values()
                    check_space({target.final: sum(byte_count(stored, shape) for shape in shapes)}, [target.path])
                    opened.enter_context(target)
            check_shared(target.path, ranks)
            with ranks.together(what):
                self._write_shards(target.path, stored, ranks, rows)
            with ranks.together(what):
                if ranks.first:
                    target.commit()
        self.directory = target.final

    def _known_rows(self) -> RowDigests | None:
        stored, metadata = self.stored, self.metadata
        if self.rows is None and stored is not None and metadata.rows_hash and exists(stored.path / ROWS_FILE):
            return RowDigests.read(stored.path, metadata.rows_hash, metadata.sample_count)
        return self.rows if metadata.rows_hash else None

    def _write_shards(self, directory: Path, dtype: str, ranks: Ranks, rows: RowDigests | None) -> None:
        """Write this rank's share of each tensor, durably."""
        shapes = shapes_of(self.tensors)
        metadata = self.metadata if rows is not None else replace(self.metadata, rows_hash="")
        writer = ShardWriter(shapes, as_strings(metadata), directory, dtype, rows=rows)
        for name, tensor in self.tensors.items():
            writer.write_share(name, tensor, ranks)
        sync_tree(directory)

    @classmethod
    def load(cls, directory: str | Path) -> "Importance":
        """Read a saved importance; each tensor is read from disk when it is asked for."""
        return cls.of_checkpoint(Checkpoint.open(directory, STEM))

    @property
    def stored(self) -> Checkpoint | None:
        """The files that the tensors are read from; None if they are in memory."""
        return self.tensors.checkpoint if isinstance(self.tensors, StoredTensors) else None

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Importance":
        """``load``, from opened shards."""
        metadata = ImportanceMetadata.of_strings(read_metadata(checkpoint))
        return cls(StoredTensors(checkpoint), metadata, checkpoint.path)


def check_held_by(tensors: "Mapping[str, torch.Tensor]", ranks: Ranks) -> None:
    """Raise InputError if other processes than ``ranks`` hold shards of one of these. Stored ones are not read."""
    for name, tensor in tensors.items() if not isinstance(tensors, StoredTensors) else ():
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh.size() != ranks.world:
            raise InputError(f"the importance of {name} is held by {mesh.size()} processes; pass group, all of these")


def shapes_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, tuple[int, ...]]:
    """The shape of each tensor. Stored ones are not read."""
    if isinstance(tensors, StoredTensors):
        return {name: entry.shape for name, entry in tensors.checkpoint.tensors.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def directory_of(importance: "str | Path | Importance | ImportanceRatio") -> Path:
    """Where an importance lies. Raises InputError if it is in memory only."""
    if isinstance(importance, str | Path):
        return Path(importance)
    if importance.directory is None:
        raise InputError("this importance is in memory only; save it first: importance.save(directory)")
    return importance.directory


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> "torch.Tensor":
        if name not in self.checkpoint.tensors:
            raise KeyError(name)
        return self.checkpoint.tensor(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own method would read the tensor
        return name in self.checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


def stored_name(dtype: str) -> str:
    """The safetensors name of a type that importances are stored in. Raises InputError for another."""
    if dtype not in STORED_TYPES:
        raise InputError(f"the type of a stored importance is {dtype!r}; it must be {' or '.join(STORED_TYPES)}")
    return STORED_TYPES[dtype]


def read_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of an importance. Raises InputError if the shards disagree or are no importance."""
    table = shared_metadata(checkpoint)
    if table.get("format") != FORMAT or lacking(table) or table["estimator"] not in ESTIMATORS:
        raise InputError(f"{checkpoint.path}: is not an importance made by: perta importance")
    if table.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{checkpoint.path}: was written by a later version of perta_fast")
    check_counts(table, checkpoint)
    return table


def shared_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata that all shards have. Raises InputError if they disagree."""
    tables = [dict(shard.metadata) for shard in checkpoint.shards.values()]
    if any(table != tables[0] for table in tables):
        raise InputError(f"{checkpoint.path}: its shards come from different runs; estimate it again")
    return tables[0]


def lacking(table: Mapping[str, str]) -> list[str]:
    """What every importance says of itself and ``table`` does not."""
    return [key for key in _REQUIRED if key not in table]


def check_counts(table: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise InputError unless the counts of ``checkpoint``, of which ``table`` is metadata, are whole numbers."""
    if not all(re.fullmatch("[0-9]{1,18}", table.get(key, "0")) for key in _COUNTS):
        raise InputError(f"{checkpoint.path}: its metadata has counts that are not whole numbers")


class ShardWriter:
    """Shards of at most ``SHARD_BYTES`` (one tensor at least), with an index, filled tensor by tensor.

    The constructor writes headers, index and the list of rows; then tensors may be written in any order. dtype: the
    stored type, to which values are rounded; a safetensors name. stem: of the files' names.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, str],
        directory: Path,
        dtype: str = "F32",
        stem: str = STEM,
        *,
        rows: RowDigests | None = None,
    ) -> None:
        if rows is not None:
            _write(directory / ROWS_FILE, memoryview(rows.content), 0)
        self._positions: dict[str, tuple[Path, int]] = {}
        self._dtype = dtype
        groups = _group(shapes, dtype)
        for number, names in enumerate(groups, start=1):
            file = stem if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}"
            path = directory / f"{file}.safetensors"
            header, offsets = build_header({name: (dtype, shapes[name]) for name in names}, metadata)
            _write(path, memoryview(header), 0)
            # At full size at once: where a file grows, a network file system may put zeros over other ranks' writes.
            os.truncate(path, len(header) + sum(byte_count(dtype, shapes[name]) for name in names))
            self._positions.update({name: (path, offsets[name]) for name in names})
        if len(groups) > 1:
            total = sum(byte_count(dtype, shape) for shape in shapes.values())
            weight_map = {name: path.name for name, (path, _) in self._positions.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            with open(directory / f"{stem}.safetensors.index.json", "w", opener=own_file) as written:
                written.write(json.dumps(index, indent=1) + "\n")

    def write_share(self, name: str, tensor: "torch.Tensor", ranks: Ranks) -> None:
        """Write the elements of a tensor that are this rank's to write: of a sharded one, those that it holds."""
        if not hasattr(tensor, "device_mesh"):
            share = ranks.own_slice(tensor.numel())
            self.write(name, tensor.reshape(-1)[share], share.start)
            return
        from perta_fast.distributed.sharded import held, held_ranges, is_first_replica  # heavy, and rarely needed

        if is_first_replica(tensor):
            values = held(tensor).reshape(-1)
            for first, part in held_ranges(tensor):
                self.write(name, values[part], first)

    def write(self, name: str, tensor: "torch.Tensor", begin: int = 0) -> None:
        """Write a tensor, or consecutive elements of it that begin with number ``begin``."""
        if tensor.numel():
            import torch

            stored = tensor.detach().to(torch_dtype(self._dtype)).cpu().contiguous().reshape(-1)
            self._write_bytes(name, stored.view(torch.uint8).numpy().data, begin)

    def write_array(self, name: str, data: FloatArray, begin: int = 0) -> None:
        """``write`` without torch, where the stored type is float32; ``data`` is float32, (n,), contiguous."""
        assert self._dtype == "F32"
        if data.size:
            self._write_bytes(name, data.data.cast("B"), begin)

    def _write_bytes(self, name: str, data: memoryview, begin: int) -> None:
        path, offset = self._positions[name]
        _write(path, data, offset + ITEM_SIZES[self._dtype] * begin)


def _group(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[list[str]]:
    """The names of each shard."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = byte_count(dtype, shape)
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write(path: Path, data: memoryview, offset: int) -> None:
    descriptor = own_file(path, os.O_WRONLY | os.O_CREAT)
    try:
        write_fully(descriptor, data, offset)
    finally:
        os.close(descriptor)


def as_strings(metadata: ImportanceMetadata) -> dict[str, str]:
    """``metadata`` as the header of a shard keeps it."""
    told = metadata.told
    table = {key: str(value) for key, value in asdict(metadata).items() if key not in vars(told)}
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **table, **told.as_strings()}
