"""What a setting scores: theta_full as a live module, changed, scored and restored, without a checkpoint."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import cast

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.samples import Sample, prompt_of
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.examinee import Examinee, memorisation, probabilities
from perta_fast.evaluation.metrics import mean
from perta_fast.evaluation.offers import ANSWER_TOKENS
from perta_fast.evaluation.rouge import ANY_SCRIPT, is_seen_whole
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance
from perta_fast.models.held_tensors import held_tensors
from perta_fast.models.loading import samples_for
from perta_fast.models.same_names import named_as_module
from perta_fast.rules import Estimator, Rule, RuleName
from perta_fast.scoring.base_loss import BOUND_ALONE, checked_base_loss, not_scored
from perta_fast.scoring.criteria import LOSS, ORIGINAL
from perta_fast.scoring.importances import Importances, rule_of
from perta_fast.scoring.scored_data import ROUGE
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.subtraction.on_module import apply_to_module_, stored_name

_MEMORISATION = ("extraction_strength", "exact_memorization")


@dataclass(frozen=True)
class ScoredData:
    """Tokenised data by role: forget, retain, then further files. answers: the true ones, for the metric Q_AROUGE."""

    samples: Mapping[str, Sequence[Sample]]
    answers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, examinee: Examinee, data: Mapping[str, DataFile], metric: str) -> "ScoredData":
        """As ``examinee`` reads it. Raises InputError naming a line that its model cannot take."""
        samples = {role: examinee.tokenise(file.rows, role) for role, file in data.items()}
        asked = metric == ROUGE
        return cls(samples, {role: file.texts("answer") for role, file in data.items()} if asked else {})


class ScoredModel:
    """A model, with what it is scored on."""

    def __init__(self, examinee: Examinee, data: ScoredData, metric: str) -> None:
        self.subject, self.samples = examinee.subject, data.samples
        self._examinee, self._data, self._metric = examinee, data, metric

    def score(self, name: str) -> ScoredSetting:
        """Losses and metrics of the model in its present state; ``name`` is shown with the progress."""
        started = time.perf_counter()
        values = {role: self._score(role, name) for role in self.samples}
        seconds = time.perf_counter() - started
        (forget_loss, forget), (retain_loss, retain) = values.pop("forget"), values.pop("retain")
        scores = dict[str, float]()
        for role, (loss, metric) in values.items():
            scores |= {f"{role}_{LOSS}": loss, f"{role}_{self._metric}": metric}
        return ScoredSetting("", 1.0, 1.0, 0.0, forget_loss, retain_loss, forget, retain, 0.0, seconds, scores=scores)

    def loss(self, role: str, name: str) -> float:
        """The mean loss on one set, in nats; ``name`` is shown with the progress."""
        return self._score(role, name)[0]

    def _score(self, role: str, name: str) -> tuple[float, float]:
        samples, metric, shown = self.samples[role], self._metric, f"{name}, {role}"
        scores = self._examinee.score(samples, shown, detailed=metric in _MEMORISATION)
        loss = mean([-mean(sample.log_probs) for sample in scores])
        if metric == LOSS:
            return loss, loss
        if metric == ROUGE:
            answers = self._examinee.answer([prompt_of(sample) for sample in samples], shown, ANSWER_TOKENS)
            return loss, self._rouge(role, answers)
        if metric in _MEMORISATION:
            return loss, memorisation(scores)[metric].value
        return loss, probabilities(scores).value

    def notes(self) -> list[str]:
        """What to say of the metric on this data."""
        if self._metric != ROUGE:
            return []
        return [
            f"{ROUGE} of the {role} data has words of any script, as {role}_{ROUGE}{ANY_SCRIPT} in perta eval"
            for role, answers in self._data.answers.items()
            if not all(map(is_seen_whole, answers))
        ]

    def _rouge(self, role: str, answers: list[str]) -> float:
        """With words of any script: a sweep must not choose by a number that cannot see the answers."""
        truth = self._data.answers[role]
        return self._examinee.rouge(f"{role}_{ROUGE}", truth, answers, "rougeL_recall", any_script=True).value


def score_base(
    base: Path, load: Callable[[], Examinee], samples: Sequence[Sample], instead: str = BOUND_ALONE
) -> float:
    """The loss of theta_0, which ``load`` loads from ``base``, on the forget data, in nats.

    samples: the forget data, in the tokens of theta_full. Raises InputError if theta_0 cannot be scored on them, with
    what to do ``instead``.
    """
    try:
        examinee = load()
        samples_for(examinee.subject, samples, None)  # checks that it knows them
        loss = ScoredModel(examinee, ScoredData({"forget": samples}), LOSS).loss("forget", "base")
    except InputError as error:
        raise not_scored(base, str(error), instead) from error
    return checked_base_loss(base, loss, instead)


class LiveModel(ScoredModel):
    """theta_full as a module, which ``measure`` changes and restores.

    model: where theta_full is read from. directories: base and tuned. left: tensors of ``model`` that stay as they are.
    """

    def __init__(
        self,
        examinee: Examinee,
        data: ScoredData,
        metric: str,
        model: Checkpoint,
        directories: tuple[str, str],
        common_rows: bool = False,
        left: Collection[str] = (),
    ) -> None:
        super().__init__(examinee, data, metric)
        held = held_tensors(self.subject.module)
        self._model = named_as_module(model, self.subject.module, held)
        self._directories, self._common_rows = directories, common_rows
        self._stored = [(tensor.ranges, stored_name(self._model, name)) for name, tensor in held.items()]
        self._left = [name for name in held if self._is_left(stored_name(self._model, name), left)]

    def measure(
        self, rule: Rule, importances: Importances, tuned: Path | None = None, label: str = ""
    ) -> ScoredSetting:
        """Subtract, score, and put theta_full back. tuned: another theta_f. label: of the rule, with the progress."""
        started = time.perf_counter()
        self.subtract_(rule, importances, tuned)
        changed = self._round_as_stored_()
        lam, p, alpha = rule.rescaling.lam, rule.rescaling.p, rule.rescaling.alpha
        shown_alpha = "" if alpha == 1 else f", alpha {alpha:g}"
        scored = self.score(f"{label or rule.name + shown_alpha}, lambda {lam:g}")
        self._restore_()
        seconds = time.perf_counter() - started
        return replace(scored, rule=rule.name, p=p, alpha=alpha, lam=lam, changed=changed, seconds=seconds)

    def measure_original(self, importances: Mapping[Estimator, Importances]) -> ScoredSetting:
        """Score theta_full as it is. Raises InputError if the task vector or ``importances`` do not fit it."""
        rules = {rule_of(estimator): by_role for estimator, by_role in importances.items()}
        for rule, by_role in (rules or {Rule.of("tv", 0.0): {}}).items():
            self.subtract_(rule, by_role)
        return self.score(ORIGINAL)

    def subtract_(self, rule: Rule, importances: Importances, tuned: Path | None = None) -> None:
        """``apply_to_module_`` with these checkpoints. tuned: another theta_f."""
        base, own = self._directories
        ratio = importances if isinstance(importances, ImportanceRatio) else None
        pair: Mapping[str, Importance] = {} if isinstance(importances, ImportanceRatio) else importances
        apply_to_module_(
            self.subject.module,
            base,
            own if tuned is None else tuned,
            pair.get("forget"),
            pair.get("retain"),
            importance=ratio,
            rule=cast(RuleName, rule.name),
            **vars(rule.rescaling),
            leave=[escape(name) for name in self._left],
            common_rows=self._common_rows,
        )

    def _is_left(self, name: str, left: Collection[str]) -> bool:
        """Whether a tensor of the module stays. Raises InputError if that is so for a part of it only."""
        entry = self._model.tensors[name]
        made_of = {piece.name for piece in entry.pieces or (entry,)}
        if len(made_of.intersection(left)) not in (0, len(made_of)):
            raise InputError(
                f"{self._model.path}: in memory, {min(made_of.intersection(left))} is one tensor with "
                f"{min(made_of.difference(left))}; let ‹only› and ‹leave› mean both or neither"
            )
        return not made_of.isdisjoint(left)

    @torch.no_grad()
    def _round_as_stored_(self) -> float:
        """Round each parameter to its stored type, as a checkpoint does; return the share that has changed."""
        changed = total = 0
        for values, theta in self._pairs():
            values.copy_(values.to(theta.dtype))
            changed += int((values != theta.to(values)).sum())
            total += values.numel()
        return changed / total

    @torch.no_grad()
    def _restore_(self) -> None:
        """Read theta_full again; adding the difference back would leave rounding errors."""
        for values, theta in self._pairs():
            values.copy_(theta)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The module's values, flat, each with theta_full's in their stored type."""
        for ranges, name in self._stored:
            theta = self._model.tensor(name).view(-1)
            for begin, values in ranges:
                yield values, theta[begin : begin + values.numel()]
