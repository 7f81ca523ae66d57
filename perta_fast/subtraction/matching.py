"""Which tensors of the other inputs belong to each tensor of the model, decided before a byte is written."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from perta_fast.checkpoints.advice import GATHER_FIRST, conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import (
    RESIZED,
    importance_key,
    is_resized,
    is_tied_use,
    refuse_two_matrices,
    tied_in,
    ties_embeddings,
)
from perta_fast.dtypes import COPIED, KERNEL_CODES
from perta_fast.errors import InputError, tensors_named
from perta_fast.models.same_names import named_as_model
from perta_fast.subtraction.adapter_changes import Change, OpenedAdapter
from perta_fast.subtraction.scope import EVERYTHING, Names, Scope

_FLOAT32 = "dtype='float32'"  # for a command that converts
COMPLEX = "there is no arithmetic for complex numbers here; keep it as the model has it with ‹leave›"
CopyReason = Literal[
    "not floating point",
    "not covered by the importance",
    "task vector is zero",
    "not part of the language model",
    "left alone by choice",
]


@dataclass(frozen=True)
class TensorMatch:
    """One tensor of the model and what is read for it. ``copied``: why it is not subtracted from; else None.

    The task vector is ``tuned`` less ``base``, or ``low_rank``. merged: the name of the tuned tensor, if peft makes it,
    which then has ``merged_count`` elements.
    """

    theta: TensorEntry
    base: TensorEntry | None = None
    tuned: TensorEntry | None = None
    forget_importance: TensorEntry | None = None
    retain_importance: TensorEntry | None = None
    copied: CopyReason | None = None
    low_rank: LowRank | None = None
    merged: str | None = None
    merged_count: int = 0
    ratio: TensorEntry | None = None

    @cached_property
    def weighing(self) -> dict[str, TensorEntry]:
        """What w is computed from, by role: both importances, their ratio, or nothing."""
        roles = ("forget_importance", "retain_importance", "ratio")
        entries = {role: getattr(self, role) for role in roles}
        return {role: entry for role, entry in entries.items() if entry is not None}

    @cached_property
    def common(self) -> int:
        """The first elements, which all inputs have; the others, rows of a resized vocabulary, are kept as they are."""
        return min(self._counts)

    @property
    def is_resized(self) -> bool:
        """Whether an input has another number of rows than the others."""
        return len(set(self._counts)) > 1

    @property
    def _counts(self) -> list[int]:
        """The number of elements in each input."""
        entries = (self.theta, self.base, self.tuned, *self.weighing.values())
        counts = [entry.count for entry in entries if entry is not None]
        counts += [] if self.low_rank is None else [math.prod(self.low_rank.shape)]
        return counts if self.merged is None else [*counts, self.merged_count]

    @property
    def kept_rows(self) -> int:
        """The number of rows that are kept as they are."""
        kept = self.theta.count - self.common
        return kept * self.theta.shape[0] // self.theta.count if kept else 0


def match_tensors(
    model: Checkpoint,
    base: Checkpoint,
    tuned: Checkpoint | OpenedAdapter,
    forget_importance: Checkpoint | None,
    retain_importance: Checkpoint | None,
    common_rows: bool = False,
    scope: Scope = EVERYTHING,
    ratio: Checkpoint | None = None,
) -> list[TensorMatch]:
    """Match every tensor of ``model`` with those of the other inputs, in the model's order.

    Names may differ if transformers loads the tensors to one place. Each checkpoint may store a tied output head or
    leave it out. Tensors that are not of the language model, as transformers loads it, need not be in all three: then
    the model's are copied. common_rows: embeddings and heads may have other numbers of rows. scope: the others may lack
    what it leaves alone, or have it in another shape. ratio: of both importances, in place of them. Raises InputError,
    naming checkpoint and tensor, if names or shapes differ, a type has no arithmetic, or an importance belongs to
    another model.
    """
    known = (base.path, *([tuned.path] if isinstance(tuned, Checkpoint) else []))
    base = named_as_model(base, model)
    if isinstance(tuned, Checkpoint):
        tuned = named_as_model(tuned, model)
    given = {"forget_importance": forget_importance, "retain_importance": retain_importance, "ratio": ratio}
    weighing = {role: named_as_model(each, model, *known) for role, each in given.items() if each is not None}
    whole = tuned if isinstance(tuned, Checkpoint) else None
    left_out: set[str] = set()
    tied = ties_embeddings(model)
    left = scope.left(Names.of(model, tied)) if scope != EVERYTHING else set()
    is_head_left = any(map(is_tied_use, left))
    for other in (base, whole):
        if other is not None:
            if tied and not is_head_left:
                refuse_two_matrices(other, model.path, model.path)
            left_out |= _check_same_names(model, other, left)
    _check_importance_names(model, list(weighing.values()))
    matches = [
        TensorMatch(theta, copied="not part of the language model")
        if name in left_out
        else TensorMatch(theta, copied="left alone by choice")
        if name in left
        else _match_tensor(name, model, base, whole, weighing, common_rows)
        for name, theta in model.tensors.items()
    ]
    if not isinstance(tuned, OpenedAdapter):
        return matches
    shapes = {name: entry.shape for name, entry in model.tensors.items()}
    return _with_changes(
        matches, tuned.changes(shapes, model.path, tied, model.path, common_rows, left), tuned, common_rows
    )


def _with_changes(
    matches: list[TensorMatch], changes: Mapping[str, Change], adapter: OpenedAdapter, common_rows: bool
) -> list[TensorMatch]:
    """The matches with the adapter's task vectors: of low rank, whole tensors, what peft makes, or zero."""
    result = []
    for match in matches:
        change = changes.get(match.theta.name)
        if match.copied is not None:
            result.append(match)
        elif isinstance(change, LowRank):
            result.append(replace(match, base=None, low_rank=change))
        elif isinstance(change, TensorEntry):
            _check_agrees(match.theta, change, common_rows)
            result.append(replace(match, tuned=change))
        elif change is not None:
            result.append(replace(match, merged=change, merged_count=adapter.count(change)))
        else:
            result.append(TensorMatch(match.theta, copied="task vector is zero"))
    return result


def _match_tensor(
    name: str,
    model: Checkpoint,
    base: Checkpoint,
    tuned: Checkpoint | None,
    weighing: Mapping[str, Checkpoint],
    common_rows: bool,
) -> TensorMatch:
    theta = model.tensors[name]
    if theta.dtype in COPIED:
        for other in (base, tuned):
            entry = None if other is None else other.tensors.get(name)
            if entry is not None and entry.dtype not in COPIED:
                raise InputError(
                    f"tensor {name} is {theta.dtype} in {theta.path}, {entry.dtype} in {entry.path}; "
                    "give the checkpoint before it was quantised"
                )
        return TensorMatch(theta, copied="not floating point")
    base_entry, tuned_entry = _resolve(base, name), None if tuned is None else _resolve(tuned, name)
    entries: dict[str, TensorEntry] = {}
    if weighing:
        key = importance_key(name, model, next(iter(weighing.values())).tensors)
        if key is None:
            return TensorMatch(theta, copied="not covered by the importance")
        entries = {role: importance.tensors[key] for role, importance in weighing.items()}
    for entry in (theta, base_entry, tuned_entry, *entries.values()):
        if entry is not None:
            double = entry.dtype == "F64" and entry not in entries.values()
            how = f", with: {conversion_command(entry.path.parent, _FLOAT32)}" if double else ""
            _check_agrees(theta, entry, common_rows, how)
    pair = entries.get("forget_importance"), entries.get("retain_importance")
    return TensorMatch(theta, base_entry, tuned_entry, *pair, ratio=entries.get("ratio"))


def _check_agrees(theta: TensorEntry, entry: TensorEntry, common_rows: bool, how: str = "") -> None:
    """Raise InputError unless ``entry`` has theta's shape and a type with arithmetic; how: to get such a type."""
    for one, other in ((theta, entry), (entry, theta)):
        if one.count == 0 < other.count and one.shape == (0,):
            raise InputError(f"{one.path}: tensor {one.name} has shape [0]: {GATHER_FIRST}")
    resized = is_resized(theta.name, theta.shape, entry.shape)
    if entry.shape != theta.shape and not (resized and common_rows):
        shapes = f"shape {list(theta.shape)} in {theta.path}, {list(entry.shape)} in {entry.path}"
        raise InputError(f"tensor {theta.name}: {shapes}; {RESIZED if resized else 'these are not of one model'}")
    if entry.dtype == "C64":
        raise InputError(f"tensor {entry.name} in {entry.path} is {entry.dtype}; {COMPLEX}")
    if entry.dtype not in KERNEL_CODES:
        raise InputError(
            f"tensor {entry.name} in {entry.path} is {entry.dtype}; "
            f"save the checkpoint as float32, bfloat16 or float16 first{how}"
        )


def _resolve(checkpoint: Checkpoint, name: str) -> TensorEntry:
    """The tensor, or its tied partner if the checkpoint stores only that."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name]
    partner = tied_in(name, checkpoint)
    assert partner is not None, "_check_same_names lets only tied heads through"
    return checkpoint.tensors[partner]


def _check_same_names(model: Checkpoint, other: Checkpoint, left: set[str]) -> set[str]:
    """The model's tensors, beside those ``left`` alone, that ``other`` may lack.

    Raises InputError for all others that only one of the two has.
    """
    missing = [
        name
        for name in model.tensors
        if name not in other.tensors
        and name not in left
        and model.tensors[name].dtype not in COPIED
        and tied_in(name, other) is None
    ]
    extra = [name for name in other.tensors if name not in model.tensors and other.tensors[name].dtype not in COPIED]
    for name in list(extra):
        partner = tied_in(name, model)
        if partner is not None:  # the model stores it once
            if partner not in left:
                refuse_two_matrices(other, model.path, model.path)
            extra.remove(name)
    outside: set[str] = set()
    if missing or extra:
        from perta_fast.models.language_part import not_of_language_part  # here: it needs torch

        outside = not_of_language_part(missing + extra, model.path, other.path)
    if needed := [name for name in missing if name not in outside]:
        raise InputError(f"{other.path}: lacks {tensors_named(needed)}, which {model.path} has")
    if needed := [name for name in extra if name not in outside]:
        raise InputError(f"{other.path}: has {tensors_named(needed)}, which {model.path} lacks")
    return outside


def _check_importance_names(model: Checkpoint, weighing: Sequence[Checkpoint]) -> None:
    for holder, other in itertools.permutations(weighing, 2):
        missing = [name for name in holder.tensors if name not in other.tensors]
        if missing:
            raise InputError(f"{other.path}: lacks {tensors_named(missing)}, which {holder.path} has")
    for importance in weighing[:1]:  # the other has the same names
        unknown = [name for name in importance.tensors if name not in model.tensors and tied_in(name, model) is None]
        if unknown:
            raise InputError(f"{importance.path}: has {tensors_named(unknown)}, which {model.path} lacks")
