"""The check of ``unlearn``: what theta_full and theta_out say to both data sets, from one forward pass over each row.

A few rows of each data set are measured, evenly spread. An answer is exact if each of its tokens is the likeliest after
those before it, which is when greedy decoding gives it. The check never makes a run fail: if it cannot measure, the
report says why. Torch is imported only where something is measured.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.data.chat import ChatSettings
from perta_fast.data.forms import fields_text
from perta_fast.data.given import is_given
from perta_fast.data.rows import Row
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import shell_command
from perta_fast.files.identity import is_same
from perta_fast.progress import LOGGER
from perta_fast.records.check import Check, CheckedData
from perta_fast.records.report import Report
from perta_fast.runs.check_result import PHASE, finish_check, reason_of_failure
from perta_fast.runs.checked_rows import ROLES, Checkpoints, Rows, has_answer, load_checked

if TYPE_CHECKING:
    from perta_fast.models.loading import Subject

_PROBED = 8  # rows of each data set that are measured with base and tuned
_STREAMED = "the run was streamed, as the model may not fit in memory"


@dataclass
class Checking:
    """The check of a run that is going on. rows: None if nothing is to be measured in this process."""

    check: Check
    checkpoints: Checkpoints
    rows: Rows | None
    ranks: Ranks
    seconds: float = 0.0

    @classmethod
    def of(cls, options: Any, rows: Mapping[str, Sequence[Row]], day: date, ranks: Ranks) -> "Checking | None":
        """None unless a check was asked for and there is data of both roles. options: named as those of ``unlearn``."""
        if not options.check or set(rows) != set(ROLES):
            return None
        out = options.model if options.in_place else options.out
        check = Check.begun(eval_command(out, options), _STREAMED if options.stream else "")
        checkpoints = Checkpoints(
            model=Path(options.model),
            base=Path(options.base),
            tuned=Path(options.tuned),
            common_rows=options.common_rows,
            device=options.device,
            dtype=options.dtype,
        )
        measured = None
        if ranks.first and not options.stream:
            measured = Rows.of(
                rows,
                chat=ChatSettings.of(options.system_prompt, options.date_string, day),
                max_length=options.max_length,
                batch_size=options.batch_size,
                progress=options.progress,
            )
        return cls(check, checkpoints, measured, ranks)

    def look(self, subject: "Subject", path: str | Path) -> None:
        """Measure what the loaded checkpoint ``path`` can tell; a base is turned into theta_f."""
        with self.ranks.together(PHASE), self._explained():
            self._look(subject, path)

    def before(self) -> None:
        """Load and measure, one after the other, what ``look`` has not seen."""
        with self.ranks.together(PHASE), self._explained():
            for path in (self.checkpoints.model, self.checkpoints.base):
                if self.rows is not None and not self._has_seen(path):
                    self._look(load_checked(path, self.checkpoints), path)

    def annotate(self, report: Report) -> None:
        """Put into the report what is known before the subtraction."""
        report.check = self.check
        for warning in self.check.early_warnings():
            report.warn(warning)

    def finish(self, report: Report) -> Report:
        """Measure the result, which is complete, and write its report again."""
        return finish_check(report, Path(report.output["path"]), self.checkpoints, self.rows, self.ranks, self.seconds)

    def _has_seen(self, path: Path) -> bool:
        seen = bool(self.check.data) or not is_same(path, self.checkpoints.model)
        return seen and (bool(self.check.base) or not is_same(path, self.checkpoints.base))

    def _look(self, subject: "Subject", path: str | Path) -> None:
        if self.rows is None or self.check.left_out:
            return
        if is_same(path, self.checkpoints.model):
            self.check.data = {role: self._begun(subject, role) for role in ROLES}
        if is_same(path, self.checkpoints.base):
            self.check.base = self._probed(subject, "base")
            with suppress(Exception):  # an exchange is then told by the result
                _tune_(subject, self.checkpoints)
                self.check.tuned = self._probed(subject, "tuned")

    def _begun(self, subject: "Subject", role: str) -> CheckedData:
        assert self.rows is not None
        rows = self.rows.by_role[role]
        answers = sum(map(has_answer, rows))
        before = self.rows.measure(subject, role, "before")
        return CheckedData(len(rows), self.rows.totals[role], answers, before, None)

    def _probed(self, subject: "Subject", name: str) -> dict[str, float | None]:
        assert self.rows is not None
        return {role: self.rows.measure(subject, role, name, _PROBED).loss for role in ROLES}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.check.left_out = reason_of_failure(error)
        self.seconds += time.perf_counter() - started


def eval_command(out: str | Path, options: Any) -> str:
    """What measures both data sets on the output with all rows, in the memory that the run had."""
    words: list[str | Path] = ["perta", "eval", "--model", Path(os.path.abspath(out))]
    for role in ROLES:
        source = getattr(options, role)
        words += [f"--{role}", f"{role.upper()}.jsonl" if is_given(source) else Path(os.path.abspath(source))]
    if options.fields is not None:
        words += ["--fields", fields_text(options.fields)]
    for name in ("max_length", "system_prompt", "date_string"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.stream:
        words.append("--stream")
        for name in ("memory", "device_memory"):
            if (limit := getattr(options, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(limit)]
    return shell_command(*words)


def _tune_(subject: "Subject", checkpoints: Checkpoints) -> None:
    """Turn a loaded base into theta_f, by adding the task vector: no second model is loaded."""
    from perta_fast.subtraction.on_module import apply_to_module_

    LOGGER.addFilter(_no_record)  # a strength below 0 is warned of, and here it is meant
    try:
        apply_to_module_(
            subject.module,
            checkpoints.base,
            checkpoints.tuned,
            rule="tv",
            lam=-1.0,
            common_rows=checkpoints.common_rows,
            allow_zero=True,
        )
    finally:
        LOGGER.removeFilter(_no_record)


def _no_record(_: Any) -> bool:
    return False
