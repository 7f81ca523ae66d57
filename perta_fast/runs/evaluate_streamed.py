"""``evaluate`` layer by layer: which samples the metrics ask for, one walk over all of them, then the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from perta_fast.data.chat import today
from perta_fast.distributed.ranks import Ranks
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.reference_model import check_same_tokens
from perta_fast.evaluation.request import Request
from perta_fast.evaluation.results import Evaluation
from perta_fast.files.kept_parts import KeptParts
from perta_fast.models.loading import Subject, load_subject, samples_for
from perta_fast.progress import Progress
from perta_fast.runs.estimate import open_skeleton
from perta_fast.runs.scoring_walks import scoring_walks
from perta_fast.runs.settings import threads_for
from perta_fast.streaming.forecast.choice import Budget, choose_schedule, rates_for
from perta_fast.streaming.forecast.forecast import Forecast
from perta_fast.streaming.forecast.forward_costs import forward_estimate
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.version import Version
from perta_fast.streaming.model.skeleton import Skeleton

_MODEL, _REFERENCE = "model", "reference model"  # the walks


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
        opened = _Opened.open(checked, day, tokenizer, progress)
    with scoring_walks(checked.request, progress, ranks, kept) as walks:
        schedules = {name: walks.schedule(name, *through) for name, through in opened.walks.items()}
        found = {name: walks.scores(name, *through, schedules[name]) for name, through in opened.walks.items()}
    scores, reference_scores = (found[name].scores if name in found else {} for name in (_MODEL, _REFERENCE))
    answering = checked.examinee(Answering, opened.subject, progress, scores=scores, reference_scores=reference_scores)
    measured = checked.table.measure(answering, checked.names)
    for name, (skeleton, _) in opened.walks.items():
        if found[name].not_finite:
            answering.notes.append(f"{skeleton.checkpoint.path}: {found[name].not_finite}")
    result = checked.result(answering, measured, started)
    result.settings["batch_size"] = schedules[_MODEL].batch_size
    return result


def forecast(checked: Checked, destination: Path, ranks: int = 1) -> Forecast:
    """What the walks of a streamed evaluation will take, from the headers of the files and the data.

    destination: a directory on the disk that is to hold the hidden states; a file is written there to measure it, and
    removed. ranks: processes; the costs are those of one. Raises InputError if memory or disk are too small.
    """
    request = checked.request
    opened = _Opened.open(checked, today(), None, False)
    walks = []
    for name, (skeleton, sets) in opened.walks.items():
        estimate = forward_estimate(skeleton, [Version(name)], sets, threads_for(None, Ranks.ALONE), ranks)
        budget = Budget.at(destination, request.memory, request.device_memory, ranks)
        chosen = choose_schedule(estimate, request.batch_size, budget)
        tokens = {of_set.name: [len(sample.input_ids) for sample in of_set.samples] for of_set in sets}
        counts = (f"{len(of_set)} {role} samples of {sum(of_set)} tokens" for role, of_set in tokens.items())
        rates = rates_for(chosen, destination, skeleton.first_shard)
        sizes = {role: {"samples": len(of_set), "tokens": sum(of_set)} for role, of_set in tokens.items()}
        walks.append((f"through the {name}: {', '.join(counts)}", Forecast.of(chosen, rates, ranks, sizes)))
    return Forecast.joined(walks, "\n")


@dataclass(frozen=True)
class _Opened:
    """What is walked. walks: by name, the model without its weights, and the sets that the metrics ask it for."""

    subject: Subject
    walks: dict[str, tuple[Skeleton, list[SampleSet]]]

    @classmethod
    def open(cls, checked: Checked, day: date, tokenizer: Any, progress: Progress) -> "_Opened":
        """Raises InputError if a model, or a row, cannot be taken. day: for templates that ask for the date."""
        request = checked.request
        assert request.model is not None
        skeleton, subject = _structure(Path(request.model), request.device, request.asked_type, tokenizer)
        subject = checked.subject_on(subject, day)
        asking = checked.examinee(Asking, subject, progress)
        checked.table.measure(asking, checked.names)
        walks = {_MODEL: (skeleton, list(asking.sets.values()))}
        if asking.reference_sets:
            sets = list(asking.reference_sets.values())
            walks[_REFERENCE] = _reference(request, skeleton.device, sets, subject), sets
        return cls(subject, walks)


def _structure(
    path: Path, device: str | torch.device | None, dtype: torch.dtype | None, tokenizer: Any = None
) -> tuple[Skeleton, Subject]:
    skeleton = open_skeleton(path, device, dtype)
    return skeleton, load_subject(path, device, dtype, tokenizer, structure=skeleton.model)


def _reference(request: Request, device: torch.device, sets: Sequence[SampleSet], own: Subject) -> Skeleton:
    """The reference model of ``own``. Raises InputError if it cannot read the samples."""
    assert request.reference_model is not None
    path = Path(request.reference_model)
    skeleton, subject = _structure(path, device, request.asked_type)
    check_same_tokens(path, subject.tokenizer, own.tokenizer)
    for of_set in sets:
        samples_for(subject, of_set.samples, None)  # checks that it can read them
    return skeleton
