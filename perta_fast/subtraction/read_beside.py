"""The files beside the weights that a run depends on: recorded when it begins, and compared when it is resumed."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from perta_fast.checkpoints.companions import CARD, CONFIG, companions
from perta_fast.checkpoints.weight_files import is_weights
from perta_fast.errors import InputError
from perta_fast.files.hashing import hash_file
from perta_fast.files.identity import is_same
from perta_fast.files.reading import checked_path, exists
from perta_fast.records.file_record import FileRecord
from perta_fast.records.report import Report
from perta_fast.subtraction.inputs import Sources

NONE: Mapping[str, Path] = MappingProxyType({})
Records = dict[str, dict[str, FileRecord]]  # by role and name
_CHECKPOINTS = ("model", "base", "tuned")


def read_beside(
    sources: Sources, places: Mapping[str, str], at: str | None = None, set_aside: Mapping[str, Path] = NONE
) -> dict[str, dict[str, Path]]:
    """The files beside the weights, by role and name.

    All files of the model, as they are copied; what is read with the weights of the checkpoints where importances are
    taken, for its tokens, also if that is none of the three; the config of the others; and every index.

    places: where each importance was taken (``taken_at``). at: the role of the checkpoint where the run takes its own.
    set_aside: files of the model, by name, that a run in place has moved, and where they lie.
    """
    beside = {}
    for role, checkpoint in sources.named().items():
        moved = set_aside if role in _CHECKPOINTS and is_same(checkpoint.path, sources.model.path) else NONE
        files = {name: file for name, file in moved.items() if os.path.isfile(file)}  # noqa: PTH113  (as in companions)
        if checkpoint.index is not None and not moved.keys() - {CONFIG}:
            files[checkpoint.index.name] = checkpoint.index
        always = files.keys() | {CONFIG}
        tokens = role == at or any(is_same(place, checkpoint.path) for place in _directories(places).values())
        if role == "base" and not (tokens or sources.base_is_read):
            files = {}
        elif role in _CHECKPOINTS:
            files = companions(checkpoint.path) | files
            if role != "model":
                files = {name: file for name, file in files.items() if name != CARD and (tokens or name in always)}
        beside[role] = files
    return beside | {role: _files_of_checkpoint(path) for role, path in taken_elsewhere(sources, places).items()}


def taken_elsewhere(sources: Sources, places: Mapping[str, str]) -> dict[str, Path]:
    """The directories where importances were taken that are none of the three checkpoints, by their roles."""
    found: dict[str, Path] = {}
    for role, path in _directories(places).items():
        known = [checkpoint.path for checkpoint in sources.named().values()] + list(found.values())
        if not any(is_same(path, other) for other in known):
            found[_role_of_place(role)] = path
    return found


def _role_of_place(importance: str) -> str:
    return importance.replace("importance", "evaluated_at")


def _directories(places: Mapping[str, str]) -> dict[str, Path]:
    """Only absolute paths: an importance may say that it was taken at a live module, or, made elsewhere, anything."""
    found = {}
    for role, text in places.items():
        try:
            path = checked_path(text)
        except InputError:
            continue
        if path.is_absolute():
            found[role] = path
    return found


def _files_of_checkpoint(path: Path) -> dict[str, Path]:
    """What lies beside the weights; nothing of a directory that is no checkpoint, whatever an importance says."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return {}
    if CONFIG not in names or not any(map(is_weights, names)):
        return {}
    return {name: file for name, file in companions(path).items() if name != CARD and os.access(file, os.R_OK)}


def companion_records(sources: Sources, report: Report, set_aside: Mapping[str, Path] = NONE) -> Records:
    """Size and hash of the files that ``read_beside`` names, for the run of ``report``."""
    beside = read_beside(sources, taken_at(report), report.settings.get("at"), set_aside)
    return {
        role: {name: FileRecord(bytes=file.stat().st_size, blake3=hash_file(file)) for name, file in files.items()}
        for role, files in beside.items()
    }


def taken_at(report: Report) -> dict[str, str]:
    """Where each importance was taken, as it says."""
    return {role: record["evaluated_at"] for role, record in report.importance.items()}


def check_unchanged(before: Records, now: Records, directories: Mapping[str, str], report: Report) -> None:
    """Raise InputError, naming it and what to do, if a file is not what it was when the run began.

    directories: of the inputs. A directory that is gone can only be one where an importance was taken: nothing more is
    read there.
    """
    places = {_role_of_place(role): place for role, place in taken_at(report).items()} | {**directories}
    for role, records in before.items():
        if role not in places:
            raise InputError(f"the description of the run is damaged: it names files of {role}, which is no input")
        directory, present = Path(places[role]), now.get(role, {})
        for name in sorted(records.keys() | present.keys()) if exists(directory) else ():
            path = directory / name
            if name not in records:
                raise InputError(f"{path}: was not there when the run began; move it away to finish the run")
            if records[name] != present.get(name):
                what = "has changed" if name in present else "is gone"
                raise InputError(f"{path}: {what} since the run began; put the old file back to finish the run")
