"""``evaluate`` layer by layer: which samples the metrics ask for, one walk over all of them, then the metrics."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import RankLost, RunError, advice
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.reference_model import check_same_tokens
from perta_fast.evaluation.results import Evaluation
from perta_fast.files.kept_parts import KeptParts
from perta_fast.models.loading import Subject, load_subject, samples_for
from perta_fast.progress import Progress
from perta_fast.runs.estimate import open_skeleton
from perta_fast.runs.settings import threads_for
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton


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
    with _scratch(kept, ranks) as scratch:
        found = scratch.walk("model", model, asking.sets, checked.request.batch_size, progress)
        other = scratch.walk("reference", reference, asking.reference_sets, checked.request.batch_size, progress)
    answering = checked.examinee(Answering, subject, progress, scores=found.scores, reference_scores=other.scores)
    measured = checked.table.measure(answering, checked.names)
    for outline, of_walk in ((model, found), (reference, other)):
        if outline is not None and of_walk.not_finite:
            answering.notes.append(f"{outline.subject.origin}: {of_walk.not_finite}")
    return checked.result(answering, measured, started)


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
class _Scratch:
    """Where walks keep hidden states and finished scores. kept: of the first rank, if they stay after a stop."""

    folder: Path
    resumable: bool
    ranks: Ranks
    kept: KeptParts | None

    def walk(
        self, name: str, model: _Outline | None, sets: Mapping[str, SampleSet], batch_size: int, progress: Progress
    ) -> VersionScores:
        """What a model scores. Raises RunError, with how to go on, if the disk is full."""
        if model is None:
            return VersionScores({}, 0.0, "", 0.0)
        with self.ranks.together(name), self._explaining():
            (found,) = score_versions(
                model.skeleton,
                [Version(name)],
                list(sets.values()),
                batch_size=batch_size,
                threads=threads_for(None, self.ranks),
                folder=self.folder / name,
                resumable=self.resumable,
                progress=progress,
                description=f"scoring by the {name}",
                ranks=self.ranks,
            )
        return found

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
def _scratch(kept: KeptParts | None, ranks: Ranks) -> Iterator[_Scratch]:
    """A directory beside the result; or where temporary files lie, which is removed at the end."""
    with ExitStack() as opened:
        folder = None
        with ranks.together("the scratch directory"):
            if kept is not None:
                folder = kept.folder("walk")
            elif ranks.first:
                folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="perta-eval-")))
        folder, resumable = ranks.share((folder, kept is not None))
        check_shared(folder, ranks)
        yield _Scratch(folder, resumable, ranks, kept)
