"""Sums and differences of importances on disk, chunk by chunk, without torch.

    I = (sum of s_k n_k I_k) / (sum of s_k n_k),    s_k = 1 for what is added, -1 for what is removed

Importances are means over n_k samples, so this is the mean over the samples together, or those that remain. Each chunk
is computed in float64, where the difference cancels, and rounded once to float32. Every byte is read once and written
once; the memory holds a few chunks of 131,072 elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.checkpoints.safetensors_file import TensorEntry, read_values
from perta_fast.dtypes import byte_count
from perta_fast.errors import InputError
from perta_fast.files.apart import check_outside
from perta_fast.files.disk_space import check_space
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.importance.addable import Addable, check_all_in, check_no_row_twice
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import Importance, ImportanceMetadata, ShardWriter, as_strings
from perta_fast.progress import Bar, Progress
from perta_fast.records.versions import this_version

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[Any, np.dtype[np.float64]]

CHUNK = 1 << 17  # elements; what is at work then fits into a cache
# How much of what is removed may be missing from the whole, as a share of it, by rounding: if the model was run in
# float32 and the importances are stored in it, and else. A tensor with less than _NOTHING of all that is removed has no
# gradient but rounding.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.1
_NOTHING = 1e-6

_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


@dataclass
class Combination:
    """A weighted sum of importances that fit together. terms: with 1 for one that is added, -1 for one removed."""

    terms: Sequence[tuple[int, Addable]]
    rows: RowDigests
    _removed: dict[str, float] = field(default_factory=dict, init=False)
    _missing: dict[str, float] = field(default_factory=dict, init=False)

    @classmethod
    def sum_of(cls, importances: Sequence[Addable]) -> "Combination":
        """All rows together. Raises InputError if they do not fit, or have a row in common."""
        for first, second in combinations(importances, 2):  # what one does not know, such as a prompt, two others may
            first.check_fits(second)
        check_no_row_twice(importances)
        rows = importances[0].rows
        for other in importances[1:]:
            rows = rows + other.rows
        return cls([(1, importance) for importance in importances], rows)

    @classmethod
    def rest_of(cls, whole: Addable, parts: Sequence[Addable]) -> "Combination":
        """The rows of ``whole`` without those of ``parts``.

        Raises InputError if they do not fit, a row of a part is not in the whole, or nothing would remain.
        """
        rows = whole.rows
        for part in parts:
            whole.check_fits(part)
            check_all_in(part, rows, whole.path)
            rows = rows - part.rows
        if not rows.count:
            raise InputError(f"{whole.path}: nothing would remain, as all of its {whole.rows.count} rows are removed")
        return cls([(1, whole), *((-1, part) for part in parts)], rows)

    @property
    def count(self) -> int:
        """The number of rows of the result."""
        return self.rows.count

    def write(self, out: str | Path, *, overwrite: bool, progress: Progress, description: str) -> Importance:
        """Compute all tensors into the directory ``out``, which appears when it is complete.

        Raises InputError if ``out`` is or lies in an input, or exists and is not empty, or if what is removed was not
        in the whole; RunError if a file cannot be read or written. After any error, nothing is left.
        """
        importances = [importance for _, importance in self.terms]
        paths = [importance.path for importance in importances]
        tensors = importances[0].checkpoint.tensors
        shapes = {name: entry.shape for name, entry in tensors.items()}
        written = sum(byte_count("F32", shape) for shape in shapes.values())
        target = OutputDirectory(out, overwrite=overwrite, inputs=paths)
        check_outside(target.final, paths)
        check_space({target.final: written}, [target.path])
        total = written + sum(importance.checkpoint.size for importance in importances)
        with target, Bar(total, description, progress) as bar:
            writer = ShardWriter(shapes, as_strings(self.metadata()), target.path, rows=self.rows)
            for name in tensors:
                entries = [importance.checkpoint.tensors[name] for importance in importances]
                for begin in range(0, entries[0].count, CHUNK):
                    end = min(begin + CHUNK, entries[0].count)
                    writer.write_array(name, self._chunk(name, entries, begin, end), begin)
                    bar.update(sum(entry.size // entry.count for entry in entries) * (end - begin) + 4 * (end - begin))
            check_as_opened(importance.checkpoint for importance in importances)
            self._check_was_in()
            target.commit()
        return Importance.load(target.final)

    def metadata(self) -> ImportanceMetadata:
        """What the result says of itself: counts of the rows that it has, and what it was made of."""
        of = [(sign, importance.metadata) for sign, importance in self.terms]
        last = of[-1][1]
        told = (metadata.told for _, metadata in of)  # none contradicts another: the one that knows most counts
        prompts = max(told, key=lambda each: (each.chat_template, each.date is not None))
        parts = [f"{'+' if sign > 0 else '-'} {table.sample_count} rows of {table.data_hash}" for sign, table in of]
        return replace(
            last,
            data_hash=self.rows.hash,
            rows_hash=self.rows.hash,
            sample_count=self.count,
            truncated_count=max(0, sum(sign * metadata.truncated_count for sign, metadata in of)),
            label_count=max(0, sum(sign * metadata.label_count for sign, metadata in of)),
            perta_fast_version=this_version(),
            one_by_one=", ".join(_all_of(name for _, table in of for name in table.one_by_one.split(", "))),
            read_as="; ".join(_all_of(metadata.read_as for _, metadata in of)),
            combined=" ".join(parts).removeprefix("+ "),
            **vars(prompts),
        )

    def _chunk(self, name: str, entries: Sequence[TensorEntry], begin: int, end: int) -> Any:
        """Elements [begin, end) of one tensor, float32."""
        import numpy as np

        total: Values = np.zeros(end - begin)
        removed = 0.0
        squares = self.terms[0][1].metadata.estimator == "empirical-fisher"
        for (sign, importance), entry in zip(self.terms, entries, strict=True):
            values = read_values(entry, begin, end)
            if squares and float(values.min()) < 0:
                raise InputError(f"{entry.path}: tensor {name} has squares below 0; estimate it again")
            weighted: Values = np.multiply(values, sign * importance.metadata.sample_count, dtype=np.float64)
            amount = float(weighted.sum())
            if not math.isfinite(amount):
                raise InputError(f"{entry.path}: tensor {name} has values that are not finite; estimate it again")
            removed -= amount if sign < 0 else 0.0
            total += weighted
        if removed and squares:
            self._removed[name] = self._removed.get(name, 0.0) + removed
            if float(total.min()) < 0:
                self._missing[name] = self._missing.get(name, 0.0) - float(np.minimum(total, 0.0).sum())
                np.maximum(total, 0.0, out=total)
        total /= self.count
        if float(np.abs(total).max()) > _LARGEST:
            raise InputError(f"{entries[0].path}: tensor {name} would become larger than float32 holds")
        return total.astype(np.float32)

    def _check_was_in(self) -> None:
        """Raise InputError if squares were removed that are not in the whole, beyond rounding."""
        whole = self.terms[0][1].checkpoint
        types = {entry.dtype for _, importance in self.terms for entry in importance.checkpoint.tensors.values()}
        fine = self.terms[0][1].metadata.dtype == "float32" and types == {"F32"}
        tolerance = _TOLERANCE if fine else _COARSE_TOLERANCE
        least = _NOTHING * sum(self._removed.values())
        for name, missing in self._missing.items():
            if missing > max(least, tolerance * self._removed[name]):
                parts = ", ".join(str(part.path) for _, part in self.terms[1:])
                raise InputError(
                    f"{whole.tensors[name].path}: tensor {name} would become negative, so what {parts} holds there is "
                    "not a part of it, though the rows are; estimate them again in the same way"
                )


def _all_of(names: Any) -> list[str]:
    """Each that is not empty, once."""
    return list(dict.fromkeys(filter(None, names)))
