"""What a setting scores: theta_full as a live module, changed, scored and restored."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.json_lines import Row, read_data
from perta_fast.data.samples import Sample, prompt_of
from perta_fast.errors import InputError
from perta_fast.evaluation.examinee import memorisation, probabilities
from perta_fast.evaluation.metrics import mean, rouge_l
from perta_fast.evaluation.own_data import NEW_TOKENS
from perta_fast.importance.store import Importance
from perta_fast.models.greedy_answers import greedy_answers
from perta_fast.models.held_tensors import held_tensors
from perta_fast.models.loading import Subject, samples_for
from perta_fast.models.token_scores import TokenScores, score_tokens
from perta_fast.progress import Progress
from perta_fast.records.report import DataRecord
from perta_fast.rules import Rule
from perta_fast.subtraction.on_module import apply_to_module_, stored_name
from perta_fast.sweeping.criteria import LOSS, METRICS
from perta_fast.sweeping.results import ScoredSetting

_ROUGE = "Q_A_ROUGE"
_MEMORISATION = ("extraction_strength", "exact_memorization")

Importances = Mapping[str, Importance]  # by role; empty: w = 1


@dataclass(frozen=True)
class DataSet:
    """The forget or the retain data: file, hash and records."""

    path: Path
    digest: str
    records: list[Row]

    @classmethod
    def read(cls, path: str, metric: str) -> "DataSet":
        """Raises InputError for a bad line, and for one that the metric has no use for."""
        records, digest = read_data(path)
        if metric == _ROUGE:
            for record in records:
                if "question" not in record.content:
                    raise InputError(f"{record.where}: metric {_ROUGE} needs a question and its answer")
        return cls(Path(path), digest, records)

    def describe(self, samples: Sequence[Sample]) -> DataRecord:
        """For the record of the sweep."""
        return {
            "path": str(self.path.resolve()),
            "blake3": self.digest,
            "samples": len(samples),
            "truncated": sum(sample.truncated for sample in samples),
        }


def check_metric(metric: str) -> None:
    """Raise InputError unless it is known, and can be measured here."""
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    if metric == _ROUGE and find_spec("rouge_score") is None:
        raise InputError("rouge_score is not installed: pip install 'perta-fast[eval]'")


@dataclass(frozen=True)
class Examination:
    """A model, the forget and retain data in its tokens, and what is measured on them."""

    subject: Subject
    data: Mapping[str, DataSet]
    samples: Mapping[str, Sequence[Sample]]
    metric: str
    batch_size: int
    progress: Progress

    @classmethod
    def of(
        cls,
        subject: Subject,
        data: Mapping[str, DataSet],
        metric: str,
        batch_size: int,
        max_length: int | None,
        progress: Progress,
    ) -> "Examination":
        """Tokenise the data. Raises InputError naming a line that the model cannot take."""
        samples = {role: samples_for(subject, each.records, max_length) for role, each in data.items()}
        return cls(subject, data, samples, metric, batch_size, progress)

    def score(self, name: str) -> ScoredSetting:
        """Losses and metrics of the model as it stands, called ``name`` where progress is shown."""
        started = time.perf_counter()
        (forget_loss, forget), (retain_loss, retain) = (self._score(role, name) for role in self.data)
        seconds = time.perf_counter() - started
        return ScoredSetting("", 1.0, 1.0, 0.0, forget_loss, retain_loss, forget, retain, 0.0, seconds)

    def _score(self, role: str, name: str) -> tuple[float, float]:
        """Loss and metric of one set."""
        scores = score_tokens(
            self.subject.module,
            self.samples[role],
            batch_size=self.batch_size,
            detailed=self.metric in _MEMORISATION,
            progress=self.progress,
            description=f"{name}, {role}",
        )
        loss = mean([-mean(each.log_probs) for each in scores])
        return loss, loss if self.metric == LOSS else self._metric(role, name, scores)

    def _metric(self, role: str, name: str, scores: Sequence[TokenScores]) -> float:
        if self.metric == _ROUGE:
            answers = greedy_answers(
                self.subject.module,
                self.subject.tokenizer,
                [prompt_of(sample) for sample in self.samples[role]],
                batch_size=self.batch_size,
                max_new_tokens=NEW_TOKENS,
                progress=self.progress,
                description=f"{name}, {role} answers",
            )
            truth = [record.content["answer"] for record in self.data[role].records]
            return mean([rouge_l(*pair)[0] for pair in zip(truth, answers, strict=True)])
        if self.metric in _MEMORISATION:
            return memorisation(scores)[_MEMORISATION.index(self.metric)].value
        return probabilities(scores).value


class LiveModel:
    """theta_full as a module, which ``measure`` changes and restores."""

    def __init__(self, examination: Examination, model: Checkpoint, base: Path, tuned: Path) -> None:
        self.subject = examination.subject
        self.examination = examination
        self._model, self._base, self._tuned = model, base, tuned
        self._stored = [
            (tensor.pieces, stored_name(model, name))
            for name, tensor in held_tensors(self.subject.module).items()
        ]

    def measure(self, rule: Rule, importances: Importances) -> ScoredSetting:
        """Subtract, score, and put theta_full back."""
        started = time.perf_counter()
        self.subtract_(rule, importances)
        changed = self._round_as_stored_()
        alpha = "" if rule.rescaling.alpha == 1 else f", alpha {rule.rescaling.alpha:g}"
        found = self.examination.score(f"{rule.name}{alpha}, lambda {rule.rescaling.lam:g}")
        self._restore_()
        return replace(
            found,
            rule=rule.name,
            p=rule.rescaling.p,
            alpha=rule.rescaling.alpha,
            lam=rule.rescaling.lam,
            changed=changed,
            seconds=time.perf_counter() - started,
        )

    def measure_original(self, importances: Sequence[Importances]) -> ScoredSetting:
        """Score theta_full as it is.

        Raises InputError for inputs, ``importances`` among them, that could not be subtracted from it.
        """
        for each in importances or ({},):
            name = "tv" if not each else each["forget"].metadata.estimator
            self.subtract_(Rule.of(name, 0.0), each)
        return self.examination.score("the model as it is")

    def subtract_(self, rule: Rule, importances: Importances) -> None:
        """``apply_to_module_`` with these checkpoints."""
        apply_to_module_(
            self.subject.module,
            self._base,
            self._tuned,
            importances.get("forget"),
            importances.get("retain"),
            rule=rule.name,
            lam=rule.rescaling.lam,
            p=rule.rescaling.p,
            alpha=rule.rescaling.alpha,
            threshold=rule.rescaling.threshold,
        )

    @torch.no_grad()
    def _round_as_stored_(self) -> float:
        """Give each parameter the value that a checkpoint would keep; return the share that has changed."""
        changed = total = 0
        for values, theta in self._pairs():
            values.copy_(values.to(theta.dtype))
            changed += int((values != theta.to(values)).sum())
            total += values.numel()
        return changed / total

    @torch.no_grad()
    def _restore_(self) -> None:
        """Read theta_full again: subtracting a difference would leave rounding errors behind."""
        for values, theta in self._pairs():
            values.copy_(theta)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The module's values, flat, and theta_full's as they are stored."""
        for pieces, stored in self._stored:
            theta = self._model.tensor(stored).view(-1)
            for first, values in pieces:
                yield values, theta[first : first + values.numel()]
