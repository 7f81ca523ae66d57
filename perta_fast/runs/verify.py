"""Check a finished run: hashes again, and tensors again by the reference."""

import os
from collections.abc import Collection
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD, TEMPLATES, elsewhere, files_of, is_read, other_weights
from perta_fast.data.formats import data_files, hash_data
from perta_fast.data.given import IN_WORDS
from perta_fast.errors import InputError, RunError, names_shown
from perta_fast.files.hashing import hash_file
from perta_fast.files.own import is_own_name
from perta_fast.files.reading import exists
from perta_fast.progress import Bar, Progress
from perta_fast.records.file_hashes import HASHES, read_hashes
from perta_fast.records.report import FILE_NAME, DirectoryRecord, Report, changed_files, gone_files
from perta_fast.rules import EXACT_POWERS
from perta_fast.runs.recomputed_tensors import RecomputedTensors
from perta_fast.runs.verification import Verification


def verify(directory: str | Path, *, full: bool = False, seed: int = 0, progress: Progress = True) -> Verification:
    """Recompute the hashes of a run's output and inputs, and tensors of its output from the inputs.

    directory: the output of ``apply`` or ``unlearn``. full: recompute every tensor, else eight of them drawn with
    ``seed``. Inputs are looked for where they were; what is gone is listed as unchecked. After an in-place run theta is
    gone: then the hashes of everything else are checked, and whether the headers of the shards agree with the report.
    progress: as in ``apply``. Raises InputError if there is no report, or one that no run can have written. Writes
    nothing.
    """
    directory = Path(directory)
    report = Report.load(directory)
    unnamed = {"model", "base", "tuned"} - report.inputs.keys()
    if unnamed:
        raise InputError(f"{directory / FILE_NAME}: names no {', '.join(sorted(unnamed))}")
    result = Verification(
        claim=f"{directory} holds {_what(report)} on the inputs named",
        tensors=len(report.tensors),
        prompts=report.prompts(),
    )
    if report.rule != "tv" and report.p not in EXACT_POWERS:
        result.agreement = "up to the last bit of a power"
    # The output may have been moved since.
    directories = {"output": DirectoryRecord(path=str(directory), files=report.output["files"])}
    directories |= {
        role: record
        for role, record in report.inputs.items()
        # An in-place run changes its model, which may be its base too.
        if record.get("kept", True) and not (report.in_place and record["path"] == report.output["path"])
    }
    result.unchecked += [
        f"config and tokenizer of {record['path']}, where an importance was taken: no model was there to hash"
        for role, record in directories.items()
        if role.endswith("_evaluated_at") and not record["files"]
    ]
    intact = _check_hashes(directories, result, progress)
    _check_data(report, result)
    if any(name.endswith(".index.json") for name in _check_companions(directory, report, result)):
        intact.discard("output")  # an index that was changed may not be one any more
    if "output" in intact and (others := other_weights(Checkpoint.open(directory))):
        result.unchecked.append(f"other weights beside the shards, which the run did not change: {names_shown(others)}")
    if "output" in intact and report.in_place:
        result.unchecked.append("tensors, because the run changed the model in place and its old values are gone")
        result.problems += _header_problems(report, Checkpoint.open(directory))
    elif "output" in intact:
        checked = RecomputedTensors.opened(directory, report, intact, result)
        if checked is not None:
            checked.check(result, full, seed, progress)
    return result


def _what(report: Report) -> str:
    if report.merged:
        return "what the base with its adapter gives"
    return f"what rule {report.rule_words()} and lambda {report.lam:.10g} give"


def _check_hashes(directories: dict[str, DirectoryRecord], result: Verification, progress: Progress) -> set[str]:
    """Return the roles whose files are all there and unchanged."""
    intact = set()
    total = sum(file["bytes"] for record in directories.values() for file in record["files"].values())
    with Bar(total, "hashes", progress) as bar:
        for role, record in directories.items():
            gone = [path for path in gone_files(record) if path.name != CARD or role == "output"]
            if gone and role != "output":
                result.unchecked.append(f"{role}: {gone[0]} is gone")
                continue
            changed = changed_files(record, bar.update)
            result.files += len(record["files"]) - len(gone) - len(changed)
            result.problems += [f"{path} is gone" for path in gone]
            cards = [path for path in changed if path.name == CARD and role != "output"]
            result.changed += [f"{role} file {path}" for path in cards]
            result.problems += [f"{path} has changed since the run" for path in changed if path not in cards]
            if not gone and changed == cards:
                intact.add(role)
    return intact


def _check_companions(directory: Path, report: Report, result: Verification) -> list[str]:
    """Compare the files beside the shards with the list that the run wrote, and look for what was added.

    Returns the names of the listed files that are wrong.
    """
    if report.file_list and not exists(directory / HASHES):
        result.problems.append(f"{directory / HASHES} is gone")
        return []
    if not exists(directory / HASHES):
        beside = "config, tokenizer, model card and report of the output"
        result.uncovered.append(f"{beside}, because {HASHES} is not there; earlier versions wrote none")
        return []
    try:
        hashes = read_hashes(directory)
    except InputError as error:
        result.problems.append(str(error))
        return []
    shards = {name: record["blake3"] for name, record in report.output["files"].items()}  # checked already
    result.problems += [f"{directory / HASHES} lacks {name}" for name in shards if name not in hashes]
    wrong = []
    for name, digest in hashes.items():
        path = directory / name
        problem = ""
        try:
            if shards.get(name, digest) != digest:
                problem = f"{path} has another hash in the report than in {HASHES}"
            elif name not in shards and not exists(path):
                problem = f"{path} is gone"
            elif name not in shards and hash_file(path) != digest:
                problem = f"{path} has changed since the run"
            else:
                result.companions += name not in shards
        except RunError as error:
            problem = str(error)
        if problem:
            wrong.append(name)
            result.problems.append(problem)
            result.card += [problem] if name == CARD else []
    copied = report.inputs["model"]["files"]  # a link that led out of the model may have been copied by hand
    for name, path in files_of(directory).items():
        if name not in hashes and name not in shards and name != HASHES:
            if name in copied and hash_file(path) == copied[name]["blake3"]:
                result.companions += 1
            elif is_read(name):
                result.problems.append(f"{path} was added after the run")
            else:
                result.uncovered.append(f"{path}, which was added after the run")
    _name_the_rest(directory, [*hashes, *shards], report, result)
    return wrong


def _name_the_rest(directory: Path, names: Collection[str], report: Report, result: Verification) -> None:
    """Name what no hash covers: hidden files, directories, links that lead nowhere, and ``names`` that became links."""
    seen = {*files_of(directory), TEMPLATES}
    others = [path for path in sorted(directory.iterdir()) if path.name not in seen and not is_own_name(path.name)]
    if others:
        result.uncovered.append(names_shown([str(path) for path in others]))
    for name in () if report.in_place else sorted(set(names)):  # a model that is changed in place may have links
        target = elsewhere(directory / name) if (directory / name).is_symlink() else None
        if target is not None:
            result.uncovered.append(f"{directory / name} has become a link to {target}; what is there now was checked")


def _check_data(report: Report, result: Verification) -> None:
    for role, record in report.data.items():
        path = Path(record["path"])
        try:
            if not record["path"]:
                result.unchecked.append(f"{role} data: {IN_WORDS}, which are not kept")
            elif not all(map(os.path.isfile, data_files(path))):  # Path.is_file raises for impossible names
                result.unchecked.append(f"{role} data: {path} is gone")
            elif hash_data(path) == record["blake3"]:
                result.files += 1
            else:
                result.changed.append(f"{role} data {path}")
        except (InputError, RunError) as error:
            result.unchecked.append(f"{role} data: {error!s}")


def _header_problems(report: Report, output: Checkpoint) -> list[str]:
    """Where the shards do not hold the tensors that the report lists."""
    problems = [
        f"{shard.path} is not in the report"
        for name, shard in output.shards.items()
        if name not in report.output["files"]
    ]
    listed = {row.name: (row.dtype, row.shape) for row in report.tensors}
    stored = {name: (entry.dtype, list(entry.shape)) for name, entry in output.tensors.items()}
    return problems + [
        f"tensor {name} is not of the type and shape in the report"
        for name in sorted(listed.keys() | stored.keys())
        if listed.get(name) != stored.get(name)
    ]
