"""Rows of a part that is not finished, kept beside the output file: a run that was stopped goes on within the part."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from perta_fast.files.kept_parts import KeptParts

_INTERVAL = 10.0  # least seconds between two writes: each is flushed to the disk


def _same(value: Any) -> Any:
    return value


class KeptRows:
    """What is known of the rows of one part, by their numbers; it is written down every few seconds.

    done: results of an earlier run. A context manager: what Ctrl-C finds not written yet is written then. kept: None
    keeps nothing. name: of the part. of: the hash of what it is computed from; rows of other input are passed over.
    as_json, from_json: turn a result into what JSON can express exactly, and back.
    """

    def __init__(
        self,
        kept: KeptParts | None = None,
        name: str = "",
        of: str = "",
        as_json: Callable[[Any], Any] = _same,
        from_json: Callable[[Any], Any] = _same,
    ) -> None:
        self._kept, self._name, self._of, self._as_json = kept, name, of, as_json
        self.done: dict[int, Any] = {}
        self._new: dict[int, Any] = {}
        self._count = 0
        while kept is not None and (piece := kept.read(self._piece)) is not None and piece["of"] == of:
            self.done |= {int(number): from_json(result) for number, result in piece["rows"].items()}
            self._count += 1
        self._written = time.monotonic()

    def __enter__(self) -> "KeptRows":
        return self

    def add(self, rows: Mapping[int, Any]) -> None:
        """Keep the results of a batch."""
        if self._kept is None:
            return
        self._new |= rows
        if time.monotonic() - self._written >= _INTERVAL:
            self._write()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self._new:
            self._write()

    @property
    def _piece(self) -> str:
        return f"{self._name}, rows {self._count}"

    def _write(self) -> None:
        assert self._kept is not None
        rows = {str(number): self._as_json(result) for number, result in self._new.items()}
        self._kept.write(self._piece, {"of": self._of, "rows": rows})
        self._new = {}
        self._count += 1
        self._written = time.monotonic()
