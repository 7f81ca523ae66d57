"""The ratio of both importances, rho = I_r / I_f: all that a rule takes from them, in one file of bfloat16.

Rules grad and fisher take one ratio, as its square is the ratio of the squares.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.dtypes import ITEM_SIZES, TORCH_NAMES, torch_dtype, torch_name
from perta_fast.errors import InputError, printable
from perta_fast.files.apart import check_outside
from perta_fast.files.disk_space import check_space
from perta_fast.files.durable import sync_tree
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.files.reading import exists
from perta_fast.importance.prompts import check_system_prompts
from perta_fast.importance.store import STEM as IMPORTANCE_STEM
from perta_fast.importance.store import (
    Importance,
    ImportanceMetadata,
    ShardWriter,
    StoredTensors,
    as_strings,
    check_counts,
    check_held_by,
    lacking,
    shapes_of,
    shared_metadata,
    stored_name,
)
from perta_fast.progress import Bar, Progress
from perta_fast.rules import ESTIMATORS, Estimator

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

STEM = "ratio"
FORMAT = "perta-ratio"
FORMAT_VERSION = "1"
SIDES = ("forget", "retain")
_CHUNK = 1 << 22  # elements made at a time
_DOUBLE = 1 << 18  # of these in double precision


def ratio_of(forget: "torch.Tensor", retain: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """|I_r| / |I_f| as ``dtype``, infinite where I_f is 0, and only there: beyond the largest number, it is that.

    It is computed in double precision: in float32, numbers of any two importances may have a ratio out of range.
    Memory beside the result: 13 MB.
    """
    import torch

    result = torch.empty(forget.shape, dtype=dtype, device=forget.device)
    parts = (tensor.reshape(-1).split(_DOUBLE) for tensor in (result, forget, retain))
    for made, of_forget, of_retain in zip(*parts, strict=True):
        numerator, denominator = of_retain.double().abs(), of_forget.double().abs()
        finite = (numerator / denominator).clamp(max=torch.finfo(dtype).max)
        made.copy_(torch.where(denominator == 0, torch.inf, finite))
    return result


@dataclass
class ImportanceRatio:
    """rho = I_r / I_f: tensors of float32 or bfloat16 by parameter name, and where both importances come from.

    metadata: by ``forget`` and ``retain``. directory: where it was saved to or loaded from, None while it lives in
    memory only.
    """

    tensors: "Mapping[str, torch.Tensor]"
    metadata: Mapping[str, ImportanceMetadata]
    directory: Path | None = None

    def __repr__(self) -> str:
        estimator = next(iter(self.metadata.values())).estimator
        rows = " and ".join(f"{metadata.sample_count} {side}" for side, metadata in self.metadata.items())
        place = self.directory or "in memory"
        return printable(f"<ImportanceRatio: estimator {estimator}, {rows} rows, {len(self.tensors)} tensors, {place}>")

    @classmethod
    def of(
        cls, forget: str | Path | Importance, retain: str | Path | Importance, *, dtype: str = "bfloat16"
    ) -> "ImportanceRatio":
        """The ratio of two importances, or of two directories that hold them; a tensor is made when it is asked for.

        Of importances that are sharded over processes, each process makes what it holds.
        dtype: float32 or bfloat16. The rounding to bfloat16 changes w by at most p * 2^-8 * w (1 - w). Raises
        InputError if they do not belong together; when a tensor is made, if it has a value that is not finite.
        """
        pair = [each if isinstance(each, Importance) else Importance.load(each) for each in (forget, retain)]
        forget, retain = pair
        name = stored_name(dtype)
        if forget.metadata.estimator != retain.metadata.estimator:
            raise InputError(
                f"the forget importance is of estimator {forget.metadata.estimator}, the retain importance of "
                f"{retain.metadata.estimator}; estimate one of them again"
            )
        check_system_prompts(forget.metadata.told, retain.metadata.told)
        shapes = [_shapes(importance) for importance in pair]
        for (holder, other), side in zip((shapes, shapes[::-1]), ("retain", "forget"), strict=True):
            for tensor, shape in holder.items():
                if other.get(tensor) != shape:
                    raise InputError(f"the {side} importance has no tensor {tensor} of shape {list(shape)}")
        for tensor in shapes[0]:
            if _layout(forget, tensor) != _layout(retain, tensor):
                raise InputError(
                    f"the forget importance of {tensor} is sharded differently from the retain importance; save both "
                    "first, and give their directories"
                )
        metadata = dict(zip(SIDES, (forget.metadata, retain.metadata), strict=True))
        return cls(_MadeTensors(forget, retain, name), metadata)

    @classmethod
    def load(cls, directory: str | Path) -> "ImportanceRatio":
        """Read a saved ratio; each tensor is read from disk when it is asked for."""
        return cls.of_checkpoint(Checkpoint.open(directory, STEM))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "ImportanceRatio":
        """``load``, from opened shards."""
        tables = read_ratio_metadata(checkpoint)
        metadata = {side: ImportanceMetadata.of_strings(table) for side, table in tables.items()}
        return cls(StoredTensors(checkpoint), metadata, checkpoint.path)

    @property
    def stored(self) -> Checkpoint | None:
        """The files that the tensors are read from; None if they are in memory or made."""
        return self.tensors.checkpoint if isinstance(self.tensors, StoredTensors) else None

    @property
    def estimator(self) -> Estimator:
        """That of both importances."""
        return self.metadata["forget"].estimator

    def save(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        progress: Progress = True,
        group: "ProcessGroup | None" = None,
    ) -> None:
        """Write shards and index; the directory appears only when complete.

        Memory: 2^22 elements, if they are made; of a sharded tensor, what this process holds of it. progress: as in
        ``apply``. group: the processes that make the same ratio, or hold shards of it; all call this, and each writes
        its share into a directory that all must see. Raises InputError if the directory exists and is not empty, or
        lies in one that is read, RunError if it cannot be written.
        """
        ranks, what = Ranks.of(group), "save a ratio"
        with ExitStack() as opened:
            with ranks.together(what):
                for source in self._sources:
                    check_held_by(source.tensors, ranks)
                target = OutputDirectory(directory, overwrite=overwrite, inputs=self._read)
                check_outside(target.final, self._read)
                if ranks.first:
                    width = ITEM_SIZES[self._dtype]
                    size = sum(width * prod(shape) for shape in _shapes(self).values())
                    check_space({target.final: size}, [target.path])
                    opened.enter_context(target)
            check_shared(target.path, ranks)
            with ranks.together(what):
                self._write_shards(target.path, ranks, progress)
                check_as_opened(source.stored for source in self._sources if source.stored is not None)
            with ranks.together(what):
                if ranks.first:
                    target.commit()
        self.directory = target.final

    def _write_shards(self, directory: Path, ranks: Ranks, progress: Progress) -> None:
        """Write this rank's share of the shards into a directory that is there, durably."""
        shapes, dtype = _shapes(self), self._dtype
        shares = {name: ranks.own_slice(prod(shape)) for name, shape in shapes.items()}
        moved = {name: ITEM_SIZES[dtype] + self._bytes_read(name) for name in shapes}  # for each element
        total = sum(moved[name] * (share.stop - share.start) for name, share in shares.items())
        table = ratio_table({side: as_strings(metadata) for side, metadata in self.metadata.items()})
        writer = ShardWriter(shapes, table, directory, dtype, STEM)
        with Bar(total, "ratio", ranks.first and progress) as bar:
            for name, share in shares.items():
                if _layout(self._sources[0], name) is not None:
                    writer.write_share(name, self.tensors[name], ranks)
                    bar.update(moved[name] * (share.stop - share.start))  # about what this rank has written
                    continue
                elements = _elements_of(self, name)
                for begin in range(share.start, share.stop, _CHUNK):
                    count = min(_CHUNK, share.stop - begin)
                    writer.write(name, elements(begin, count), begin)
                    bar.update(moved[name] * count)
        sync_tree(directory)

    def _bytes_read(self, name: str) -> int:
        """Bytes that are read from files for an element of a tensor."""
        stored = [source.stored.tensors[name] for source in self._sources if source.stored is not None]
        return sum(ITEM_SIZES[entry.dtype] for entry in stored)

    @property
    def _read(self) -> list[Path]:
        """The directories that tensors are read from."""
        return [source.stored.path for source in self._sources if source.stored is not None]

    @property
    def _sources(self) -> "Sequence[Importance | ImportanceRatio]":
        made = self.tensors if isinstance(self.tensors, _MadeTensors) else None
        return [self] if made is None else [made.forget, made.retain]

    @property
    def _dtype(self) -> str:
        """The stored type of its tensors, by its safetensors name."""
        if isinstance(self.tensors, _MadeTensors):
            return self.tensors.dtype
        if self.stored is not None:
            kinds = {TORCH_NAMES.get(entry.dtype, entry.dtype) for entry in self.stored.tensors.values()}
        else:
            kinds = {torch_name(tensor.dtype) for tensor in self.tensors.values()}
        return stored_name(max(kinds, default="bfloat16"))  # float32 if they differ


@dataclass(frozen=True)
class _MadeTensors(Mapping[str, "torch.Tensor"]):
    """The ratio of two importances, a tensor at a time. dtype: a safetensors name."""

    forget: Importance
    retain: Importance
    dtype: str

    def elements(self, name: str, begin: int, count: int) -> "torch.Tensor":
        """Consecutive elements, (count,). Raises InputError, naming the tensor, for values that are not finite."""
        return self._ratio(name, *(_elements_of(each, name)(begin, count) for each in (self.forget, self.retain)))

    def _ratio(self, name: str, forget: "torch.Tensor", retain: "torch.Tensor") -> "torch.Tensor":
        for side, importance, values in zip(SIDES, (self.forget, self.retain), (forget, retain), strict=True):
            if not bool(values.isfinite().all()):
                where = importance.directory or f"the {side} importance"
                raise InputError(
                    f"{where}: tensor {name} has NaN or infinite importance; estimate it again, in float32 or bfloat16 "
                    "if the model ran in float16"
                )
        return ratio_of(forget, retain, torch_dtype(self.dtype))

    def __getitem__(self, name: str) -> "torch.Tensor":
        if _layout(self.forget, name) is None:
            shape = _shapes(self.forget)[name]
            return self.elements(name, 0, prod(shape)).view(shape)
        from perta_fast.distributed.sharded import held, sharded_as

        shards = [each.tensors[name] for each in (self.forget, self.retain)]
        return sharded_as(shards[0], self._ratio(name, *map(held, shards)))

    def __contains__(self, name: object) -> bool:
        return name in self.forget.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.forget.tensors)

    def __len__(self) -> int:
        return len(self.forget.tensors)


Elements = Callable[[int, int], "torch.Tensor"]


def _shapes(of: "Importance | ImportanceRatio") -> dict[str, tuple[int, ...]]:
    return _shapes(of.tensors.forget) if isinstance(of.tensors, _MadeTensors) else shapes_of(of.tensors)


def _layout(of: "Importance | ImportanceRatio", name: str) -> object:
    """Which part of a tensor in memory this process holds; None for all of it."""
    if of.stored is not None or isinstance(of.tensors, _MadeTensors):
        return None
    tensor: Any = of.tensors[name]
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "device_mesh") else None


def _elements_of(of: "Importance | ImportanceRatio", name: str) -> Elements:
    """What gives consecutive elements of a tensor, by the first one and their number."""
    stored, tensors = of.stored, of.tensors
    if stored is not None:
        return lambda begin, count: stored.elements(stored.tensors[name], begin, count)
    if isinstance(tensors, _MadeTensors):
        return lambda begin, count: tensors.elements(name, begin, count)
    flat = tensors[name].detach().reshape(-1)
    return lambda begin, count: flat[begin : begin + count]


def is_ratio(directory: Path) -> bool:
    """Whether a ratio lies in ``directory``."""
    return _holds(directory, STEM)


def _holds(directory: Path, stem: str) -> bool:
    return any(exists(directory / f"{stem}.safetensors{ending}") for ending in ("", ".index.json"))


def refuse_ratio(directory: Path) -> None:
    """Raise InputError if a ratio lies where one importance is needed."""
    if is_ratio(directory):
        raise InputError(f"{directory}: holds the ratio of two importances, not one; give it as ‹importance› alone")


def located(directory: Path) -> dict[str, Path]:
    """What lies in a directory of ``--save-importance``: the ratio, or both importances, by role.

    Raises InputError if it is neither.
    """
    if is_ratio(directory):
        return {"ratio": directory}
    pair = {f"{side}_importance": directory / side for side in SIDES}
    if all(exists(path) for path in pair.values()):
        return pair
    if _holds(directory, IMPORTANCE_STEM):
        raise InputError(f"{directory}: holds one importance; give two, as ‹forget_importance› and ‹retain_importance›")
    raise InputError(
        f"{directory}: holds neither a ratio nor the importances forget and retain, as ‹save_importance› writes them"
    )


def ratio_table(tables: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The metadata of a ratio's shards. tables: ``as_strings`` of both importances, by side."""
    both = {
        f"{side}_{key}": value
        for side in SIDES
        for key, value in tables[side].items()
        if key not in ("format", "format_version")
    }
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **both}


def read_ratio_metadata(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """The metadata of both importances, by side. Raises InputError if the shards disagree or are no ratio."""
    table = shared_metadata(checkpoint)
    sides = {
        side: {key.removeprefix(f"{side}_"): value for key, value in table.items() if key.startswith(f"{side}_")}
        for side in SIDES
    }
    estimators = {side.get("estimator") for side in sides.values()}
    if table.get("format") != FORMAT or any(map(lacking, sides.values())) or not estimators <= set(ESTIMATORS):
        raise InputError(f"{checkpoint.path}: is not a ratio of importances")
    if table.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{checkpoint.path}: was written by a later version of perta_fast")
    if len(estimators) > 1:
        raise InputError(f"{checkpoint.path}: is the ratio of importances of different estimators; make it again")
    for side in sides.values():
        check_counts(side, checkpoint)
    return sides
