"""Which rows an importance is a mean over: a digest of each, in a file beside the shards."""

import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from perta_fast.errors import InputError
from perta_fast.files.reading import exists, read_bytes

if TYPE_CHECKING:
    from perta_fast.data.samples import Sample

FILE_NAME = "importance_rows.b3"
_BYTES = 16  # of a BLAKE3 hash
_LINES = re.compile(rf"(?:[0-9a-f]{{{2 * _BYTES}}}\n)*".encode())


@dataclass(frozen=True)
class RowDigests:
    """A digest for each row, and how often that row is there.

    A digest is the beginning of the BLAKE3 hash of the row's token ids and labels, as the loss saw them: with the
    prompt, after the cut to the length limit. So rows with the same digest add the same to a sum of gradients.
    """

    counts: Counter[str]

    @classmethod
    def of(cls, samples: "Sequence[Sample]") -> "RowDigests":
        """Of tokenised rows."""
        from perta_fast.data.samples import by_row  # here: what only reads importances needs no data formats

        return cls(Counter(row_digest(samples[k] for k in numbers) for numbers in by_row(samples)))

    @classmethod
    def read(cls, directory: Path, rows_hash: str, sample_count: int) -> "RowDigests":
        """Those of an importance in ``directory``, whose metadata says ``rows_hash`` and ``sample_count``.

        Raises InputError if it has none, as those of earlier versions, or they are not those that were written.
        """
        path = directory / FILE_NAME
        if not rows_hash:
            raise InputError(
                f"{directory}: does not know its rows, as it is of an earlier version of perta_fast or of no whole "
                "rows; estimate it again with: perta importance"
            )
        if not exists(path):
            raise InputError(f"{path}: is gone; it belongs to the importance. Copy it too, or estimate it again")
        content = read_bytes(path)
        if blake3(content).hexdigest() != rows_hash or not _LINES.fullmatch(content):
            raise InputError(
                f"{path}: is not what was written with the importance; copy it again, or estimate it again"
            )
        digests = cls(Counter(content.decode().split()))
        if digests.count != sample_count:
            raise InputError(f"{path}: has {digests.count} rows, and the importance {sample_count}; estimate it again")
        return digests

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.counts.total()

    @cached_property
    def content(self) -> bytes:
        """The file: a line for each row, sorted, so that the order of the data does not show."""
        return "".join(f"{digest}\n" for digest in sorted(self.counts.elements())).encode()

    @property
    def hash(self) -> str:
        """BLAKE3 of the file."""
        return blake3(self.content).hexdigest()

    def __add__(self, other: "RowDigests") -> "RowDigests":
        return RowDigests(self.counts + other.counts)

    def __sub__(self, other: "RowDigests") -> "RowDigests":
        """Without the rows of ``other``, each as often as it is there; what is not in ``self`` is ignored."""
        return RowDigests(self.counts - other.counts)


def row_digest(samples: "Iterable[Sample]") -> str:
    """The digest of one row, which may be several samples."""
    digest = blake3()
    for sample in samples:
        digest.update(struct.pack("<Qd", len(sample.input_ids), sample.share))
        for numbers in (sample.input_ids, sample.labels):
            digest.update(struct.pack(f"<{len(numbers)}q", *numbers))
    return digest.hexdigest(length=_BYTES)
