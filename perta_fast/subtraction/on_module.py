"""The subtraction on a live module's parameters, chunk by chunk from mapped files."""

import ctypes
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.quantised import open_plain, refuse_quantised_module
from perta_fast.checkpoints.safetensors_file import SafetensorsFile, TensorEntry
from perta_fast.checkpoints.tied import RESIZED, counts_in, is_resized, is_tied_use, refuse_two_matrices, tied_in
from perta_fast.checkpoints.wrappers import plain_name
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.sharded import held, held_ranges, is_sharded, reshard_
from perta_fast.dtypes import KERNEL_CODES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance
from perta_fast.models.held_tensors import Held, check_dtype, check_in_memory, held_tensors
from perta_fast.models.in_use import check_not_in_use
from perta_fast.models.language_part import parameters_of_other_parts
from perta_fast.models.same_names import named_as_module
from perta_fast.models.stored_names import as_stored
from perta_fast.models.wrapped import unwrapped
from perta_fast.ops import low_rank_subtract_, rescaled_subtract_
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.progress import LOGGER
from perta_fast.records.declared import checked_arguments
from perta_fast.rules import DEFAULT_ALPHA, DEFAULT_LAM, DEFAULT_RULE, Rule, RuleName, negative_strength
from perta_fast.subtraction.adapter_changes import Change, OpenedAdapter
from perta_fast.subtraction.inputs import IMPORTANCES, RATIO
from perta_fast.subtraction.module_importances import Weighing, in_form, weighing_of
from perta_fast.subtraction.scope import EVERYTHING, Names, Patterns, Scope
from perta_fast.subtraction.staging import ALIGNMENT, Staging
from perta_fast.subtraction.task_vector import is_nonzero

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 22  # elements: at most 64 MiB of the four sources together


@checked_arguments
def apply_to_module_(
    module: nn.Module,
    base: str | Path,
    tuned: str | Path,
    forget_importance: str | Path | Importance | None = None,
    retain_importance: str | Path | Importance | None = None,
    *,
    importance: str | Path | ImportanceRatio | None = None,
    rule: RuleName = DEFAULT_RULE,
    lam: float = DEFAULT_LAM,
    p: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    common_rows: bool = False,
    allow_zero: bool = False,
    backend: str = "auto",
    group: "ProcessGroup | None" = None,
) -> int:
    """Subtract the rescaled task vector from a live module's parameters in place.

    module: its parameters are theta_full; it may be within DDP or torch.compile. As transformers saves it (the experts
    of a layer apart), names and shapes are those in ``base`` and ``tuned``; ``tuned`` may be an adapter.
    forget_importance, retain_importance, importance: for every rule but ``tv``: the two, or their ratio. Other settings
    as in ``apply``, with these names. Parameters that the importance does not cover, and vision parts that a checkpoint
    lacks, stay as they are; tied ones are changed once. group: all processes that hold a module sharded by FSDP2 or
    tensor parallelism; each changes what it holds.

    Returns the number of parameters that were subtracted from. Raises InputError, before anything is changed,
    naming the tensor that is missing, of another shape or a type without arithmetic, or not finite.
    """
    ranks = Ranks.of(group)
    with ranks.together("the checks"):
        chosen, scope = Rule.of(rule, lam, p, alpha, threshold), Scope.of(only, leave)
        check_not_in_use(module)
        module = unwrapped(module)
        refuse_quantised_module(module)
        theta_0 = open_plain(base)
        importances = weighing_of(chosen, forget_importance, retain_importance, importance)
        if is_sharded(module) and (group is None or is_adapter(tuned)):
            raise InputError(
                "the module is sharded; pass group, all processes that hold it, and for tuned a checkpoint: "
                "an adapter is merged first"
            )
        reshard_(module)
        _check_parameters(module)
        everything = held_tensors(module)
        left = scope.left(_names(module, everything)) if scope != EVERYTHING else set()
        is_tied = _is_tied(module)
        adapter = OpenedAdapter.open(tuned, theta_0, common_rows, everything) if is_adapter(tuned) else None
        theta_f = open_plain(tuned) if adapter is None else adapter.adapter.checkpoint
        theta_0 = named_as_module(theta_0, module, everything)
        if adapter is None:
            theta_f = named_as_module(theta_f, module, everything)
        if is_tied and not any(map(is_tied_use, left)):
            for checkpoint in (theta_0, *([theta_f] if adapter is None else [])):
                refuse_two_matrices(checkpoint, "the module", None)
        known = theta_0.path, theta_f.path
        importances = [in_form(each, module, everything, *known) for each in importances]
        covered = _covered(everything, importances)
        parameters = {name: covered[name] for name in covered if name not in left}
        for name in _left_aside(module, parameters, [theta_f, theta_0] if adapter is None else [theta_0]):
            del parameters[name]
        inputs = _Inputs(theta_0, theta_f, adapter, importances)
        if adapter is not None:
            shapes = {name: tensor.shape for name, tensor in everything.items()}
            inputs.changes.update(adapter.changes(shapes, "the module", is_tied, None, common_rows, left))
            parameters = {name: parameters[name] for name in parameters if name in inputs.changes}
        for name, parameter in parameters.items():
            check_dtype(name, parameter.dtype)
            for source in inputs.sources(name):
                _check_source(name, parameter, source, common_rows)
        if not allow_zero:
            _check_changes(tuned, inputs, parameters)
    _subtract_from_(parameters, inputs, chosen, backend)
    return len(parameters)


def _subtract_from_(parameters: Mapping[str, Held], inputs: "_Inputs", rule: Rule, backend: str) -> None:
    if rule.rescaling.lam < 0:
        LOGGER.warning("%s", negative_strength(rule.rescaling.lam))
    stagings = {device: _staging(device) for device in {parameter.device for parameter in parameters.values()}}
    how = asdict(rule.rescaling)
    for name, parameter in parameters.items():
        sources, change = inputs.sources(name), inputs.changes.get(name)
        for first, theta in parameter.ranges:
            if isinstance(change, LowRank):
                _subtract_low_rank_(theta.view(parameter.shape), change, sources, stagings, how, backend)
            else:
                _subtract_(theta, first, sources, stagings, how, backend)


@dataclass(frozen=True)
class _Inputs:
    """All inputs, opened. changes: what the adapter changes, by name."""

    base: Checkpoint
    tuned: Checkpoint
    adapter: OpenedAdapter | None
    importances: list[Weighing]
    changes: dict[str, Change] = field(default_factory=dict)

    def sources(self, name: str) -> "list[_Source]":
        """The arrays for one parameter; what peft makes is made anew each time, so that it does not stay in memory."""
        change = self.changes.get(name)
        values: list[_Source] = []
        if not isinstance(change, LowRank):
            base = _Source.of_checkpoint(self.base, stored_name(self.base, name))
            if isinstance(change, str) and self.adapter is not None:
                made = torch.from_numpy(self.adapter.array(change))
                rows = len(made) // max(1, math.prod(base.shape[1:]))  # its vocabulary may be resized
                tuned = _Source(made, (rows, *base.shape[1:]), str(self.tuned.path))
            else:
                whole = change.name if isinstance(change, TensorEntry) else stored_name(self.tuned, name)
                tuned = _Source.of_checkpoint(self.tuned, whole)
            values = [tuned, base]
        return values + [_Source.of_importance(importance, name) for importance in self.importances]

    def is_changed_by_peft(self, name: str, change: str) -> bool:
        """Whether ``change``, which peft makes, is more than the rounding of an untrained adapter."""
        base = _Source.of_checkpoint(self.base, stored_name(self.base, name))
        return self.adapter is not None and self.adapter.adds_to(change, base.all().float().numpy())


def _names(module: nn.Module, held: Mapping[str, Held]) -> Names:
    """The stored names for the patterns of a scope; a tied parameter has several."""
    first = {parameter: name for name, parameter in module.named_parameters()}
    uses: dict[str, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name != first[parameter]:
            stand_in = torch.empty(parameter.shape, device="meta")
            (stored,), (other,) = (as_stored(module, {one: stand_in}) for one in (first[parameter], name))
            uses.setdefault(stored, set()).add(other)
    config: Any = getattr(module, "config", None)
    counts = counts_in(config.to_dict()) if hasattr(config, "to_dict") else ()
    return Names({name: tuple(tensor.shape) for name, tensor in held.items()}, uses, counts)


def _is_tied(module: nn.Module) -> bool:
    """Whether input embedding and output head are one parameter."""
    once = {name for name, _ in module.named_parameters()}
    return any(
        is_tied_use(plain_name(name)) for name, _ in module.named_parameters(remove_duplicate=False) if name not in once
    )


def _check_changes(tuned: str | Path, inputs: _Inputs, names: Iterable[str]) -> None:
    """Raise InputError if the task vector is zero in all of these parameters."""
    changes = {name: inputs.changes.get(name) for name in names}
    updates = [change for change in changes.values() if isinstance(change, LowRank)]
    others = [name for name, change in changes.items() if not isinstance(change, LowRank | str)]
    pairs = [(of[0].entry, of[1].entry) for of in map(inputs.sources, others)]
    made = {name: change for name, change in changes.items() if isinstance(change, str)}
    if not is_nonzero([(first, second) for first, second in pairs if first and second], updates) and not any(
        inputs.is_changed_by_peft(name, change) for name, change in made.items()
    ):
        raise InputError(
            f"{tuned}: the task vector is zero in all parameters that it would be subtracted from; nothing would "
            "change (allow_zero=True does it all the same)"
        )


def _subtract_(
    theta: Tensor,
    first: int,
    sources: "list[_Source]",
    stagings: Mapping[torch.device, Staging | None],
    how: Mapping[str, Any],
    backend: str,
) -> None:
    """Subtract chunk by chunk from a flat view of consecutive elements; ``first`` is the number of the first one.

    What lies beyond the end of a source, the rows of a resized vocabulary, stays.
    """
    theta = theta[: max(0, min(math.prod(source.shape) for source in sources) - first)]
    for chunk in _chunks(theta.numel()):
        elements = slice(first + chunk.start, first + chunk.stop)
        with _on_device([source.chunk(elements) for source in sources], theta, stagings) as arrays:
            tuned, base, *weighing = arrays
            rescaled_subtract_(theta[chunk], tuned, base, **_by_name(weighing), **how, backend=backend)
        for source in sources:
            source.release(elements)


def _subtract_low_rank_(
    theta: Tensor,
    update: LowRank,
    importances: "list[_Source]",
    stagings: Mapping[torch.device, Staging | None],
    how: Mapping[str, Any],
    backend: str,
) -> None:
    """Subtract from some rows of a matrix at a time, with the rows of the left factor that belong to them."""
    rows, columns = theta.shape
    left, right = map(torch.from_numpy, update.factors())
    rows = min([rows, len(left), *(source.shape[0] for source in importances)])
    right = right.to(theta.device)
    step = max(1, CHUNK // max(columns, right.shape[0], 1))
    for first in range(0, rows, step):
        end = min(first + step, rows)
        part = slice(first * columns, end * columns)
        chunk = [left[first:end].reshape(-1), *(source.chunk(part) for source in importances)]
        with _on_device(chunk, theta, stagings) as (factor, *arrays):
            low_rank_subtract_(
                theta[first:end],
                factor.view(end - first, len(right)),
                right,
                **_by_name([array.view(end - first, columns) for array in arrays]),
                scale=update.scale,
                **how,
                backend=backend,
            )
        for source in importances:
            source.release(part)


def _by_name(weighing: Sequence[Tensor]) -> dict[str, Any]:
    """Both importances, or one ratio, or nothing, as arguments of the operations."""
    return dict(zip((RATIO,) if len(weighing) == 1 else IMPORTANCES, weighing, strict=False))


@dataclass(frozen=True)
class _Source:
    """The flat values of one tensor: in memory, or a view of a mapped file.

    firsts: if the tensor is sharded, ``values`` are ranges of it of equal length, and these are their first elements.
    pieces: if it is made of several stored ranges, these; then ``values`` are none. is_ratio: it may be infinite.
    """

    values: Tensor
    shape: tuple[int, ...]
    where: str
    file: SafetensorsFile | None = None
    begin: int = 0  # offset of the first byte in the file
    firsts: Sequence[int] = (0,)
    entry: TensorEntry | None = None
    pieces: "Sequence[_Source]" = ()
    is_ratio: bool = False

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, name: str, where: str = "") -> "_Source":
        """A mapped tensor. where: what messages call the input. Raises InputError if its type has no arithmetic."""
        entry = checkpoint.tensors[name]
        if entry.dtype not in KERNEL_CODES:
            raise InputError(f"{entry.path}: tensor {name} is {entry.dtype}, not floating point")
        where = where or str(checkpoint.path)
        pieces = [cls._mapped(checkpoint, piece, where) for piece in entry.pieces or (entry,)]
        if len(pieces) == 1:
            return replace(pieces[0], shape=entry.shape, entry=entry)
        return cls(torch.empty(0, dtype=torch_dtype(entry.dtype)), entry.shape, where, entry=entry, pieces=pieces)

    @classmethod
    def _mapped(cls, checkpoint: Checkpoint, entry: TensorEntry, where: str) -> "_Source":
        file = checkpoint.file_of(entry)
        # By address, because torch warns of read-only memory; nothing here writes to it.
        memory = (ctypes.c_ubyte * entry.size).from_address(file.address + entry.begin)
        dtype = torch_dtype(entry.dtype)
        values = torch.frombuffer(memory, dtype=dtype) if entry.size else torch.empty(0, dtype=dtype)
        return cls(values, entry.shape, where, file, entry.begin)

    @classmethod
    def of_importance(cls, importance: Weighing, name: str) -> "_Source":
        """A tensor of an importance, or of a ratio, from its files if it is not in memory."""
        is_ratio = isinstance(importance, ImportanceRatio)
        where = "the ratio" if is_ratio else "the importance"
        if importance.stored is not None:
            return replace(cls.of_checkpoint(importance.stored, name, where), is_ratio=is_ratio)
        tensor = importance.tensors[name].detach()
        firsts = [first for first, _ in held_ranges(tensor)]
        return cls(held(tensor).reshape(-1), tuple(tensor.shape), where, firsts=firsts, is_ratio=is_ratio)

    def all(self) -> Tensor:
        """All elements; they are copied if there are several pieces."""
        return self.chunk(slice(0, math.prod(self.shape)))

    def chunk(self, elements: slice) -> Tensor:
        """These elements of the whole tensor. Raises InputError if this process does not hold them."""
        if self.pieces:
            return torch.cat([piece.values[part] for piece, part in self._parts(elements)])
        if len(self.values) == math.prod(self.shape):
            return self.values[elements]
        length = len(self.values) // max(1, len(self.firsts))
        number = bisect_right(self.firsts, elements.start) - 1
        if number < 0 or elements.stop > self.firsts[number] + length:
            raise InputError(f"{self.where} is sharded differently from the module; save it and give its directory")
        shift = number * length - self.firsts[number]
        return self.values[elements.start + shift : elements.stop + shift]

    def _parts(self, elements: slice) -> "Iterator[tuple[_Source, slice]]":
        first = 0
        for piece in self.pieces:
            start, stop = max(elements.start - first, 0), min(elements.stop - first, len(piece.values))
            if start < stop:
                yield piece, slice(start, stop)
            first += len(piece.values)

    def release(self, elements: slice) -> None:
        """Drop the pages of elements that were read from the memory of this process."""
        for piece, part in self._parts(elements):
            piece.release(part)
        if self.file is not None:
            width = self.values.element_size()
            self.file.release(self.begin + elements.start * width, self.begin + elements.stop * width)


def _chunks(count: int) -> Iterator[slice]:
    for begin in range(0, count, CHUNK):
        yield slice(begin, min(begin + CHUNK, count))


def _staging(device: torch.device) -> Staging | None:
    """Staging for a device; the CPU reads mapped files directly."""
    return None if device.type == "cpu" else Staging(device, 4 * (4 * CHUNK + ALIGNMENT))


def _on_device(
    chunk: list[Tensor], theta: Tensor, stagings: Mapping[torch.device, Staging | None]
) -> AbstractContextManager[list[Tensor]]:
    staging = stagings[theta.device]
    if staging is None:
        return nullcontext([array.to(theta.device) for array in chunk])
    return staging.on_device(chunk)


def _covered(parameters: dict[str, Held], importances: list[Weighing]) -> dict[str, Held]:
    """The parameters to subtract from. Raises InputError unless all importances cover the same parameters."""
    for importance in importances:
        unknown = importance.tensors.keys() - parameters.keys()
        if unknown:
            raise InputError(f"the importance has tensor {min(unknown)}, which the module lacks")
        uneven = importance.tensors.keys() ^ importances[0].tensors.keys()
        if uneven:
            raise InputError(f"tensor {min(uneven)} is in one importance and not in the other")
    return {name: parameters[name] for name in parameters if not importances or name in importances[0].tensors}


def _left_aside(module: nn.Module, names: Iterable[str], checkpoints: Sequence[Checkpoint]) -> set[str]:
    """Tensors of a module's vision parts that not all checkpoints have; ``stored_name`` names any other."""
    lacking = {name for name in names if any(name not in checkpoint.tensors for checkpoint in checkpoints)}
    if not lacking or not hasattr(module, "get_decoder"):
        return set()
    parameters = dict(module.named_parameters())
    others = {name: torch.empty_like(parameters[name], device="meta") for name in parameters_of_other_parts(module)}
    return lacking & as_stored(module, others).keys()


def stored_name(source: Checkpoint, name: str) -> str:
    """The tensor of ``source`` that holds parameter ``name``: its own, or the one that it is tied to.

    Raises InputError if there is none.
    """
    if name in source.tensors:
        return name
    partner = tied_in(name, source)
    if partner is None:
        raise InputError(f"{source.path}: lacks tensor {name}, which the module has")
    return partner


def _check_parameters(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        check_in_memory(name, parameter)
        if parameter.is_floating_point() and not held(parameter).is_contiguous():
            raise InputError(f"parameter {name} is not contiguous; replace it by a contiguous copy")


def _check_source(name: str, parameter: Held, source: _Source, common_rows: bool) -> None:
    resized = is_resized(name, parameter.shape, source.shape)
    if parameter.shape != source.shape and not (resized and common_rows):
        shapes = f"shape {list(parameter.shape)} in the module, {list(source.shape)} in {source.where}"
        raise InputError(f"tensor {name}: {shapes}{f'; {RESIZED}' if resized else ''}")
    if source.values.dtype not in DTYPE_CODES:
        raise InputError(f"tensor {name} is {source.values.dtype} in {source.where}; it has no arithmetic")
    for first, theta in parameter.ranges:
        for chunk in _chunks(min(theta.numel(), math.prod(source.shape) - first)):
            elements = slice(first + chunk.start, first + chunk.stop)
            values = source.chunk(elements)
            if source.is_ratio and not bool((values >= 0).all()):
                raise InputError(f"tensor {name} has values that are NaN or less than 0 in {source.where}")
            if not source.is_ratio and not bool(torch.isfinite(values).all()):
                raise InputError(f"tensor {name} has NaN or infinite values in {source.where}")
            source.release(elements)
