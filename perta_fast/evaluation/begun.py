"""What a stopped evaluation was begun with, kept on disk with its finished parts, so that it can go on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.fingerprint import check_inputs
from perta_fast.data.chat import today
from perta_fast.errors import InputError
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.request import Request
from perta_fast.files.kept_parts import kept_record
from perta_fast.files.new_directory import unfinished_advice
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import check_versions, installed_versions

_FORMAT, _FORMAT_VERSION = "perta-evaluation", 2


@dataclass(frozen=True)
class Begun:
    """What a stopped evaluation was begun with. inputs: ``Request.state_of_inputs``. versions: of what computes.

    day: when it began, for chat templates that ask for the date, as 2025-04-10. overwrite: whether it may
    replace the file that is there.
    """

    request: Request
    inputs: dict[str, Any]
    versions: dict[str, str]
    started: str
    day: str
    overwrite: bool

    @classmethod
    def now(cls, request: Request, table: MetricTable, started: str, overwrite: bool) -> "Begun":
        """That of an evaluation which begins."""
        inputs = request.state_of_inputs(table)
        return cls(request, inputs, installed_versions(), started, today().isoformat(), overwrite)

    def record(self) -> dict[str, Any]:
        """As it is written to the disk."""
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, final: Path) -> "Begun | None":
        """That of the stopped evaluation to ``final``, if there is one. Raises InputError if it is damaged."""
        content = kept_record(final)
        if content is None:
            return None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise InputError(f"{final}: its unfinished work is no evaluation's; start over with ‹overwrite›")
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise InputError(f"{final}: was begun by another version of perta_fast; start over with ‹overwrite›")
        try:
            begun: Begun = typed(content, cls)
        except InputError as error:
            raise InputError(
                f"{final}: was begun by another version of perta_fast ({error}); start over with ‹overwrite›"
            ) from error
        return begun

    def check_same(self, final: Path, other: "Begun") -> None:
        """Raise InputError unless ``other`` is the same evaluation of the same inputs, by the same versions."""
        if self.request != other.request:
            raise InputError(unfinished_advice(final))
        check_inputs(self.inputs, other.inputs, "evaluation")
        check_versions(self.versions, other.versions, "evaluation", final)
