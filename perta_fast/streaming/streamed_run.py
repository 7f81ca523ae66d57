"""Unlearning in one walk: each part of the model is weighed, subtracted and written once its means are there.

What the walk needs to go on lies below the directory that is being built: the samples, the spill, and after
each step a record of how far it has come. Everything that a record names was flushed before it, and so were the
samples before the job, which is what makes a run one that can be taken up again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from perta_fast.checkpoints.tied import importance_key
from perta_fast.data.samples import Sample
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import FLOATING
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, remove, write_record
from perta_fast.files.new_directory import OutputDirectory, partial_path
from perta_fast.models.loading import choose_device
from perta_fast.progress import Progress, byte_bar, step_bar
from perta_fast.records.report import Report
from perta_fast.records.typed_json import fits
from perta_fast.streaming.data_pass import DataPass, PassState, shares_of
from perta_fast.streaming.kept_importance import Keeping
from perta_fast.streaming.model.passage import Passage
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.walk import Walk, handlings, steps_of
from perta_fast.streaming.write_behind import WalkState, Writing, state_file, take_up
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.report_entries import added_up, describe_tensors
from perta_fast.subtraction.unfinished import STATE

_SAMPLES = "samples.json"
_SCRATCH = "scratch"
_Row = tuple[list[int], list[int], bool]


class StreamSettings(TypedDict):
    """What a run needs to walk again.

    metadata: of each importance, by role. save: where both go, or "". ranks: processes that walk together.
    """

    subject: str
    device: str
    dtype: str
    schedule: dict[str, Any]
    torch_threads: int
    metadata: dict[str, dict[str, str]]
    save: str
    overwrite_saved: bool
    ranks: int


class StreamedRun:
    """Fills the directory of a run, with each of ``ranks`` taking its share of the samples; see ``fill``."""

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Mapping[str, Sequence[Sample]],
        settings: StreamSettings,
        ranks: Ranks = Ranks.ALONE,
    ) -> None:
        self.settings, self._ranks = settings, ranks
        self._skeleton, self._samples = skeleton, samples
        self._shares = {role: shares_of(each, ranks.world)[ranks.rank] for role, each in samples.items()}
        self._schedule = Schedule(**settings["schedule"])
        self._passage = Passage(skeleton.model, skeleton.layers, str(skeleton.checkpoint.path))

    @classmethod
    def reopened(cls, job: Job, ranks: Ranks = Ranks.ALONE) -> "StreamedRun":
        """The run that ``job`` describes.

        Raises InputError if what it left is damaged, or the processes are not as many as those that began it.
        """
        if (
            not fits(job.stream, StreamSettings)
            or not fits(job.stream["schedule"], Schedule)
            or job.stream["dtype"] not in FLOATING
        ):
            raise InputError(f"{job.final}: the run's description is damaged")
        settings: StreamSettings = job.stream  # type: ignore[assignment]
        if settings["ranks"] != ranks.world:
            raise InputError(
                f"{job.final}: its samples were dealt to {settings['ranks']} processes, this is a run of "
                f"{ranks.world}; finish it with: {job.resume_command}"
            )
        path = partial_path(Path(job.final)) / STATE / _SAMPLES
        try:
            rows = read_record(path)
        except InputError as error:
            raise InputError(f"{error}; start over with --overwrite") from error
        if not fits(rows, dict[str, list[list[Any]]]) or rows.keys() != settings["metadata"].keys():
            raise InputError(f"{path}: is damaged; start over with --overwrite")
        samples = {
            role: [Sample(tuple(ids), tuple(labels), truncated) for ids, labels, truncated in each]
            for role, each in rows.items()
        }
        device, dtype = choose_device(settings["device"]), getattr(torch, settings["dtype"])
        return cls(Skeleton.open(Path(settings["subject"]), device, dtype), samples, settings, ranks)

    def cover(self, sources: Sources) -> Sources:
        """``sources`` with what no importance reaches marked to be copied."""
        matches = []
        for match in sources.matches:
            covered = importance_key(match.theta.name, sources.model, self._skeleton.stored_shapes)
            if match.copied is None and covered is None:
                match = TensorMatch(match.theta, copied="not covered by the importance")
            matches.append(match)
        metadata = {f"{role}_importance": dict(table) for role, table in self.settings["metadata"].items()}
        return replace(sources, matches=matches, metadata=metadata)

    def keep_samples(self, state: Path) -> None:
        """Write what ``reopened`` reads, durably; ``state``: the directory that the job will lie in."""
        write_record(state / _SAMPLES, {role: _rows(each) for role, each in self._samples.items()})

    def fill(self, job: Job, sources: Sources, target: OutputDirectory, report: Report) -> Sources:
        """Walk through the model and write its shards, from wherever an earlier attempt came to.

        Returns the sources with the importances, where they are kept. Raises RunError if a loss, a mean or a
        result is not finite, the disk is full, or a file changes; InputError if what is to be taken up again is
        damaged.
        """
        state, ranks = target.path / STATE, self._ranks
        steps = len(steps_of(len(self._skeleton.layers), self._schedule))
        begun = take_up(target, steps, len(sources.matches), ranks)
        done = 0 if begun is None else begun["done"]
        scratch = state_file(state, _SCRATCH, ranks.rank)
        started = time.perf_counter()
        with (
            _torch_threads(self.settings["torch_threads"]),
            self._keeping(begun is not None) as keeping,
            step_bar(self._handlings(), "unlearn", job.progress) as bar,
        ):
            with ranks.together("the scratch files"):
                passes = self._passes(job, scratch, bar.update)
                if begun is not None:
                    self._restore(passes, begun, done == steps, job.progress)
                    bar.update(self._handlings() * done // steps)
            walk = Walk(self._skeleton, self._passage, list(passes.values()), self._schedule)
            with (
                ranks.telling("the walk"),
                Writing(
                    job, sources, target, self._skeleton, passes, keeping, self._schedule.overlap, begun, ranks
                ) as writing,
            ):
                walk.run(writing.settle, done)
                writing.finish()
            kept = keeping.commit()
        remove(scratch)
        for role, each in passes.items():
            report.importance[f"{role}_importance"]["one_by_one"] = list(each.one_by_one)
        if self._skeleton.device.type == "cuda":
            report.memory["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._skeleton.device)
        describe_tensors(report, sources.matches, added_up(ranks.gather(writing.totals)))
        _describe_time(report, walk, writing, time.perf_counter() - started)
        return replace(
            sources,
            forget_importance=kept.get("forget_importance"),
            retain_importance=kept.get("retain_importance"),
        )

    def _handlings(self) -> int:
        samples = sum(map(len, self._shares.values()))
        return samples * handlings(len(self._skeleton.layers), self._schedule)

    def _passes(self, job: Job, scratch: Path, advance: Callable[[int], Any]) -> dict[str, DataPass]:
        estimator = job.rule.estimator
        assert estimator is not None
        return {
            role: DataPass(
                self._skeleton,
                self._passage,
                samples,
                self._shares[role],
                estimator,
                self._schedule,
                scratch / role,
                advance,
            )
            for role, samples in self._samples.items()
        }

    @staticmethod
    def _restore(passes: Mapping[str, DataPass], begun: WalkState, finished: bool, progress: Progress) -> None:
        """Take the passes up again; of a walk that is finished no file is needed any more."""
        states = begun["passes"]
        if states.keys() != passes.keys():
            raise InputError("the record of the walk is of other data; start over with --overwrite")
        size = sum(each.spill.size for each in passes.values())
        with byte_bar(size, "check scratch", progress) as bar:
            for role, each in passes.items():
                state: PassState = {"left": states[role]["left"], "files": {}} if finished else states[role]
                each.restore(state, bar.update)

    def _keeping(self, begun: bool) -> Keeping:
        settings = self.settings
        return Keeping(
            settings["save"],
            settings["overwrite_saved"],
            settings["metadata"],
            self._skeleton.stored_shapes,
            begun,
            self._ranks,
        )


def _rows(samples: Sequence[Sample]) -> list[_Row]:
    return [(list(each.input_ids), list(each.labels), each.truncated) for each in samples]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Torch takes its sums apart by thread: as many as when the run began, for the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _describe_time(report: Report, walk: Walk, writing: Writing, seconds: float) -> None:
    report.add_phase("walk", seconds, writing.bytes_moved)
    report.overlap = {
        "compute_seconds": seconds - walk.waited_seconds - writing.waited_seconds,
        "read_seconds": walk.read_seconds,
        "read_hidden_seconds": max(0.0, walk.read_seconds - walk.waited_seconds),
        "write_seconds": writing.seconds,
        "write_hidden_seconds": max(0.0, writing.seconds - writing.waited_seconds),
    }
