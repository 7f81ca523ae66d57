"""What an unlearned model was before, by its report. It needs no torch."""

from contextlib import suppress
from pathlib import Path

from perta_fast.checkpoints.quantised import open_plain
from perta_fast.errors import InputError
from perta_fast.files.identity import is_same
from perta_fast.records.report import Report


def model_before(directory: Path) -> Path | None:
    """θ_full of the unlearned model in ``directory``, if its report names one that is still there."""
    with suppress(InputError):
        record = Report.load(directory).inputs.get("model")
        if record is not None and record.get("kept", True) and not is_same(record["path"], directory):
            return open_plain(record["path"]).path
    return None
