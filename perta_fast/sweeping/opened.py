"""The opened inputs of a sweep, and the models that it loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.evaluation.examinee import Examinee
from perta_fast.files.hashing import hash_file
from perta_fast.models.loading import Subject, load_subject, samples_for
from perta_fast.progress import Progress
from perta_fast.rules import Estimator, Rule
from perta_fast.runs.estimate import Estimation
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import fingerprint
from perta_fast.sweeping.grid import curves_of
from perta_fast.sweeping.importances import ByEstimator, estimate, open_given
from perta_fast.sweeping.live_model import DataSet, LiveModel, ScoredModel
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import ScoredSetting


@dataclass(frozen=True)
class OpenedSweep:
    """A checked request with its inputs opened. curves: at lam 0. given: with importances, by estimator."""

    request: Request
    curves: list[Rule]
    sources: Sources
    given: dict[Estimator, Sources]
    gold: Checkpoint | None
    data: dict[str, DataSet]
    progress: Progress

    @classmethod
    def open(cls, request: Request, progress: Progress) -> "OpenedSweep":
        """Raises InputError for whatever is wrong with arguments or inputs, before a model is loaded."""
        request.check()
        curves = curves_of(request.rules, request.ps, request.alphas, request.threshold)
        checkpoints = (request.model, request.base, request.tuned)
        return cls(
            request,
            curves,
            Sources.open(*checkpoints),
            open_given(curves, checkpoints, request.forget_importance, request.retain_importance),
            None if request.gold is None else Checkpoint.open(request.gold),
            {role: DataSet.read(getattr(request, role), request.metric) for role in ("forget", "retain")},
            progress,
        )

    def inputs(self) -> dict[str, Checkpoint]:
        """Every directory of tensors that is read, by what it is."""
        directories = dict(self.sources.named())
        if self.gold is not None:
            directories["gold"] = self.gold
        for estimator, sources in self.given.items():
            for role in ("forget_importance", "retain_importance"):
                name = role if len(self.given) == 1 else f"{role}, {estimator}"
                directories[name] = sources.named()[role]
        return directories

    def paths(self) -> list[Path]:
        """Every directory and file that is read."""
        tensors = [path for directory in self.inputs().values() for path in (directory.path, *directory.files())]
        return tensors + [given.path for given in self.data.values()]

    def identity(self) -> dict[str, Any]:
        """What tells by path whether an input is still the same."""
        small = {str(given.path): given.digest for given in self.data.values()}
        if self.sources.adapter_config is not None:
            small[str(self.sources.adapter_config)] = hash_file(self.sources.adapter_config)
        weights = {
            str(directory.path / name): state
            for directory in self.inputs().values()
            for name, state in fingerprint(directory).items()
        }
        return weights | small

    def lacking(self) -> list[Estimator]:
        """The estimators that the rules need and that no importance was given of."""
        needed = dict.fromkeys(rule.estimator for rule in self.curves)
        return [estimator for estimator in needed if estimator is not None and estimator not in self.given]

    def load(self, path: Path) -> Subject:
        """A model, where and in what type the sweep runs."""
        dtype = None if self.request.dtype is None else getattr(torch, self.request.dtype)
        return load_subject(path, self.request.device, dtype)

    def estimate(self, subject: Subject, estimators: Sequence[Estimator], folder: Path | None) -> ByEstimator:
        """Importances on both data sets, kept in ``folder`` or in memory."""
        samples = {role: samples_for(subject, given.rows, self.request.max_length) for role, given in self.data.items()}
        importances: ByEstimator = {estimator: {} for estimator in estimators}
        for estimator, by_role in importances.items():
            how = Estimation(subject, estimator, self.request.batch_size, self.progress)
            for role, given in self.data.items():
                out = None if folder is None else folder / estimator / role
                description = f"{role} importance, {estimator}"
                by_role[role] = estimate(how, samples[role], given.digest, description, out)
        return importances

    def score_gold(self, path: Path) -> ScoredSetting:
        """Load the gold model and score it. Raises InputError if what it scores is not finite."""
        scored = ScoredModel(self._examinee(path), self.data, self.request.metric).score("gold")
        if not scored.is_finite:
            raise InputError(f"{path}: what the gold model scores is not finite")
        return scored

    def live(self) -> LiveModel:
        """theta_full, loaded."""
        model, request = self.sources.model, self.request
        return LiveModel(self._examinee(model.path), self.data, request.metric, model, request.base, request.tuned)

    def _examinee(self, path: Path) -> Examinee:
        request = self.request
        return Examinee(self.load(path), request.batch_size, request.max_length, self.progress)
