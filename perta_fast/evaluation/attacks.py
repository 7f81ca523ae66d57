"""Membership attacks that need more than the model's scores: a reference model, or gradients."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from perta_fast.data.samples import Sample, by_row
from perta_fast.evaluation import metrics
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.examinee import Examinee, auc_of
from perta_fast.evaluation.kept_passes import as_lists, kept_by_row
from perta_fast.evaluation.metric_table import GRADIENTS, MetricTable
from perta_fast.evaluation.results import Metric
from perta_fast.files.kept_rows import KeptRows

_SETS = ("forget", "holdout")


def offer_attacks(table: MetricTable, reference_model: str | None, conventions: Conventions) -> None:
    """Offer ``mia_gradnorm``, and with a reference model ``mia_reference``, on data with a holdout set.

    ``mia_gradnorm`` masks nothing, so conventions that do are without it.
    """
    if "mia_loss" not in table.names:
        for name in ("mia_gradnorm", "mia_reference"):
            table.lacking[name] = "a holdout set"
        return
    if reference_model is None:
        table.lacking["mia_reference"] = "--reference-model"
    else:
        table.offer("mia_reference", lambda: _by_reference(table, Path(reference_model)))
    if conventions.hides_padding:
        table.lacking["mia_gradnorm"] = f"to be measured without --compatible {conventions.name}"
    else:
        table.offer("mia_gradnorm", lambda: _by_gradient(table), default=False, needs=GRADIENTS)


def _by_gradient(table: MetricTable) -> Metric:
    """AUC of the norms of the gradients."""
    examinee = table.examinee
    values: dict[str, list[float]] = {}
    alone: dict[str, list[bool]] = {}
    for role in _SETS:
        samples, what = table.samples(role), f"{role} gradient norms"
        rows = [[samples[k] for k in numbers] for numbers in by_row(samples)]
        values[role] = kept_by_row(examinee.kept, what, as_lists(samples), partial(_norms, examinee, rows, what))
        alone[role] = [sum(sample.label_count for sample in row) < 2 for row in rows]
    return auc_of(values, alone)


def _norms(examinee: Examinee, rows: Sequence[Sequence[Sample]], what: str, kept: KeptRows) -> list[float]:
    from perta_fast.models.gradient_norms import gradient_norms

    return gradient_norms(examinee.subject.module, rows, kept=kept, progress=examinee.progress, description=what)


def _by_reference(table: MetricTable, path: Path) -> Metric:
    """AUC of each sample's loss less its loss by the reference model."""
    theirs = table.examinee.score_by(path, {role: table.samples(role) for role in _SETS})
    values = {
        role: [
            metrics.mean(other.log_probs) - metrics.mean(own.log_probs)
            for (own, _), other in zip(table.scored(role), theirs[role], strict=True)
        ]
        for role in _SETS
    }
    return auc_of(values, {role: [False] * len(own) for role, own in values.items()})
