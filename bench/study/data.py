"""TOFU's questions by the part that they play in the study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.study.settings import Settings
from bench.study.store import Store, digest_of
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import read_rows

Row = Mapping[str, str]
_FIELDS = ("question", "answer")


@dataclass(frozen=True)
class Tofu:
    """The data set in ``folder``, checked. Every row is a question with its answer.

    facts: about real authors and the world. pretraining: of theta_0, authors that nothing else uses. tuning: of
    theta_full, all other authors; a forget set is a part of it. validation: retained rows that are not scored
    in the end.
    """

    folder: Path
    digest: str
    facts: Sequence[Row]
    pretraining: Sequence[Row]
    tuning: Sequence[Row]
    validation: Sequence[Row]

    @classmethod
    def read(cls, folder: Path, settings: Settings) -> Tofu:
        """Raises InputError for a file that is missing or bad, naming it and the line."""
        full = read_rows(folder, "full", _FIELDS)
        facts = [read_rows(folder, f"{stem}_perturbed", _FIELDS) for stem in ("real_authors", "world_facts")]

        def authors(first: int, last: int) -> slice:
            rows = slice((first - 1) * settings.rows_per_author, last * settings.rows_per_author)
            if len(full.content) < rows.stop:
                raise InputError(f"{full.path}: has {len(full.content)} rows, fewer than {last} authors")
            return rows

        others = authors(*settings.pretraining_authors)
        rows = [_pair(row) for row in full.content]
        return cls(
            folder,
            " ".join(each.digest for each in (full, *facts)),
            [_pair(row) for each in facts for row in each.content],
            rows[others],
            rows[: others.start] + rows[others.stop :],
            rows[authors(*settings.validation_authors)],
        )

    def forget(self, split: str) -> list[Row]:
        """The rows of a forget set. Raises InputError if one of them is not among the ``tuning`` rows."""
        found = read_rows(self.folder, split, _FIELDS)
        rows = [_pair(row) for row in found.content]
        for row, where in zip(rows, found.places, strict=True):
            if row not in self.tuning or row in self.validation:
                raise InputError(f"{where}: is not among the rows that theta_full is tuned on alone")
        return rows


@dataclass(frozen=True)
class Split:
    """A forget set and what belongs to it, in memory and as JSON lines files in ``folder``.

    forget, retain: what theta_full was tuned on, in two parts. chosen_forget, chosen_retain: the rows by whose
    loss a strength is chosen; at most as many of the forget set as of the retained ones.
    """

    name: str
    rows: Mapping[str, Sequence[Row]]
    folder: Path

    @classmethod
    def of(cls, name: str, tofu: Tofu, store: Store) -> Split:
        """Choose the rows, and write the files."""
        forget = tofu.forget(name)
        rows = {
            "forget": forget,
            "retain": [row for row in tofu.tuning if row not in forget],
            "chosen_forget": forget[:: -(-len(forget) // len(tofu.validation))],
            "chosen_retain": tofu.validation,
        }
        folder = store.piece(f"data/{name}", {"rows": digest_of(rows)}, lambda folder: _write(folder, rows))
        return cls(name, rows, folder)

    def path(self, part: str) -> Path:
        """The file of one part."""
        return self.folder / f"{part}.jsonl"


def _pair(row: Mapping[str, str]) -> Row:
    return {field: row[field] for field in _FIELDS}


def _write(folder: Path, parts: Mapping[str, Sequence[Row]]) -> None:
    for part, rows in parts.items():
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
