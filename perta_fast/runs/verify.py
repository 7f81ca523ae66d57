"""Check a finished run: hashes again, and tensors again by the reference."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD, files_of, is_read, other_weights
from perta_fast.checkpoints.low_rank import Matrix
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, RunError, printable_lines
from perta_fast.files.hashing import hash_file
from perta_fast.files.reading import exists
from perta_fast.progress import Bar, Progress
from perta_fast.records.file_hashes import HASHES, read_hashes
from perta_fast.records.report import FILE_NAME, DirectoryRecord, Report, changed_files, gone_files, listed
from perta_fast.rules import EXACT_POWERS, Rule
from perta_fast.subtraction.inputs import IMPORTANCES, Sources, open_importances
from perta_fast.subtraction.matching import TensorMatch

SAMPLED = 8  # tensors recomputed unless all are asked for
_CHUNK = 1 << 22  # elements compared at a time


@dataclass
class Verification:
    """What was checked. ``problems`` is empty if everything that could be checked is right.

    files: number of hashes that agree with the report. companions: files beside the shards whose hashes agree with
    ``perta_files.b3``. recomputed: tensors equal to the reference's, bit for bit (if p is not one of
    ``EXACT_POWERS``, up to the last bit of a power). bounded: tensors whose elements all lie between theta and
    theta - lam * tau, which is checked if the importances were not kept. unchecked: what could not be checked, and why.
    changed: data files and model cards of inputs that have changed since the run, which says nothing against the
    output. uncovered: files of which the run kept no hash. claim: what the run says of its output. tensors: number of
    tensors of the output. agreement: how closely the recomputed ones agree.
    """

    claim: str = ""
    tensors: int = 0
    agreement: str = "bit for bit"
    files: int = 0
    companions: int = 0
    recomputed: int = 0
    bounded: int = 0
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The outcome in plain sentences."""
        lines = [self._outcome(), f"{self.files} files have the hashes in the report."]
        if self.companions:
            lines.append(f"{self.companions} files beside the shards, with the report, have the hashes in {HASHES}.")
        if self.recomputed:
            lines.append(f"{self.recomputed} tensors equal the reference's result {self.agreement}.")
        if self.bounded:
            lines.append(f"{self.bounded} tensors lie between theta and theta - lambda * tau everywhere.")
        lines += [f"Changed since the run, which is no fault of the output: {line}." for line in self.changed]
        lines += [f"Not checked: {line}." for line in self.unchecked]
        lines += [f"Not covered by the run's hashes: {line}." for line in self.uncovered]
        lines += [f"WRONG: {line}." for line in self.problems]
        lines.append("Verification failed." if self.problems else "Nothing wrong was found.")
        return printable_lines(lines)

    def _outcome(self) -> str:
        """The result in one sentence."""
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

    directory: the output of ``apply`` or ``unlearn``. full: recompute every tensor, else ``SAMPLED`` of them drawn with
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
        claim=f"{directory} holds what rule {report.rule} with lambda {report.lam:g} gives on the inputs named",
        tensors=len(report.tensors),
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
    intact = _check_hashes(directories, result, progress)
    _check_data(report, result)
    if "output" in intact and (others := other_weights(Checkpoint.open(directory))):
        result.unchecked.append(f"other weights beside the shards, which the run did not change: {listed(others)}")
    _check_companions(directory, report, result)
    if "output" in intact and report.in_place:
        result.unchecked.append("tensors, because the run changed the model in place and its old values are gone")
        result.problems += _header_problems(report, Checkpoint.open(directory))
    elif "output" in intact:
        checked = _Tensors.opened(directory, report, intact, result)
        if checked is not None:
            checked.check(result, full, seed, progress)
    return result


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


def _check_companions(directory: Path, report: Report, result: Verification) -> None:
    """Compare the files beside the shards with the list that the run wrote, and look for what was added."""
    if not exists(directory / HASHES):
        beside = "config, tokenizer, model card and report of the output"
        result.uncovered.append(f"{beside}, because {HASHES} is not there; earlier versions wrote none")
        return
    try:
        hashes = read_hashes(directory)
    except InputError as error:
        result.problems.append(str(error))
        return
    shards = {name: record["blake3"] for name, record in report.output["files"].items()}  # checked already
    for name, digest in hashes.items():
        path = directory / name
        try:
            if shards.get(name, digest) != digest:
                result.problems.append(f"{path} has another hash in the report than in {HASHES}")
            elif name not in shards and not exists(path):
                result.problems.append(f"{path} is gone")
            elif name not in shards and hash_file(path) != digest:
                result.problems.append(f"{path} has changed since the run")
            else:
                result.companions += name not in shards
        except RunError as error:
            result.problems.append(str(error))
    copied = report.inputs["model"]["files"]  # a link that led out of the model may have been copied by hand
    for name, path in files_of(directory).items():
        if name not in hashes and name not in shards and name != HASHES:
            if name in copied and hash_file(path) == copied[name]["blake3"]:
                result.companions += 1
            elif is_read(name):
                result.problems.append(f"{path} was added after the run")
            else:
                result.uncovered.append(f"{path}, which was added after the run")


def _check_data(report: Report, result: Verification) -> None:
    for role, record in report.data.items():
        path = Path(record["path"])
        try:
            if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises for impossible names)
                result.unchecked.append(f"{role} data: {path} is gone")
            elif hash_file(path) == record["blake3"]:
                result.files += 1
            else:
                result.changed.append(f"{role} data {path}")
        except RunError as error:
            result.unchecked.append(f"{role} data: {error}")


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


@dataclass(frozen=True)
class _Tensors:
    """The tensors of an output, beside what the inputs give by the reference.

    exact: whether the weights are known; if not, results can only be checked for bounds.
    """

    report: Report
    rule: Rule
    sources: Sources
    output: Checkpoint
    exact: bool

    @classmethod
    def opened(cls, directory: Path, report: Report, intact: set[str], result: Verification) -> "_Tensors | None":
        """Open the inputs that are ``intact``; None, with the reason in ``result``, if there is nothing to compare."""
        absent = {"model", "base", "tuned"} - intact
        if absent:
            result.unchecked.append(f"tensors, because of {', '.join(sorted(absent))}")
            return None
        try:
            rule = report.chosen_rule()
        except InputError as error:
            raise InputError(f"{directory / FILE_NAME}: {error}") from error
        exact = rule.estimator is None or set(IMPORTANCES) <= intact
        paths = {role: Path(record["path"]) for role, record in report.inputs.items()}
        importances = open_importances(rule, *map(paths.get, IMPORTANCES)) if exact else {}
        sources = Sources.open(paths["model"], paths["base"], paths["tuned"], importances, report.common_rows)
        if not exact:
            result.unchecked.append("weights, because the importances were not kept (--save-importance)")
        output = Checkpoint.open(directory)
        problems = _layout_problems(report, sources, output)
        result.problems += problems
        return None if problems else cls(report, rule, sources, output, exact)

    def check(self, result: Verification, full: bool, seed: int, progress: Progress) -> None:
        """Compare all tensors, or a sample."""
        actions = {row.name: row.action for row in self.report.tensors}
        matches = self.sources.matches
        if not full and len(matches) > SAMPLED:
            matches = random.Random(seed).sample(matches, SAMPLED)
        with Bar(sum(match.theta.size for match in matches), "tensors", progress) as bar:
            for match in matches:
                # Without the importances, only the report says which tensors they did not cover.
                action = actions.get(match.theta.name, "")
                copied = match.copied is not None or (not self.exact and action.startswith("copied"))
                if not self._is_right(match, copied):
                    result.problems.append(f"tensor {match.theta.name} is not what the inputs give")
                elif self.exact or copied:
                    result.recomputed += 1
                else:
                    result.bounded += 1
                bar.update(match.theta.size)

    def _is_right(self, match: TensorMatch, copied: bool) -> bool:
        made: tuple[Matrix, ...] = ()
        if match.low_rank is not None and not copied:
            made = match.low_rank.factors()
        elif match.merged is not None and not copied and self.sources.adapter is not None:
            made = (self.sources.adapter.array(match.merged),)
        for begin in range(0, match.theta.count, _CHUNK):
            count = min(_CHUNK, match.theta.count - begin)
            computed = 0 if copied else max(0, min(count, match.common - begin))
            kept = (begin + computed, count - computed)
            entry = self.output.tensors[match.theta.name]
            if _bytes(self.output, entry, *kept) != _bytes(self.sources.model, match.theta, *kept):
                return False
            if computed and not self._chunk_is_right(match, made, begin, computed):
                return False
        return True

    def _chunk_is_right(self, match: TensorMatch, made: tuple[Matrix, ...], begin: int, count: int) -> bool:
        import torch

        from perta_fast.ops import reference

        rescaling = self.rule.rescaling
        arrays: list[Any] = [None] * 5
        for operand, checkpoint, entry in self.sources.operands(match):
            arrays[operand] = checkpoint.elements(entry, begin, count)
        theta, tuned, base, forget, retain = arrays
        if match.merged is not None:
            tuned = torch.from_numpy(made[0][begin : begin + count])
        if match.low_rank is None:
            task_vector = tuned.float() - base.float()
        else:
            task_vector = _low_rank_chunk(made, match.low_rank.scale, begin, count)
        # Without importances this is the result for w = 1: one end of the range in which the true result lies.
        expected = reference.subtract(theta, task_vector, forget, retain, rescaling)
        actual = self.output.elements(self.output.tensors[match.theta.name], begin, count)
        if self.exact and (forget is None or rescaling.p in EXACT_POWERS):
            return bool(torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)))
        if self.exact:  # the last bit of another power may differ, and then that of the update and of the result
            slack = 4 * torch.finfo(torch.float32).eps * abs(rescaling.lam) * task_vector.abs()
            slack += torch.finfo(theta.dtype).eps * expected.float().abs()
            return bool(((actual.float() - expected.float()).abs() <= slack).all())
        low, high = torch.minimum(theta, expected), torch.maximum(theta, expected)
        return bool(((low <= actual) & (actual <= high)).all())


def _low_rank_chunk(factors: tuple[Matrix, ...], scale: float, begin: int, count: int) -> Any:
    """Consecutive elements of a task vector that is given by its factors."""
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
