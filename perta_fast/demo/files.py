"""Where a demo keeps its files."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from perta_fast.demo.authors import Row
from perta_fast.files.apart import check_name
from perta_fast.files.new_directory import check_free, check_unfinished
from perta_fast.rules import PRECONDITIONED


class Files:
    """The files of a demo below ``directory``; checkpoints are in float32.

    base: theta_0, trained on the other authors alone. full, tuned, gold: theta_0 tuned on forget and retain data
    (theta_full), on forget data (theta_f), on retain data (the goal of unlearning). preconditioned: made of theta_f.
    results: the table and its numbers.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base, self.full, self.tuned, self.gold, self.preconditioned, self.results = (
            directory / name for name in ("base", "full", "tuned", "gold", "preconditioned", "demo.json")
        )

    def theta_f(self, rule: str) -> Path:
        """What a rule subtracts."""
        return self.preconditioned if rule == PRECONDITIONED else self.tuned

    def questions(self, split: str) -> Path:
        """The JSON lines of one split."""
        return self.directory / f"{split}.jsonl"

    def importance(self, estimator: str) -> Path:
        """Both importances by one estimator, as ``forget`` and ``retain``."""
        return self.directory / "importance" / estimator

    def unlearned(self, rule: str, lam: float) -> Path:
        """The result of one rule at one strength."""
        return self.directory / "unlearned" / f"{rule}-{lam:g}"

    def write_questions(self, splits: Mapping[str, Sequence[Row]]) -> None:
        """Write every split as JSON lines."""
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            self.questions(split).write_text(lines, encoding="utf-8")


@contextmanager
def work_directory(out: Path | None) -> Iterator[Path]:
    """``out``, which is removed if the work fails; or a temporary directory, which is always removed.

    Raises InputError if ``out`` exists and is not an empty directory.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="perta-demo-") as temporary:
            yield Path(temporary)
        return
    check_name(out)
    instead = "choose another directory"
    check_free(out, overwrite=False, inputs=[], instead=instead)
    check_unfinished(out, overwrite=False, instead=instead)
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    except BaseException:  # an interrupt too
        shutil.rmtree(out, ignore_errors=True)
        raise
