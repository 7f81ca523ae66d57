"""What both kinds of run, into a new directory and in place, put in the report."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path

from perta_fast import compiled
from perta_fast.checkpoints.companions import TUNING, other_weights
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG
from perta_fast.data.chat import Told
from perta_fast.distributed.ranks import Ranks, deal
from perta_fast.errors import InputError
from perta_fast.files.hashing import NONE_IN_PASSING, HashesInPassing, bytes_to_read, hash_files
from perta_fast.files.identity import is_same
from perta_fast.files.reading import exists, read_json
from perta_fast.importance.prompts import different_dates
from perta_fast.progress import Bar
from perta_fast.records.file_hashes import HASHES
from perta_fast.records.importance_record import ImportanceRecord, importance_record
from perta_fast.records.report import DirectoryRecord, Report, TensorReport, describe_files
from perta_fast.records.versions import installed_versions
from perta_fast.rules import Rule, negative_strength
from perta_fast.subtraction.compute import Statistics
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.read_beside import companion_records, taken_at, taken_elsewhere


def begin_report(sources: Sources, rule: Rule, threads: int, started: str, merging: bool = False) -> Report:
    """The report of a run, when its subtraction begins. started: when the run did. merging: see ``merge``."""
    report = Report(
        rule=rule.name,
        **asdict(rule.rescaling),
        inputs={},
        importance={role: importance_record(table) for role, table in sources.metadata.items()},
        common_rows=sources.common_rows,
        only=list(sources.scope.only),
        leave=list(sources.scope.leave),
        other_weights=other_weights(sources.model),
        file_list=HASHES,
        threads=threads,
        instruction_set=compiled.kernels().build_info()["instruction_set"],
        versions=installed_versions(*(["peft"] if sources.adapter is not None and sources.adapter.merged else [])),
        started=started,
        merged=merging,
    )
    sign = [negative_strength(rule.rescaling.lam)] if rule.rescaling.lam < 0 and not merging else []
    exchanged = _exchange_warnings(sources.tuned.path, report.importance)
    for warning in sign + _importance_warnings(report.importance) + exchanged + _adapter_warnings(sources):
        report.warn(warning)
    return report


def add_up(totals: dict[int, Statistics], index: int, statistics: Statistics) -> None:
    """Add a chunk's statistics to its tensor's."""
    sums = totals.setdefault(index, {})
    for key, value in statistics.items():
        sums[key] = sums.get(key, 0) + value


def added_up(parts: Iterable[Mapping[int, Statistics]]) -> dict[int, Statistics]:
    """The sum of each tensor's statistics over ``parts``."""
    totals: dict[int, Statistics] = {}
    for part in parts:
        for index, statistics in part.items():
            add_up(totals, index, statistics)
    return totals


def describe_tensors(report: Report, matches: Sequence[TensorMatch], totals: dict[int, Statistics]) -> None:
    """Fill in what became of each tensor."""
    report.tensors = [_tensor_report(match, totals.get(index, {})) for index, match in enumerate(matches)]
    for row in report.tensors:
        report.counts[row.action] = report.counts.get(row.action, 0) + 1
    if not any(row.changed for row in report.tensors):
        report.warn(f"no value of the model has changed: {_why_unchanged(report)}")


def describe_inputs(
    report: Report, sources: Sources, job: Job, ranks: Ranks = Ranks.ALONE, passing: HashesInPassing = NONE_IN_PASSING
) -> None:
    """Hash every input, the files dealt over ``ranks``. passing: has what was read of them before."""
    by_role = {role: list(checkpoint.files()) for role, checkpoint in sources.named().items()}
    if sources.adapter_config is not None:
        by_role["tuned"].append(sources.adapter_config)
    if not sources.base_is_read and report.settings.get("at") != "base":  # neither here nor for an importance
        by_role["base"] = []
    hashes = _hash(report, [path for paths in by_role.values() for path in paths], "hash inputs", job, ranks, passing)
    report.inputs = {
        role: describe_files({path: hashes[path] for path in paths}, sources.named()[role].path)
        for role, paths in by_role.items()
    }
    for role, path in taken_elsewhere(sources, taken_at(report)).items():
        report.inputs[role] = DirectoryRecord(path=str(path), files={})
        if is_same(path, job.final):  # the output takes its place
            report.inputs[role]["kept"] = False
    for role, files in (job.companions or companion_records(sources, report)).items():
        report.inputs[role]["files"] |= files
    made = ["forget_importance", "retain_importance"]
    if report.preconditioned is not None:
        given = report.preconditioned
        report.inputs["tuned_given"] = DirectoryRecord(path=given.tuned, files=given.files)
        made.append("tuned")
    if report.removal is not None:
        report.inputs["whole_importance"] = DirectoryRecord(path=report.removal.whole, files=report.removal.files)
    for role in made:
        if job.temporary and role in report.inputs:
            report.inputs[role]["kept"] = False


def describe_output(
    report: Report,
    shards: list[Path],
    final: Path,
    job: Job,
    ranks: Ranks = Ranks.ALONE,
    passing: HashesInPassing = NONE_IN_PASSING,
) -> None:
    """Hash the shards of the output, which will be or is at ``final``, dealt over ``ranks``.

    passing: has what was written of them.
    """
    hashes = _hash(report, shards, "hash output", job, ranks, passing)
    with ranks.together("the output files"):  # before the first rank renames their directory
        record = describe_files(hashes, shards[0].parent)
    report.output = DirectoryRecord(path=str(final), files=record["files"])


def _hash(
    report: Report, paths: list[Path], phase: str, job: Job, ranks: Ranks, passing: HashesInPassing
) -> dict[Path, str]:
    started = time.perf_counter()
    with ranks.together(phase):
        sizes = {path: bytes_to_read(path, passing) for path in dict.fromkeys(paths)}
        files = list(sizes)
        own = [files[k] for k in deal(list(sizes.values()), ranks.world)[ranks.rank]]
        with Bar(sum(sizes[path] for path in own), phase, job.progress) as bar:
            hashes = hash_files(own, report.threads, bar.update, job.drop_cache, passing)
    by_path = {path: digest for part in ranks.gather(hashes) for path, digest in part.items()}
    report.add_phase(phase, time.perf_counter() - started, sum(sizes.values()))
    return {path: by_path[path] for path in files}


def _tensor_report(match: TensorMatch, sums: Statistics) -> TensorReport:
    row = TensorReport(match.theta.name, match.theta.dtype, list(match.theta.shape), "subtracted")
    if match.copied is not None:
        row.action = f"copied: {match.copied}"
    elif not sums.get("nonzero_task"):
        row.action = "copied: task vector is zero"
    row.kept_rows = 0 if match.copied else match.kept_rows
    if sums and match.common:
        row.mean_weight = sums["sum_weight"] / match.common
        row.changed = int(sums["changed"])
        norm, change = sums["sum_squared_theta"] ** 0.5, sums["sum_squared_change"] ** 0.5
        if isfinite(norm) and isfinite(change):
            row.relative_change = change / norm if norm else (0.0 if change == 0 else None)
    return row


def _adapter_warnings(sources: Sources) -> list[str]:
    """Transformers would add to a model an adapter that lies in its directory."""
    checkpoints = [sources.base, *([] if sources.adapter_config else [sources.tuned])]
    both = [checkpoint.path for checkpoint in checkpoints if exists(checkpoint.path / ADAPTER_CONFIG)]
    return [f"{path}: holds an adapter beside the model; the adapter was not read" for path in both]


def _why_unchanged(report: Report) -> str:
    if report.lam == 0:
        return "lambda is 0"
    if report.merged:
        return "the adapter changes none"
    if "subtracted" not in report.counts:
        return "the task vector is zero wherever the run subtracts it"
    return "all steps round to zero in the type of the model, or all weights are zero"


def _exchange_warnings(tuned: Path, importance: Mapping[str, ImportanceRecord]) -> list[str]:
    """Whether theta_f has learnt the data of the retain importance, as far as ``perta tune`` has left a record."""
    if len(importance) < 2 or not exists(tuned / TUNING):
        return []
    try:
        record = read_json(tuned / TUNING)
        learnt = record["data"]["blake3"]
    except (InputError, KeyError, TypeError):  # the record is not needed
        return []
    forget, retain = (importance[f"{role}_importance"]["data_hash"] for role in ("forget", "retain"))
    if learnt != retain or learnt == forget:
        return []
    return [f"{tuned} was tuned on the data of the retain importance; were forget and retain importance exchanged?"]


def _importance_warnings(importance: Mapping[str, ImportanceRecord]) -> list[str]:
    if len(importance) < 2:
        return []
    forget, retain = importance["forget_importance"], importance["retain_importance"]
    warnings = []
    if forget["data_hash"] == retain["data_hash"]:
        warnings.append("forget and retain importance were estimated on the same data")
    if forget["evaluated_at"] != retain["evaluated_at"]:
        warnings.append(
            f"forget importance was evaluated at {forget['evaluated_at']}, "
            f"retain importance at {retain['evaluated_at']}"
        )
    if different := different_dates(Told.read(forget), Told.read(retain)):
        warnings.append(different)
    if slow := forget["one_by_one"] or retain["one_by_one"]:
        warnings.append(f"these parameters took a backward pass for each sample, not batches: {', '.join(slow)}")
    return warnings
