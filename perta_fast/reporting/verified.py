"""Whether what lies on the disk now is what a run has written: ``perta verify``, for a page."""

from dataclasses import dataclass, field
from pathlib import Path

from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.hashing import hash_file
from perta_fast.files.reading import exists
from perta_fast.progress import Progress
from perta_fast.records.file_hashes import HASHES
from perta_fast.records.versions import now
from perta_fast.runs.verification import Verification
from perta_fast.runs.verify import verify

_LISTED = 6  # lines of one kind


@dataclass(frozen=True)
class Verified:
    """head: the outcome in a word or three. tone: ``good``, ``bad`` or ``open``, for what was not looked at.

    sentences: what was checked, when and how. problems, limits: what is wrong, and what was not or cannot be checked.
    """

    head: str
    tone: str
    sentences: list[str]
    problems: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def not_asked(run: Path) -> Verified:
    """For a page without a check of files (--no-verify)."""
    return Verified(
        "Not verified", "open", [f"No file was hashed for this page. {shell_command('perta', 'verify', run)} does it."]
    )


def verify_for_page(run: Path, progress: Progress) -> Verified:
    """Hash all files of a run, and compute a few tensors again. What cannot be checked is a limit, never an error."""
    when = f"When this page was made, on {in_words(now())},"
    try:
        found = verify(run, progress=progress)
        sentences = [f"{when} {_counts(found)}."]
        if exists(run / HASHES) and not found.problems:
            sentences.append(
                f"The list of the result's files, {HASHES}, has the BLAKE3 hash {hash_file(run / HASHES)}: whoever "
                "has that list and this page can check every file."
            )
    except (InputError, RunError) as error:
        return Verified("Not verified", "bad", [f"{when} it could not be checked: {error!s}."])
    problems = _shortened([f"{line}." for line in found.problems])
    limits = [f"Changed since the run, which is no fault of the result: {line}." for line in found.changed]
    limits += [f"Not checked: {line}." for line in found.unchecked]
    limits += [f"Not covered by the run's hashes: {line}." for line in found.uncovered]
    if problems:
        return Verified("Not as the run left it", "bad", sentences, problems, _shortened(limits))
    head = "Verified" if found.recomputed else "Hashes agree"
    return Verified(head, "good", sentences, [], _shortened(limits))


def _counts(found: Verification) -> str:
    """What was counted, as the end of a sentence."""
    files = found.files + found.companions
    counted = f"{files} files had exactly the content that the run has recorded"
    if found.recomputed:
        counted += f"; {found.recomputed} of {found.tensors} tensors, computed again from the inputs, agreed "
        counted += found.agreement
    if found.bounded:
        counted += f"; {found.bounded} of {found.tensors} tensors lay between the model and a full subtraction"
    return counted


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - _LISTED
    return lines if rest <= 0 else [*lines[:_LISTED], f"{rest} more; perta verify lists all."]


def in_words(time: str) -> str:
    """A time of a record, such as 2026-01-31T12:00:00+00:00, for a person."""
    return time.replace("T", " ").replace("+00:00", " UTC")
