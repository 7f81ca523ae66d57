"""``evaluate`` layer by layer: which samples the metrics ask for, one walk over all of them, then the metrics."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import RankLost, RunError, advice
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.kept_passes import kept_part
from perta_fast.evaluation.reference_model import check_same_tokens
from perta_fast.evaluation.request import Request
from perta_fast.evaluation.results import Evaluation
from perta_fast.files.kept_parts import KeptParts
from perta_fast.memory import return_freed_blocks
from perta_fast.models.loading import Subject, load_subject, samples_for
from perta_fast.progress import Progress
from perta_fast.runs.estimate import open_skeleton
from perta_fast.runs.settings import threads_for
from perta_fast.streaming.forecast.choice import schedule_for
from perta_fast.streaming.forecast.forward_costs import forward_estimate
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule


def measure_streamed(
    checked: Checked, tokenizer: Any, progress: Progress, ranks: Ranks, kept: KeptParts | None, started: str, day: date
) -> Evaluation:
    """Walk through the model, and the reference model if a metric needs it, and measure, as a ``Measure`` does.

    Every rank calls this, and gets the whole result; ``kept``, ``started`` and ``day`` are those of the first.
    """
    progress = ranks.first and progress
    with ranks.together("the start of the evaluation"):
        pass  # if the first rank could not begin, all end
    started, day = ranks.share((started, day))
    with ranks.together("the loading of model and data"):
        model = _Outline.open(checked.request.model, checked.request.device, checked.request.dtype, tokenizer)
        subject = checked.subject_on(model.subject, day)
        asking = checked.examinee(Asking, subject, progress)
        checked.table.measure(asking, checked.names)
        reference = _reference(checked, model, asking.reference_sets)
    with _walks(checked.request, progress, ranks, kept) as walks:
        batch_size, found = walks.through("model", model, asking.sets)
        _, other = walks.through("reference", reference, asking.reference_sets)
    answering = checked.examinee(Answering, subject, progress, scores=found.scores, reference_scores=other.scores)
    measured = checked.table.measure(answering, checked.names)
    for outline, of_walk in ((model, found), (reference, other)):
        if outline is not None and of_walk.not_finite:
            answering.notes.append(f"{outline.subject.origin}: {of_walk.not_finite}")
    result = checked.result(answering, measured, started)
    result.settings["batch_size"] = batch_size
    return result


@dataclass(frozen=True)
class _Outline:
    """A checkpoint without its weights, and its tokenizer."""

    skeleton: Skeleton
    subject: Subject

    @classmethod
    def open(
        cls, path: str | None, device: str | torch.device | None, dtype: str | None = None, tokenizer: Any = None
    ) -> "_Outline":
        assert path is not None
        kind = None if dtype is None else torch_dtype(dtype)
        skeleton = open_skeleton(Path(path), device, kind)
        return cls(skeleton, load_subject(Path(path), device, kind, tokenizer, structure=skeleton.model))


def _reference(checked: Checked, model: _Outline, sets: Mapping[str, SampleSet]) -> _Outline | None:
    """The reference model, if it is asked for scores. Raises InputError if it cannot read the samples."""
    if not sets:
        return None
    reference = _Outline.open(checked.request.reference_model, model.skeleton.device)
    check_same_tokens(Path(reference.subject.origin), reference.subject.tokenizer, model.subject.tokenizer)
    for of_set in sets.values():
        samples_for(reference.subject, of_set.samples, None)  # checks that it can read them
    return reference


@dataclass(frozen=True)
class _Walks:
    """Walks whose hidden states and finished scores lie in ``folder``.

    resumable: whether these stay after a stop. kept: what else does, of the first rank.
    """

    folder: Path
    resumable: bool
    request: Request
    progress: Progress
    ranks: Ranks
    kept: KeptParts | None

    def through(self, name: str, model: _Outline | None, sets: Mapping[str, SampleSet]) -> tuple[int, VersionScores]:
        """The batch size that fits, and what a model scores; nothing without a model.

        Raises InputError if memory or disk are too small, RunError, with how to go on, if the disk is full.
        """
        if model is None:
            return 0, VersionScores({}, 0.0, "", 0.0)
        schedule = self._schedule(name, model, list(sets.values()))
        with self.ranks.together(name), self._explaining():
            (found,) = score_versions(
                model.skeleton,
                [Version(name)],
                list(sets.values()),
                batch_size=schedule.batch_size,
                threads=threads_for(None, self.ranks),
                folder=self.folder / name,
                resumable=self.resumable,
                ahead=schedule.overlap,
                progress=self.progress,
                description=f"scoring by the {name}",
                ranks=self.ranks,
            )
        return schedule.batch_size, found

    def _schedule(self, name: str, model: _Outline, sets: Sequence[SampleSet]) -> Schedule:
        """How a walk is cut; the first rank chooses, and keeps that for when the walk goes on."""
        schedule, threads = None, threads_for(None, self.ranks)
        with self.ranks.together("the choice of a schedule"):
            if self.ranks.first:
                of, choose = self.ranks.world, partial(self._choose, model, sets, threads)
                schedule = Schedule(**kept_part(self.kept, f"{name} schedule", of, choose))
        if self.request.memory is not None:
            return_freed_blocks()
        shared: Schedule = self.ranks.share(schedule)
        return shared

    def _choose(self, model: _Outline, sets: Sequence[SampleSet], threads: int) -> dict[str, Any]:
        schedule = schedule_for(
            forward_estimate(model.skeleton, [Version("")], sets, threads, self.ranks.world),
            self.request.batch_size,
            self.folder,
            self.request.memory,
            self.request.device_memory,
            model.skeleton.first_shard,
            self.progress is True,
            self.ranks.world,
        )
        return asdict(schedule)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say in an error of the walk how to go on."""
        rest = "nothing was left behind" if self.kept is None else self.kept.going_on()
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.folder}: could not be written: {advice(error)}; {rest}") from error
        except RunError as error:
            if isinstance(error, RankLost):
                raise
            raise RunError(f"{error}; {rest}") from error


@contextmanager
def _walks(request: Request, progress: Progress, ranks: Ranks, kept: KeptParts | None) -> Iterator[_Walks]:
    """With a directory beside the result; or where temporary files lie, which is removed at the end."""
    with ExitStack() as opened:
        folder = None
        with ranks.together("the scratch directory"):
            if kept is not None:
                folder = kept.folder("walks")
            elif ranks.first:
                folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="perta-eval-")))
        folder, resumable = ranks.share((folder, kept is not None))
        check_shared(folder, ranks)
        yield _Walks(folder, resumable, request, progress, ranks, kept)
