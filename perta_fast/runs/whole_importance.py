"""The importance of all rows, from which ``unlearn`` takes that of the rows to forget: what remains is the retain's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.checkpoints.quantised import open_plain
from perta_fast.checkpoints.weights_hash import weights_hash
from perta_fast.data.chat import parse_date, shown
from perta_fast.data.rows import Row
from perta_fast.data.samples import Sample, by_row
from perta_fast.errors import InputError, names_shown
from perta_fast.files.hashing import hash_files
from perta_fast.importance.addable import Addable
from perta_fast.importance.combining import Combination
from perta_fast.importance.row_digests import FILE_NAME, row_digest
from perta_fast.progress import Bar, Progress
from perta_fast.records.removal import Removal
from perta_fast.records.report import describe_files
from perta_fast.rules import Rule

if TYPE_CHECKING:
    from perta_fast.runs.unlearn_options import Options

PHASE = "retain importance"
_SHOWN = 5  # rows that are named in a message


def check_retained(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Raise InputError if all rows to retain, on which the result would be measured, are to be forgotten."""
    forgotten = set(map(_content, forget))
    if all(_content(row) in forgotten for row in retain):
        raise InputError(
            f"{retain[0].where}: this and all other rows of ‹retain› are to be forgotten, so they do not show what is "
            "kept; give rows that are to be kept, or leave ‹retain› out"
        )


def _content(row: Row) -> str:
    return repr(sorted(row.content.items()))


@dataclass(frozen=True)
class WholeImportance:
    """What ``whole_importance`` names, opened."""

    importance: Addable

    @classmethod
    def open(cls, options: "Options", rule: Rule) -> "WholeImportance | None":
        """None if none is named. Raises InputError if ``rule`` cannot use it, or it was taken at other weights."""
        if options.whole_importance is None:
            return None
        whole = Addable.open(options.whole_importance)
        rule.check_estimator(whole.metadata.estimator, whole.path)
        place = options.model if options.at == "model" else options.base
        if weights_hash(open_plain(place)) != whole.metadata.weights_hash:
            raise InputError(
                f"{whole.path}: was taken at {whole.metadata.evaluated_at}, which had other weights than {place}, "
                f"where this run takes its gradients (‹at› {options.at}); give the same weights, or estimate it again "
                "there"
            )
        return cls(whole)

    def prompts_for(self, options: "Options") -> "Options":
        """``options`` with the prompts that the whole had. Raises InputError if others are given."""
        told = self.importance.metadata.told
        if not told.chat_template:
            return options
        given = options.system_prompt
        if given is not None and given != told.system_prompt:
            had = "none" if told.system_prompt is None else shown(told.system_prompt)
            raise InputError(
                f"{self.importance.path}: had the system prompt {had}, not {shown(given)}; leave ‹system_prompt› out"
            )
        if options.date_string is not None and told.day not in (None, parse_date(options.date_string)):
            raise InputError(
                f"{self.importance.path}: its prompts had the date {told.date}, not {options.date_string}; leave "
                "‹date_string› out"
            )
        return replace(options, system_prompt=told.system_prompt, date_string=options.date_string or told.date_string)

    @property
    def day(self) -> date | None:
        """The date that its prompts had, if the chat template asked for it."""
        return self.importance.metadata.told.day

    def check(self, rows: Sequence[Row], samples: Sequence[Sample], dtype: str) -> None:
        """Raise InputError unless all rows are among the whole's, and the model will run in the same type."""
        metadata, path = self.importance.metadata, self.importance.path
        if dtype != metadata.dtype:
            raise InputError(
                f"{path}: was estimated in {metadata.dtype}, and this run would take its gradients in {dtype}; "
                f"run it with ‹dtype› {metadata.dtype}"
            )
        left, absent = Counter(self.importance.rows.counts), []
        for row, numbers in zip(rows, by_row(samples), strict=True):
            digest = row_digest(samples[k] for k in numbers)
            if not left[digest]:
                absent.append(row.where)
            left[digest] -= 1
        if absent:
            raise InputError(
                f"{path}: {len(absent)} of the {len(rows)} rows to forget are not among its rows "
                f"({names_shown(absent, _SHOWN)}); they are other rows or were removed before, or the tokenizer, the "
                "chat template or ‹max_length› differ"
            )
        if len(rows) == metadata.sample_count:
            raise InputError(
                f"{path}: has no other rows than those to forget, so there is nothing to retain; a rule with "
                "importances needs rows to retain"
            )

    def remove(self, part: Path, out: Path, progress: Progress) -> None:
        """Write the whole's importance without that in ``part`` to ``out``."""
        rest = Combination.rest_of(self.importance, [Addable.open(part)])
        rest.write(out, overwrite=False, progress=progress, description=PHASE)

    def record(self, removed: int, threads: int, progress: Progress) -> Removal:
        """For the report, with the hashes of its files."""
        whole = self.importance
        files = [*whole.checkpoint.files(), whole.path / FILE_NAME]
        with Bar(sum(file.stat().st_size for file in files), "hash the whole importance", progress) as bar:
            described = describe_files(hash_files(files, threads, bar.update), whole.path)
        return Removal(
            whole=described["path"],
            data_hash=whole.metadata.data_hash,
            rows=whole.metadata.sample_count,
            removed=removed,
            files=described["files"],
        )
