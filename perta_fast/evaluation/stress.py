"""Stress of a model that has forgotten: is it back when the weights are rounded, or after a few steps of relearning?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from perta_fast.data.samples import Sample, by_row
from perta_fast.errors import NotFiniteError
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.examinee import memorisation, probabilities
from perta_fast.evaluation.kept_passes import as_lists, kept_part
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.metrics import mean
from perta_fast.evaluation.stress_table import BEFORE, METRICS, REST
from perta_fast.evaluation.stress_words import ROUNDED
from perta_fast.models.relearning import BATCH_SIZE, RATE, SEED, check_trainable, relearn_
from perta_fast.models.rounding import check_roundable, linear_weights, rounded_
from perta_fast.models.scores import TokenScores

Scores = dict[str, dict[str, float]]  # by set, then by metric

_TENTH = 10  # one forget row in so many is relearned


def check_stress(words: Sequence[str], module: nn.Module) -> None:
    """Raise InputError for a module that one of the stresses cannot change."""
    for word in words:
        if word in ROUNDED:
            check_roundable(linear_weights(module), ROUNDED[word])
        else:
            check_trainable(module)


def stressed(table: MetricTable, words: Sequence[str]) -> dict[str, Any]:
    """What the measured model of ``table`` scores before and under each stress; for ``Evaluation.stress``.

    Metrics are of one forward pass each, without generated text. The model's weights are the same bits afterwards.
    Memory: those that a stress changes a second time; and what ``rounded_`` and ``relearn_`` take.
    """
    sets = table.stress_sets()
    samples = {role: of_set for role, (of_set, _) in sets.items()}
    rows = list(by_row(samples["forget"]))
    relearned = _relearned_rows(len(rows))
    rest = sorted(set(range(len(rows))) - set(relearned))
    relearns = not all(word in ROUNDED for word in words)
    before = {role: of_set for role, (_, of_set) in sets.items()}
    scores = {BEFORE: _aggregates(before, rest if relearns else (), table.examinee.conventions)}
    for word in words:
        of_rows = [] if word in ROUNDED else [samples["forget"][k] for row in relearned for k in rows[row]]
        scores[word] = _scored(table, word, samples, of_rows, rest)
    counts = {role: sum(1 for _ in by_row(of_set)) for role, of_set in samples.items()}
    if relearns and rest:
        counts = {"forget": counts["forget"], REST: len(rest)} | counts
    result: dict[str, Any] = {"rows": counts, "scores": scores}
    if relearns:
        result["relearned"] = {"rows": relearned, "rate": RATE, "batch_size": BATCH_SIZE, "seed": SEED}
        if not rest:
            table.examinee.notes.append("relearn: the forget set has one row, which is relearned; there are no others")
    return result


def _relearned_rows(count: int) -> list[int]:
    """The numbers of the rows that are relearned: a tenth of ``count``, rounded down, at least one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()
    return sorted(order[: max(1, count // _TENTH)])


def _scored(
    table: MetricTable,
    word: str,
    samples: Mapping[str, Sequence[Sample]],
    relearned: Sequence[Sample],
    rest: Sequence[int],
) -> Scores:
    """What the model scores under one stress: kept as one part, with the passes over all sets."""
    examinee, module = table.examinee, table.examinee.subject.module

    def make() -> Scores:
        with _changed(module, word, relearned, examinee.progress):
            scores = {role: examinee.score_under(word, of_set, role) for role, of_set in samples.items()}
        return _aggregates(scores, () if word in ROUNDED else rest, examinee.conventions)

    of = [word, as_lists(relearned), {role: as_lists(of_set) for role, of_set in samples.items()}]
    try:
        result: Scores = kept_part(examinee.kept, f"stress {word}", of, make)
    except NotFiniteError as error:
        examinee.notes.append(f"{word}: {error!s}, so there are no scores")
        return {}
    for role, values in result.items():
        if any(value != value for value in values.values()):
            examinee.notes.append(f"{role} {word}: has scores that are not finite")
    return result


@contextmanager
def _changed(module: nn.Module, word: str, relearned: Sequence[Sample], progress: Any) -> Iterator[None]:
    """The module under one stress; its weights are put back, bit for bit, at the end."""
    if word in ROUNDED:
        parameters = [weight.parameter for weight in linear_weights(module).values()]
    else:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        if word in ROUNDED:
            rounded_(module, ROUNDED[word], progress=progress)
        else:
            relearn_(module, relearned, int(word.partition("=")[2]), progress=progress, description=word)
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


def _aggregates(scores: Mapping[str, Sequence[TokenScores]], rest: Sequence[int], conventions: Conventions) -> Scores:
    """The metrics of each set, and of the forget rows ``rest`` if there are any."""
    sets = {role: list(of_set) for role, of_set in scores.items()}
    if rest:
        sets = {"forget": sets["forget"], REST: [sets["forget"][row] for row in rest]} | sets
    return {role: _metrics(of_set, conventions) for role, of_set in sets.items()}


def _metrics(scores: Sequence[TokenScores], conventions: Conventions) -> dict[str, float]:
    probability = probabilities(scores)
    loss = mean([sample["avg_loss"] for sample in probability.samples])
    memorised = memorisation(scores, end_alone=conventions.end_alone)
    return dict(zip(METRICS, (loss, probability.value, *(metric.value for metric in memorised.values())), strict=True))
