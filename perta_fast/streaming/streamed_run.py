"""Unlearning in one walk: each part of the model is written as soon as its importance is complete.

What the walk needs to be resumed lies in the directory that is being built: the samples, the scratch files, and after
each step a record of how far it has come. All that a record names was flushed before it, and the samples before the
job; a run with a job can be resumed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from perta_fast.data.samples import Sample
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import FLOATING
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, remove, write_record
from perta_fast.files.hashing import HashesInPassing
from perta_fast.files.new_directory import OutputDirectory, check_replaceable, partial_path
from perta_fast.importance.kept_form import KeptForm
from perta_fast.importance.row_digests import RowDigests
from perta_fast.models.loading import choose_device
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import Report
from perta_fast.records.typed_json import fits
from perta_fast.streaming.data_pass import DataPass, share_of
from perta_fast.streaming.kept_importance import KeptImportance
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.step_record import rank_path
from perta_fast.streaming.torch_threads import torch_threads
from perta_fast.streaming.walk import Walk, steps_of, steps_per_sample
from perta_fast.streaming.write_behind import WalkRecord, WriteBehind, resume_walk
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.report_entries import added_up, describe_tensors
from perta_fast.subtraction.unfinished import STATE

_SAMPLES = "samples.json"
_SCRATCH = "scratch"


class StreamSettings(TypedDict):
    """What a run needs to be resumed.

    metadata: of each importance, by role. save: where the importances are kept, or ""; save_as, importance_dtype: as
    ``KeptForm.of`` takes them. ranks: how many processes.
    """

    subject: str
    device: str
    dtype: str
    schedule: dict[str, Any]
    torch_threads: int
    metadata: dict[str, dict[str, str]]
    save: str
    save_as: str
    importance_dtype: str
    overwrite_saved: bool
    ranks: int


@dataclass(frozen=True)
class StreamedRun:
    """Fills the directory of a run; each of ``ranks`` runs its share of the samples. See ``fill``."""

    skeleton: Skeleton
    samples: Mapping[str, Sequence[Sample]]
    settings: StreamSettings
    ranks: Ranks = Ranks.ALONE

    @classmethod
    def reopened(cls, job: Job, ranks: Ranks = Ranks.ALONE) -> "StreamedRun":
        """The run that ``job`` describes.

        Raises InputError if its files are damaged, or another number of processes began it.
        """
        settings: StreamSettings = job.stream  # type: ignore[assignment]
        valid = fits(settings, StreamSettings) and fits(settings["schedule"], Schedule)
        if not valid or settings["dtype"] not in FLOATING:
            raise InputError(f"{job.final}: the run's description is damaged")
        if settings["ranks"] != ranks.world:
            raise InputError(
                f"{job.final}: its samples were dealt to {settings['ranks']} processes, this is a run of "
                f"{ranks.world}; finish it with: {job.resume_command}"
            )
        if settings["save"]:
            check_replaceable(Path(settings["save"]), _form_of(settings).entries, f"the run to {job.final}")
        path = partial_path(Path(job.final)) / STATE / _SAMPLES
        try:
            rows = read_record(path)
        except InputError as error:
            raise InputError(f"{error}; start over with ‹overwrite›") from error
        if not fits(rows, dict[str, list[list[Any]]]) or rows.keys() != settings["metadata"].keys():
            raise InputError(f"{path}: is damaged; start over with ‹overwrite›")
        samples = {
            role: [Sample(tuple(ids), tuple(labels), *rest) for ids, labels, *rest in stored]
            for role, stored in rows.items()
        }
        device, dtype = choose_device(settings["device"]), getattr(torch, settings["dtype"])
        return cls(Skeleton.open(Path(settings["subject"]), device, dtype), samples, settings, ranks)

    def cover(self, sources: Sources) -> Sources:
        """``sources``, which now copy the tensors that no importance covers."""
        matches, covered = [], self.skeleton.covered(sources.model)
        for match in sources.matches:
            if match.copied is None and match.theta.name not in covered:
                match = TensorMatch(match.theta, copied="not covered by the importance")
            matches.append(match)
        metadata = {f"{role}_importance": dict(table) for role, table in self.settings["metadata"].items()}
        return replace(sources, matches=matches, metadata=metadata)

    def keep_samples(self, state: Path) -> None:
        """Write what ``reopened`` reads, durably; ``state``: the directory of the job."""
        rows = {
            role: [(sample.input_ids, sample.labels, sample.truncated, sample.share) for sample in samples]
            for role, samples in self.samples.items()
        }
        write_record(state / _SAMPLES, rows)

    def _rows_of_kept(self) -> dict[str, RowDigests]:
        """The rows of the importances that are kept, by role, if they are known."""
        metadata = self.settings["metadata"] if self.settings["save"] else {}
        return {role: RowDigests.of(self.samples[role]) for role, table in metadata.items() if table.get("rows_hash")}

    def fill(
        self, job: Job, sources: Sources, target: OutputDirectory, report: Report, hashes: HashesInPassing
    ) -> Sources:
        """Walk through the model and write its shards, from where an earlier attempt stopped.

        Returns the sources, with the importances if they are kept. Raises RunError if a loss, a mean or a result is
        not finite, the disk is full, or a file changes; InputError if the files of an earlier attempt are damaged.
        """
        settings, skeleton, ranks = self.settings, self.skeleton, self.ranks
        schedule = Schedule(**settings["schedule"])
        steps = len(steps_of(len(skeleton.layers), schedule))
        begun = resume_walk(target, steps, len(sources.matches), ranks)
        done = 0 if begun is None else begun["done"]
        shares = {role: share_of(samples, ranks) for role, samples in self.samples.items()}
        total = sum(map(len, shares.values())) * steps_per_sample(len(skeleton.layers), schedule)
        scratch = rank_path(target.path / STATE, _SCRATCH, ranks.rank)
        estimator = job.rule.estimator
        assert estimator is not None
        shapes = skeleton.stored_shapes
        started = time.perf_counter()
        with (
            torch_threads(settings["torch_threads"]),
            KeptImportance.opened(
                settings["save"],
                _form_of(settings),
                settings["overwrite_saved"],
                settings["metadata"],
                self._rows_of_kept(),
                shapes,
                begun is not None,
                ranks,
                Path(job.final),
            ) as kept,
            Bar(total, "unlearn", job.progress, "step") as bar,
        ):
            with ranks.together("the scratch files"):
                passes = {
                    role: DataPass(skeleton, samples, shares[role], estimator, schedule, scratch / role, bar.update)
                    for role, samples in self.samples.items()
                }
                if begun is not None:
                    _restore(passes, begun, done == steps, job.progress)
                    bar.update(total * done // steps)
            walk = Walk(skeleton, list(passes.values()), schedule)
            with (
                ranks.sharing_errors("the walk"),
                WriteBehind(
                    job, sources, target, skeleton, passes, kept, schedule.overlap, begun, ranks, hashes
                ) as writing,
            ):
                walk.run(writing.end_step, done)
                writing.finish()
            importances: dict[str, Any] = kept.commit()
        remove(scratch)
        for role, data in passes.items():
            report.importance[f"{role}_importance"]["one_by_one"] = list(data.one_by_one)
        if skeleton.device.type == "cuda":
            report.memory["peak_device_bytes"] = torch.cuda.max_memory_allocated(skeleton.device)
        describe_tensors(report, sources.matches, added_up(ranks.gather(writing.totals)))
        _describe_time(report, walk, writing, time.perf_counter() - started)
        return replace(sources, **importances)


def _form_of(settings: StreamSettings) -> KeptForm:
    return KeptForm.of(settings["save_as"], settings["importance_dtype"])


def _restore(passes: Mapping[str, DataPass], begun: WalkRecord, finished: bool, progress: Progress) -> None:
    """Resume the passes; a finished walk needs none of their files any more."""
    records = begun["passes"]
    if records.keys() != passes.keys():
        raise InputError("the record of the walk is of other data; start over with ‹overwrite›")
    size = sum(data.scratch.size for data in passes.values())
    with Bar(size, "check scratch", progress) as bar:
        for role, data in passes.items():
            data.restore({**records[role], "files": {}} if finished else records[role], bar.update)


def _describe_time(report: Report, walk: Walk, writing: WriteBehind, seconds: float) -> None:
    report.add_phase("walk", seconds, writing.bytes_moved)
    report.overlap = {
        "compute_seconds": seconds - walk.waited_seconds - writing.waited_seconds,
        "read_seconds": walk.read_seconds,
        "read_hidden_seconds": max(0.0, walk.read_seconds - walk.waited_seconds),
        "write_seconds": writing.seconds,
        "write_hidden_seconds": max(0.0, writing.seconds - writing.waited_seconds),
    }
