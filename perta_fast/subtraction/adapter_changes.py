"""What an adapter changes in the tensors of a model, tied matrices included: settled before a byte is written."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.adapter_kinds import ties_by_name
from perta_fast.checkpoints.adapter_names import PREFIX
from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import (
    RESIZED,
    is_output_head,
    is_resized,
    is_shared_by_parts,
    is_tied_use,
    make_room,
    tied_partner,
)
from perta_fast.errors import InputError
from perta_fast.models.same_names import stored_as_in

if TYPE_CHECKING:
    from perta_fast.models.merged_by_peft import MergedByPeft

Change = LowRank | TensorEntry | str  # str: a name of MergedByPeft


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter beside the base that it was tuned from. merged: what peft makes of the parts in a form of its own."""

    adapter: Adapter
    merged: "MergedByPeft | None" = None

    @classmethod
    def open(
        cls, path: str | Path, base: Checkpoint, common_rows: bool = False, names: Mapping[str, object] | None = None
    ) -> "OpenedAdapter":
        """names: of the tensors of the model; None: as those of ``base``.

        Raises InputError if the adapter is not taken, saved a matrix of another base, or adapts one that encoder and
        decoder share.
        """
        adapter = stored_as_in(base, Adapter.open(path, base.path))
        _refuse_shared(adapter, base)
        adapter.check_untouched(base, common_rows)
        if not adapter.by_peft:
            return cls(adapter)
        from perta_fast.models.merged_by_peft import MergedByPeft

        return cls(adapter, MergedByPeft.open(adapter, base, base.tensors if names is None else names))

    def changes(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        where: object,
        tied: bool,
        model: Path | None = None,
        common_rows: bool = False,
        left: Collection[str] = (),
    ) -> dict[str, Change]:
        """The changes by the model's names.

        shapes: of the model's tensors. where: what messages call the model. tied: whether its embedding and head are
        one matrix, stored once or twice. model: its directory, for advice. left: tensors that are to stay as they are.
        Raises InputError, naming the tensor, if the model lacks one, has it in another shape, or ties two that are not
        one in the tuned model.
        """
        found: dict[str, dict[str, Change]] = {
            stored: dict(changes) for stored, changes in self.adapter.meet(shapes, where, common_rows).items()
        }
        for name, place in self.merged.places.items() if self.merged is not None else ():
            stored = self.adapter.name_in(name, shapes, where)
            resized = is_resized(stored, shapes[stored], place.shape)
            if shapes[stored] != place.shape and not (resized and common_rows):
                raise InputError(
                    f"tensor {stored}: shape {list(shapes[stored])} in {where}, but {list(place.shape)} in the model "
                    f"that {self.adapter.checkpoint.path} adapts{f'; {RESIZED}' if resized else ''}"
                )
            found.setdefault(stored, {})[name] = name
        for stored in found.keys() & set(left):
            del found[stored]
        for stored in [name for name in found if tied and is_tied_use(name)]:
            second = tied_partner(stored, shapes)
            both = found.pop(stored, {}) | found.pop(second or "", {})
            if both:
                change = self._one_change(both, where, model)
                found |= {name: {name: change} for name in (stored, second) if name is not None}
        result = {}
        for stored, changes in found.items():
            if len(changes) > 1:
                raise InputError(f"{self.adapter.checkpoint.path}: {' and '.join(changes)} are one tensor in {where}")
            (result[stored],) = changes.values()
        return result

    def _one_change(self, changes: Mapping[str, Change], where: object, model: Path | None) -> Change:
        """The change of a tied matrix: that of both its uses. Raises InputError if the tuned model has two matrices."""
        names, values = list(changes), list(changes.values())
        if len(names) == 2 and self._same(*values):
            return values[0]
        if len(names) == 1 and self._is_tied_by_peft(names[0], values[0]):
            return values[0]
        how = "alone" if len(names) == 1 else f"otherwise than {names[1]}"
        tied_with = "input embedding" if is_output_head(names[0]) else "output head"
        raise InputError(
            f"{self.adapter.checkpoint.path}: adapts {names[0]}, which is tied to the {tied_with} in {where}, {how}: "
            f"the tuned model has two matrices there; {make_room(model)}"
        )

    def _same(self, first: Change, second: Change) -> bool:
        if isinstance(first, LowRank) and isinstance(second, LowRank):
            return first.same(second)
        if isinstance(first, TensorEntry) and isinstance(second, TensorEntry):
            return self.adapter.checkpoint.equal(first.name, second.name)
        if isinstance(first, str) and isinstance(second, str):
            one, other = self.array(first), self.array(second)
            return len(one) == len(other) and bool((one == other).all())
        return False

    def _is_tied_by_peft(self, name: str, change: Change) -> bool:
        """Whether peft gives the other use of a tied matrix the same change without saving it."""
        if isinstance(change, str) and self.merged is not None:
            tensors = self.merged.modules[self.merged.places[name].module]
            if any(tensor.endswith(".trainable_tokens_delta") for tensor in tensors):
                return not is_output_head(name)  # tokens of the head alone are not tied
        return ties_by_name(self.adapter.settings, name.rpartition(".")[0], isinstance(change, TensorEntry))

    def count(self, name: str) -> int:
        """The number of elements of a tensor that peft makes."""
        assert self.merged is not None
        return self.merged.places[name].count

    def adds_to(self, name: str, base: FloatArray) -> bool:
        """Whether what peft makes of a tensor is not the base, by more than the rounding of an untrained adapter.

        base: its first values, flat, in any type; others are not compared.
        """
        assert self.merged is not None
        made = self.array(name)
        common = min(len(made), len(base))
        return bool((made[:common] != base[:common]).any()) and not self.merged.is_untrained(name)

    def array(self, name: str) -> FloatArray:
        """The tuned values of a tensor that peft makes, flat, in float32."""
        assert self.merged is not None
        return self.merged.array(name)


def _refuse_shared(adapter: Adapter, base: Checkpoint) -> None:
    """Raise InputError if the adapter changes a matrix that encoder and decoder share."""
    paths = [key.removeprefix(PREFIX).split(".") for key in adapter.by_peft]
    modules = {".".join(path[:end]) for path in paths for end in range(1, len(path))}
    for name in (*adapter.low_rank, *adapter.whole, *(f"{module}.weight" for module in sorted(modules))):
        if is_shared_by_parts(name, base):
            raise InputError(
                f"{adapter.checkpoint.path}: adapts {name}, a matrix that encoder and decoder share, for one use; no "
                "checkpoint has a place for that, so tune again without it"
            )
