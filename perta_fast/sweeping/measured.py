"""What was measured in a sweep, live or streamed, made into its record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from perta_fast.data.chat import Told, told
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.dtypes import torch_name
from perta_fast.importance.prompts import different_dates
from perta_fast.models.loading import Subject, length_limit
from perta_fast.records.report import data_record, read_as_lines, scope_lines, truncation_warnings
from perta_fast.records.versions import installed_versions, now
from perta_fast.scoring.importances import metadata_of
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep, as_notes
from perta_fast.sweeping.unfinished import Begun
from perta_fast.sweeping.vectors import Vectors


@dataclass(frozen=True)
class Measured:
    """All settings, in order, with the importances that weighed them.

    subject: what was scored, its weights in memory or not. device: where. samples: what it was scored on, by role.
    batch_size: samples at a time.
    """

    rows: Sequence[ScoredSetting]
    importances: ByEstimator
    subject: Subject
    device: torch.device
    samples: Mapping[str, Sequence[Sample]]
    batch_size: int
    notes: Sequence[str] = field(default_factory=list)

    def as_sweep(self, opened: OpenedSweep, begun: Begun, vectors: Vectors) -> Sweep:
        """The record. vectors: those that were subtracted."""
        request, module = opened.request, self.subject.module
        limits = begun.limits(self.rows[0])
        counts = {role: (row_count(samples), truncated_count(samples)) for role, samples in self.samples.items()}
        data = {
            role: data_record(file.path, file.digest, *counts[role], file.read_as)
            for role, file in opened.scored.items()
        }
        scored, made = told(self.subject.tokenizer), [vectors.record(mu) for mu in opened.mus()]
        resolved = {
            "batch_size": self.batch_size,
            "device": str(self.device),
            "dtype": torch_name(module.dtype),
            "max_length": length_limit(self.subject, request.max_length),
            "date": scored.date,
        }
        sweep = Sweep(
            rows=list(self.rows),
            metric=request.metric,
            limit=limits.retain_loss,
            floor=limits.retain,
            select=request.criterion,
            settings=request.settings() | resolved,
            inputs={role: str(directory.path.resolve()) for role, directory in opened.inputs().items()},
            data=data,
            gold=begun.gold,
            forget_limit=limits.forget_loss,
            importance={estimator: metadata_of(of_estimator) for estimator, of_estimator in self.importances.items()},
            preconditioned=[record.in_report() for record in made],
            versions=installed_versions(),
            notes=scope_lines(request.only, request.leave)
            + read_as_lines(data)
            + as_notes(truncation_warnings(data))
            + [*self.notes]
            + as_notes(_differing_prompts(self.importances, scored)),
            started=begun.started,
            finished=now(),
        )
        sweep.notes += _what_is_kept(request)
        doubts = [warning for record in made[:1] for warning in record.warnings] + sweep.warnings()
        if doubt := begun.forget_limit(self.rows[0]).warning:
            doubts.append(doubt)
        sweep.notes = list(dict.fromkeys(sweep.notes + as_notes(doubts)))
        return sweep


def _what_is_kept(request: Request) -> list[str]:
    """For a person."""
    kept = (("importances", request.save_importance), ("preconditioned θ_f", request.save_tuned))
    return [f"kept: {what} in {place}" for what, place in kept if place is not None]


def excess(begun: Begun, original: ScoredSetting, setting: ScoredSetting) -> float:
    """By how much ``setting`` breaks the bound; without one, none does, so that none is skipped."""
    limits = begun.limits(original)
    return setting.excess(limits) if begun.request.is_bounded else -math.inf


def _differing_prompts(importances: ByEstimator, scored: Told) -> list[str]:
    """Warnings where an importance was estimated with other prompts than its partner, or than the scores."""
    warnings = []
    for of_estimator in importances.values():
        estimated = {role: metadata.told for role, metadata in metadata_of(of_estimator).items()}
        if different := different_dates(estimated["forget"], estimated["retain"]):
            warnings.append(different)
        for role, used in estimated.items():
            dates = {used.day, scored.day} - {None}
            both = used.chat_template and scored.chat_template
            if both and (used.system_prompt != scored.system_prompt or len(dates) > 1):
                words = [prompt.in_words() or "no system prompt" for prompt in (used, scored)]
                warnings.append(f"{role} importance estimated with {words[0]}, scores taken with {words[1]}")
    return warnings
