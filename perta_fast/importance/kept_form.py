"""How a run keeps its importances: both of them or their ratio, and in which type.

A run computes with what it keeps, rounded as it is stored, so that ``verify`` and ``apply`` find its bits again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.dtypes import ITEM_SIZES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.importance import ratio
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import STEM, ShardWriter, stored_name

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("pair", "ratio")


@dataclass(frozen=True)
class KeptForm:
    """as_ratio: the ratio alone, rather than both. dtype: ``float32`` or ``bfloat16``."""

    as_ratio: bool = False
    dtype: str = "float32"

    @classmethod
    def of(cls, save_as: str | None, dtype: str | None) -> "KeptForm":
        """From the arguments of ``unlearn``; None is a pair, in float32, and bfloat16 for a ratio.

        Raises InputError for what is no form, or no type.
        """
        form = save_as or FORMS[0]
        if form not in FORMS:
            raise InputError(f"‹save_as› is {save_as!r}; it must be {' or '.join(FORMS)}")
        as_ratio = form == "ratio"
        chosen = dtype or ("bfloat16" if as_ratio else "float32")
        stored_name(chosen)
        return cls(as_ratio, chosen)

    @staticmethod
    def check_is_asked_for(save_as: str | None, dtype: str | None, is_kept: bool) -> None:
        """Raise InputError for a form or a type of importances that are not kept."""
        for name, value in (("save_as", save_as), ("importance_dtype", dtype)):
            if value is not None and not is_kept:
                raise InputError(f"‹{name}› says how importances are kept; give ‹save_importance› too, or leave it out")

    @property
    def name(self) -> str:
        """As ``of`` takes it."""
        return "ratio" if self.as_ratio else "pair"

    @property
    def width(self) -> int:
        """Bytes that are kept of a parameter."""
        return (1 if self.as_ratio else len(ratio.SIDES)) * ITEM_SIZES[stored_name(self.dtype)]

    @property
    def entries(self) -> tuple[str, ...]:
        """What a directory may hold by which it is known to be a run's."""
        files = f"{ratio.STEM}.safetensors", f"{ratio.STEM}.safetensors.index.json"
        return files if self.as_ratio else ratio.SIDES

    def stored(self, means: "Mapping[str, Mapping[str, Tensor]]") -> "dict[str, dict[str, Tensor]]":
        """The tensors to store, rounded: by side, or under ``ratio`` alone. means: float32, by side and name."""
        dtype = torch_dtype(self.dtype)
        if not self.as_ratio:
            return {side: {name: mean.to(dtype) for name, mean in of_side.items()} for side, of_side in means.items()}
        forget, retain = (means[side] for side in ratio.SIDES)
        return {"ratio": {name: ratio.ratio_of(forget[name], retain[name], dtype) for name in forget}}

    def writer(
        self,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, Mapping[str, str]],
        directory: Path,
        rows: RowDigests | None = None,
    ) -> ShardWriter:
        """What writes the tensors that ``stored`` has under ``kind``, below ``directory``.

        metadata: by side. rows: of an importance that is kept itself, if they are known.
        """
        dtype = stored_name(self.dtype)
        if self.as_ratio:
            return ShardWriter(shapes, ratio.ratio_table(metadata), directory, dtype, ratio.STEM)
        (directory / kind).mkdir(exist_ok=True)
        return ShardWriter(shapes, metadata[kind], directory / kind, dtype, rows=rows)

    def opened(self, directory: Path) -> dict[str, Checkpoint]:
        """What was written below ``directory``, by its role as an input of a run."""
        if self.as_ratio:
            return {"ratio": Checkpoint.open(directory, ratio.STEM)}
        return {f"{side}_importance": Checkpoint.open(directory / side, STEM) for side in ratio.SIDES}
