"""The model card of an unlearned or merged checkpoint: a section that says what was done, without text of the data."""

from pathlib import Path

from perta_fast.errors import printable
from perta_fast.files.own import own_file
from perta_fast.records.card_metadata import with_metadata
from perta_fast.records.check import Check, CheckedData
from perta_fast.records.report import FILE_NAME, Report, scope_lines

_UNLEARNED, _MERGED = "## Unlearned with perta_fast", "## Merged with perta_fast"
_VERDICT = "Measured on rows of the data before and after."
_RECORD = f"Hashes of all inputs and the change of every tensor are in `{FILE_NAME}`; `perta verify` checks them."


def write_model_card(directory: Path, report: Report) -> None:
    """Append the section to ``README.md`` in ``directory``, or make one; what it says already stays."""
    path = directory / "README.md"
    card, line_end = _read(path) if path.exists() else ("", "\n")
    section = _merged(report) if report.merged else _unlearned(report)
    _write(path, f"{with_metadata(card, directory, report).rstrip()}\n\n{section}", line_end)


def _merged(report: Report) -> str:
    return (
        f"{_MERGED}\n\n"
        f"On {report.started[:10]} an adapter was merged into this model's weights, computed in float32 and rounded "
        f"once to their types. {_RECORD}\n"
    )


def _unlearned(report: Report) -> str:
    settings = f"rule {report.rule_words()}, λ = {report.lam:.10g}"
    if report.rule != "tv":
        settings += f", p = {report.p:g}, α = {report.alpha:g}"
    settings += "".join(f"; {printable(line)}" for line in scope_lines(report.only, report.leave))
    what, source = "rescaled", "per-parameter task arithmetic, arXiv 2601.22030"
    if report.preconditioned is not None:
        what, source = "preconditioned", "SAGE, arXiv 2606.18309"
        settings += f"; {report.preconditioned.line()}"
    return (
        f"{_UNLEARNED}\n\n"
        f"On {report.started[:10]} a {what} task vector was subtracted from this model's weights ({source}): "
        f"{settings}. {_RECORD}\n"
    )


def add_verdict(card: Path, target: Path, check: Check) -> None:
    """Write the model card with what was forgotten and kept, in words and numbers, to ``target``."""
    text, line_end = _read(card)
    rows = [CheckedData.HEAD, ["---"] * len(CheckedData.HEAD), *(data.cells(role) for role, data in check.data.items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    earlier, heading, section = text.rpartition(_UNLEARNED)
    section = section.partition(f"\n\n{_VERDICT}")[0]  # a check that was killed at its end has left one there
    card_now = f"{earlier}{heading}{section.rstrip()}\n\n{_VERDICT} {check.verdict()}\n\n{table}\n"
    _write(target, card_now, line_end)


def _read(path: Path) -> tuple[str, str]:
    """The text, also of bytes that are not UTF-8, and how its lines end; "\\n" stands for that in the text.

    A text whose lines end in different ways is as it is.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    of_dos = "\r\n" in text and text.count("\n") == text.count("\r\n")
    return (text.replace("\r\n", "\n"), "\r\n") if of_dos else (text, "\n")


def _write(path: Path, text: str, line_end: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="", opener=own_file) as file:
        file.write(text.replace("\n", line_end))
