"""A model that is scored layer by layer, and the metrics that are made of the scores of each version of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from perta_fast.data.rows import Row
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.evaluation.metrics import mean
from perta_fast.evaluation.own_data import OwnData
from perta_fast.models.loading import Subject, samples_for
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.base_loss import not_scored
from perta_fast.scoring.criteria import LOSS
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.opened import OpenedSweep


@dataclass(frozen=True)
class WalkedModel:
    """A model without its weights, and what it is scored on.

    names: of the metrics that are made of token scores.
    """

    opened: OpenedSweep
    skeleton: Skeleton
    asking: "_AskingOnce"
    names: list[str]

    @classmethod
    def open(cls, opened: OpenedSweep, path: Path) -> "WalkedModel":
        """Tokenise all data for the model in ``path``. Raises InputError naming a line that it cannot take."""
        request = opened.request
        with opened.ranks.together("the loading of model and data"):
            subject, skeleton = opened.structure(path)
            table = OwnData(opened.scored, None)
            names, _ = table.chosen_of_scores(None)
            told = opened.told(subject)
            asking = _AskingOnce(told, request.batch_size, request.max_length, opened.progress)
            table.measure(asking, names)
            return cls(opened, skeleton, asking, names)

    @property
    def subject(self) -> Subject:
        """The model, with a tokenizer whose chat template is told what it is to be told."""
        return self.asking.subject

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """What it is scored on, by role."""
        return {role: self.asking.tokenised[role] for role in self.opened.scored}

    @property
    def sets(self) -> list[SampleSet]:
        """What each version is run over."""
        return list(self.asking.sets.values())

    def of_base(self) -> "WalkedModel":
        """theta_0 in its place, on the forget data alone, in the same tokens.

        Raises InputError if it does not know them all, or cannot be walked.
        """
        opened, path = self.opened, self.opened.sources.base.path
        samples = self.asking.tokenised["forget"]
        try:
            subject, skeleton = opened.structure(path, text=False)
            samples_for(subject, samples, None)
        except InputError as error:
            raise not_scored(path, str(error)) from error
        forget = SampleSet("forget", samples)
        return replace(self, skeleton=skeleton, asking=replace(self.asking, sets={"forget": forget}))

    def forget_loss(self, folder: Path, schedule: Schedule) -> float:
        """The mean loss of the model as it is on the forget data, in nats; every rank calls it."""
        (found,) = self.walk([Version("base")], folder, "base", schedule)
        return math.nan if found.not_finite else mean([-mean(row.log_probs) for row in found.scores["forget"]])

    def score(
        self, versions: Sequence[Version], folder: Path, description: str, schedule: Schedule
    ) -> list[ScoredSetting]:
        """Walk for all versions together; every rank calls it. folder, schedule: as in ``score_versions``."""
        return list(map(self._setting, self.walk(versions, folder, description, schedule)))

    def walk(
        self, versions: Sequence[Version], folder: Path, description: str, schedule: Schedule
    ) -> list[VersionScores]:
        """The token scores of each version. A walk that was stopped goes on from what it left in ``folder``."""
        opened = self.opened
        return score_versions(
            self.skeleton,
            versions,
            self.sets,
            schedule=schedule,
            threads=threads_for(opened.request.threads, opened.ranks),
            folder=folder,
            resumable=True,
            progress=opened.progress,
            description=description,
            ranks=opened.ranks,
        )

    def _setting(self, found: VersionScores) -> ScoredSetting:
        request, asking = self.opened.request, self.asking
        answering = _AnsweringOnce(
            asking.subject,
            asking.batch_size,
            asking.max_length,
            progress=False,
            scores=found.scores,
            tokenised=asking.tokenised,
        )
        metrics = OwnData(self.opened.scored, None).measure(answering, self.names)
        scores = {name: math.nan if found.not_finite else metric.value for name, metric in metrics.items()}
        forget_loss, retain_loss = scores[f"forget_{LOSS}"], scores[f"retain_{LOSS}"]
        forget, retain = scores[f"forget_{request.metric}"], scores[f"retain_{request.metric}"]
        numbers = forget_loss, retain_loss, forget, retain, found.changed, found.seconds
        return ScoredSetting("", 1.0, 1.0, 0.0, *numbers, scores=scores, not_finite=found.not_finite)


@dataclass
class _AskingOnce(Asking):
    """tokenised: what it has tokenised, by role."""

    tokenised: dict[str, list[Sample]] = field(default_factory=dict)

    def tokenise(self, rows: Sequence[Row], role: str) -> list[Sample]:
        self.tokenised[role] = super().tokenise(rows, role)
        return self.tokenised[role]


@dataclass
class _AnsweringOnce(Answering):
    """tokenised: by an ``_AskingOnce``, for all versions of its model."""

    tokenised: Mapping[str, list[Sample]] = field(default_factory=dict)

    def tokenise(self, rows: Sequence[Row], role: str) -> list[Sample]:
        return self.tokenised[role]
