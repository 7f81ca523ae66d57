"""TOFU's questions, divided by their use in the study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.study.settings import Settings
from bench.study.store import Store, digest_of
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import read_benchmark_file

Row = Mapping[str, str]
_FIELDS = ("question", "answer")


@dataclass(frozen=True)
class Tofu:
    """The data set in ``folder``, checked. Every row is a question with its answer.

    facts: about real authors and the world. pretraining: authors that only theta_0 is trained on. tuning: all other
    authors, which theta_full is tuned on; a forget set is a part of it. validation: retained rows by whose loss
    strengths are chosen, and which are not scored.
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
        full = read_benchmark_file(folder, "full", _FIELDS)
        facts = [read_benchmark_file(folder, f"{stem}_perturbed", _FIELDS) for stem in ("real_authors", "world_facts")]

        def authors(first: int, last: int) -> slice:
            rows = slice((first - 1) * settings.rows_per_author, last * settings.rows_per_author)
            if len(full.rows) < rows.stop:
                raise InputError(f"{full.path}: has {len(full.rows)} rows, fewer than {last} authors")
            return rows

        pretraining = authors(*settings.pretraining_authors)
        rows = [_pair(row.content) for row in full.rows]
        return cls(
            folder,
            " ".join(file.digest for file in (full, *facts)),
            [_pair(row.content) for file in facts for row in file.rows],
            rows[pretraining],
            rows[: pretraining.start] + rows[pretraining.stop :],
            rows[authors(*settings.validation_authors)],
        )

    def forget(self, split: str) -> list[Row]:
        """The rows of a forget set. Raises InputError for a row that is not in ``tuning``, or is in ``validation``."""
        file = read_benchmark_file(self.folder, split, _FIELDS)
        rows = [_pair(row.content) for row in file.rows]
        for pair, row in zip(rows, file.rows, strict=True):
            if pair not in self.tuning or pair in self.validation:
                raise InputError(f"{row.where}: is not among the rows that only theta_full is tuned on")
        return rows


@dataclass(frozen=True)
class Split:
    """A forget set and the rows that go with it, in memory and as JSON lines files in ``folder``.

    rows: "forget" and "retain" together are what theta_full is tuned on, without the facts. "chosen_forget" and
    "chosen_retain" are those by whose loss a strength is chosen, at most as many of the first as of the second.
    """

    name: str
    rows: Mapping[str, Sequence[Row]]
    folder: Path

    @classmethod
    def of(cls, name: str, tofu: Tofu, store: Store) -> Split:
        """Choose the rows and write the files."""
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
