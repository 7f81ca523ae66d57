"""Check a finished run: hashes again, and tensors again by the reference."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapters import Matrix
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, RunError
from perta_fast.files.hashing import hash_file
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import FILE_NAME, DirectoryRecord, Report, changed_files, gone_files
from perta_fast.records.typed_json import printable
from perta_fast.rules import EXACT_POWERS, Rule
from perta_fast.subtraction.inputs import IMPORTANCES, Sources, open_importances
from perta_fast.subtraction.matching import TensorMatch

SAMPLED = 8  # tensors recomputed unless all are asked for
_CHUNK = 1 << 22  # elements compared at a time


@dataclass
class Verification:
    """What was checked. ``problems`` is empty if everything that could be checked is right.

    files: hashes that agree. recomputed: tensors equal to the reference's, bit for bit (where p is none of
    ``EXACT_POWERS``, up to the last bit of a power). bounded: tensors whose every element lies between theta
    and theta - lam * tau, checked where the importances were not kept. unchecked: what could not be checked,
    and why. changed: data files that are no longer those of the run; as they are only read for importances
    that the report has the hashes of, this says nothing against the output. claim: what the run says of its
    output. tensors: how many the output has. agreement: how closely the recomputed ones agree.
    """

    claim: str = ""
    tensors: int = 0
    agreement: str = "bit for bit"
    files: int = 0
    recomputed: int = 0
    bounded: int = 0
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The outcome in plain sentences."""
        lines = [self._outcome(), f"{self.files} files have the hashes in the report."]
        if self.recomputed:
            lines.append(f"{self.recomputed} tensors equal the reference's result {self.agreement}.")
        if self.bounded:
            lines.append(f"{self.bounded} tensors lie between theta and theta - lambda * tau everywhere.")
        lines += [f"Changed since the run, which is no fault of the output: {line}." for line in self.changed]
        lines += [f"Not checked: {line}." for line in self.unchecked]
        lines += [f"WRONG: {line}." for line in self.problems]
        lines.append("Verification failed." if self.problems else "Nothing wrong was found.")
        return printable("\n".join(lines))

    def _outcome(self) -> str:
        """What a reader who knows no more wants to know."""
        if self.problems:
            return f"Not confirmed, as something is wrong: {self.claim}."
        if self.recomputed + self.bounded == 0:
            return f"Not recomputed: {self.claim}. Only what is listed here was checked."
        if self.bounded:
            return (
                f"Not refuted: {self.claim}. Without the weights, {self.bounded} of {self.tensors} tensors "
                "could only be checked for bounds."
            )
        return (
            f"{self.claim}: {self.files} files and {self.recomputed} of {self.tensors} tensors were checked, "
            f"{self.agreement}."
        )


def verify(directory: str | Path, *, full: bool = False, seed: int = 0, progress: Progress = True) -> Verification:
    """Recompute the hashes of a run's output and inputs, and tensors of its output from the inputs.

    directory: the output of ``apply`` or ``unlearn``. full: recompute every tensor, else ``SAMPLED`` of them
    drawn with ``seed``. Inputs are looked for where they were; what is gone is said to be unchecked. A data
    file that changed is named, but is no problem of the output. After an in-place run theta is gone: then the
    hashes of everything else are checked, and that the headers of the shards are those of the tensors reported.
    progress: as in ``apply``. Raises InputError if there is no report, or one that no run can have written.
    Writes nothing.
    """
    directory = Path(directory)
    report = Report.load(directory)
    unnamed = {"model", "base", "tuned"} - report.inputs.keys()
    if unnamed:
        raise InputError(f"{directory / FILE_NAME}: names no {', '.join(sorted(unnamed))}")
    result = Verification(
        claim=f"{directory} holds what rule {report.rule} with lambda {report.lam:g} gives on the inputs named",
        tensors=len(report.tensors),
    )
    if report.rule != "tv" and report.p not in EXACT_POWERS:
        result.agreement = "up to the last bit of a power"
    # The output may have been moved since.
    places = {"output": DirectoryRecord(path=str(directory), files=report.output["files"])}
    places |= {
        role: found
        for role, found in report.inputs.items()
        # An in-place run changes its model, which may be its base too.
        if found.get("kept", True) and not (report.in_place and found["path"] == report.output["path"])
    }
    intact = _check_hashes(places, result, progress)
    _check_data(report, result)
    if "output" in intact and report.in_place:
        result.unchecked.append("tensors, because the run changed the model in place and its old values are gone")
        result.problems += _header_problems(report, Checkpoint.open(directory))
    elif "output" in intact:
        _check_tensors(directory, report, intact, result, full, seed, progress)
    return result


def _check_hashes(places: dict[str, DirectoryRecord], result: Verification, progress: Progress) -> set[str]:
    """Return the roles whose files are all there and unchanged."""
    intact = set()
    total = sum(row["bytes"] for place in places.values() for row in place["files"].values())
    with Bar(total, "hashes", progress) as bar:
        for role, place in places.items():
            gone = gone_files(place)
            if gone and role != "output":
                result.unchecked.append(f"{role}: {gone[0]} is gone")
                continue
            changed = changed_files(place, bar.update)
            result.files += len(place["files"]) - len(gone) - len(changed)
            wrong = [f"{path} is gone" for path in gone]
            wrong += [f"{path} has changed since the run" for path in changed]
            result.problems += wrong
            if not wrong:
                intact.add(role)
    return intact


def _check_data(report: Report, result: Verification) -> None:
    for role, found in report.data.items():
        path = Path(found["path"])
        if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises for impossible names)
            result.unchecked.append(f"{role} data: {path} is gone")
            continue
        try:
            same = hash_file(path) == found["blake3"]
        except RunError as error:
            result.unchecked.append(f"{role} data: {error}")
            continue
        if same:
            result.files += 1
        else:
            result.changed.append(f"{role} data {path}")


def _header_problems(report: Report, output: Checkpoint) -> list[str]:
    """Where the shards do not hold the tensors that the report lists."""
    problems = [
        f"{shard.path} is not in the report"
        for name, shard in output.shards.items()
        if name not in report.output["files"]
    ]
    listed = {row.name: (row.dtype, row.shape) for row in report.tensors}
    found = {name: (entry.dtype, list(entry.shape)) for name, entry in output.tensors.items()}
    names = sorted(listed.keys() | found.keys())
    return problems + [
        f"tensor {name} is not of the type and shape in the report"
        for name in names
        if listed.get(name) != found.get(name)
    ]


def _check_tensors(
    directory: Path, report: Report, intact: set[str], result: Verification, full: bool, seed: int, progress: Progress
) -> None:
    absent = {"model", "base", "tuned"} - intact
    if absent:
        result.unchecked.append(f"tensors, because of {', '.join(sorted(absent))}")
        return
    try:
        rule = report.chosen_rule()
    except InputError as error:
        raise InputError(f"{directory / FILE_NAME}: {error}") from error
    exact = rule.estimator is None or set(IMPORTANCES) <= intact
    places = {role: Path(found["path"]) for role, found in report.inputs.items()}
    pair = [places.get(role) for role in IMPORTANCES]
    importances = open_importances(rule, *pair) if exact else {}
    sources = Sources.open(places["model"], places["base"], places["tuned"], importances)
    if not exact:
        result.unchecked.append("weights, because the importances were not kept (--save-importance)")
    output = Checkpoint.open(directory)
    problems = _layout_problems(report, sources, output)
    if problems:
        result.problems += problems
        return
    actions = {row.name: row.action for row in report.tensors}
    matches = sources.matches
    if not full and len(matches) > SAMPLED:
        matches = random.Random(seed).sample(matches, SAMPLED)
    with Bar(sum(match.theta.size for match in matches), "tensors", progress) as bar:
        for match in matches:
            # Without the importances, only the report says which tensors they did not cover.
            said = actions.get(match.theta.name, "")
            copied = match.copied is not None or (not exact and said.startswith("copied"))
            if not _tensor_is_right(match, sources, output, rule, exact, copied):
                result.problems.append(f"tensor {match.theta.name} is not what the inputs give")
            elif exact or copied:
                result.recomputed += 1
            else:
                result.bounded += 1
            bar.update(match.theta.size)


def _layout_problems(report: Report, sources: Sources, output: Checkpoint) -> list[str]:
    """Shards that the report does not list, or that are not laid out as the model's."""
    listed = {"output": report.output, **report.inputs}
    problems = []
    for role, checkpoint in {"output": output, **sources.named()}.items():
        if role == "base" and not sources.base_is_read:
            continue
        for name, shard in checkpoint.shards.items():
            if name not in listed[role]["files"]:
                problems.append(f"{shard.path} is not in the report")
    for name, shard in sources.model.shards.items():
        if name not in output.shards or output.shards[name].header != shard.header:
            problems.append(f"{output.path / name} is not laid out as {shard.path}")
    return problems


def _tensor_is_right(
    match: TensorMatch, sources: Sources, output: Checkpoint, rule: Rule, exact: bool, copied: bool
) -> bool:
    found = output.tensors[match.theta.name]
    factors = None if copied or match.low_rank is None else match.low_rank.factors()
    for begin in range(0, match.theta.count, _CHUNK):
        count = min(_CHUNK, match.theta.count - begin)
        if copied:
            same = _bytes(output, found, begin, count) == _bytes(sources.model, match.theta, begin, count)
        else:
            same = _chunk_is_right(match, factors, sources, output, found, rule, exact, begin, count)
        if not same:
            return False
    return True


def _chunk_is_right(
    match: TensorMatch,
    factors: tuple[Matrix, Matrix] | None,
    sources: Sources,
    output: Checkpoint,
    found: TensorEntry,
    rule: Rule,
    exact: bool,
    begin: int,
    count: int,
) -> bool:
    import torch

    from perta_fast.ops import reference

    arrays: list[Any] = [None] * 5
    for number, checkpoint, entry in sources.operands(match):
        arrays[number] = checkpoint.elements(entry, begin, count)
    theta, tuned, base, forget, retain = arrays
    if match.low_rank is None or factors is None:
        task_vector = tuned.float() - base.float()
    else:
        task_vector = _low_rank_chunk(factors, match.low_rank.scale, begin, count)
    # Without importances this is the whole step, w = 1: the far end of where the result may lie.
    expected = reference.subtract(theta, task_vector, forget, retain, rule.rescaling)
    actual = output.elements(found, begin, count)
    if exact and (forget is None or rule.rescaling.p in EXACT_POWERS):
        return bool(torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)))
    if exact:  # another power's last bit may differ, and then the step's, and the result's
        slack = 4 * torch.finfo(torch.float32).eps * abs(rule.rescaling.lam) * task_vector.abs()
        slack += torch.finfo(theta.dtype).eps * expected.float().abs()
        return bool(((actual.float() - expected.float()).abs() <= slack).all())
    low, high = torch.minimum(theta, expected), torch.maximum(theta, expected)
    return bool(((low <= actual) & (actual <= high)).all())


def _low_rank_chunk(factors: tuple[Matrix, Matrix], scale: float, begin: int, count: int) -> Any:
    """Elements of a task vector given by its factors, from the rows that they lie in."""
    import torch

    from perta_fast.ops import reference

    left, right = map(torch.from_numpy, factors)
    columns = right.shape[1]
    first, end = begin // columns, -(-(begin + count) // columns)
    rows = reference.low_rank_task_vector(left[first:end], right, scale)
    return rows.view(-1)[begin - first * columns :][:count]


def _bytes(checkpoint: Checkpoint, entry: TensorEntry, begin: int, count: int) -> bytes:
    width = ITEM_SIZES[entry.dtype]
    start = entry.begin + begin * width
    return checkpoint.file_of(entry).data[start : start + count * width].tobytes()
