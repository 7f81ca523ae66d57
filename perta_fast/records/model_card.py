"""The model card of an unlearned checkpoint: a section that says what was done, without any text of the data."""

from pathlib import Path

from perta_fast.errors import printable
from perta_fast.files.own import own_file
from perta_fast.records.report import FILE_NAME, Report, scope_lines

_HEADING = "## Unlearned with perta_fast"


def write_model_card(directory: Path, report: Report) -> None:
    """Append the section to ``README.md`` in ``directory``, or make one; an earlier section stays."""
    path = directory / "README.md"
    # Bytes that are not UTF-8 are kept as they are.
    card = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    settings = f"rule `{report.rule}`, λ = {report.lam:.10g}"
    if report.rule != "tv":
        settings += f", p = {report.p:g}, α = {report.alpha:g}"
    settings += "".join(f"; {printable(line)}" for line in scope_lines(report.only, report.leave))
    what, source = "rescaled", "per-parameter task arithmetic, arXiv 2601.22030"
    if report.preconditioned is not None:
        what, source = "preconditioned", "SAGE, arXiv 2606.18309"
        settings += f"; {report.preconditioned.line()}"
    section = (
        f"{_HEADING}\n\n"
        f"On {report.started[:10]} a {what} task vector was subtracted from this model's weights ({source}): "
        f"{settings}. "
        f"Hashes of all inputs and the change of every tensor are in `{FILE_NAME}`; "
        "`perta verify` checks them.\n"
    )
    before = card.rstrip() + "\n\n" if card.strip() else ""
    _write(path, before + section)


def add_verdict(card: Path, target: Path, verdict: str) -> None:
    """Write the model card with one more paragraph, what was forgotten and kept, to ``target``."""
    text = card.read_text(encoding="utf-8", errors="surrogateescape")
    _write(target, f"{text.rstrip()}\n\nMeasured on rows of the data before and after. {verdict}\n")


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", opener=own_file) as file:
        file.write(text)
